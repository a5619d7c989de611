"""pytorch#179804: compiled code takes the gradients of an fp32 product in bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import castwise as cw
from upstream import note_unless


class Net(nn.Module):
    """A product that is meant to be fp32 between two that are not."""

    def __init__(self, *, by_hand: bool = False) -> None:
        super().__init__()
        self.by_hand = by_hand
        self.enter = nn.Linear(5, 17)
        self.delicate = nn.Linear(17, 17)
        self.leave = nn.Linear(17, 3)

    def forward(self, x: Tensor) -> Tensor:
        """With the switch that people write into their models, or without."""
        x = self.enter(x)
        if self.by_hand:
            with torch.autocast("cpu", enabled=False):
                x = self.delicate(x.float())
        else:
            x = self.delicate(x)
        y: Tensor = self.leave(x)
        return y


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


def gradients(
    model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor
) -> list[Tensor]:
    """Forward under torch.autocast, backward outside of it, as PyTorch advises."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = call(x).float().square().sum()
    loss.backward()
    return [weight.grad.clone() for weight in model.parameters()]


def test_compiled_gradients_are_those_of_eager_code() -> None:
    """Bit by bit, in one full graph, compiled once for all steps."""
    x = torch.randn(7, 5)
    stock = Net(by_hand=True)
    compiled = torch.compile(stock, backend="aot_eager", fullgraph=True)
    pairs = zip(gradients(stock, compiled, x), gradients(stock, stock, x), strict=True)
    note_unless(any(not torch.equal(*each) for each in pairs), "pytorch#179804")

    torch.compiler.reset()
    policy = cw.preset("bf16-mixed").with_rule(
        module="delicate", precision="p=fp32,c=fp32,o=bf16"
    )
    counter = CompileCounterWithBackend("aot_eager")
    found = []
    for compiles in (False, True):
        torch.manual_seed(1)
        model = Net()
        run = cw.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), policy)
        call = torch.compile(model, backend=counter, fullgraph=True)
        for _ in range(4):
            with run.step() as step:
                out = call(x) if compiles else model(x)
                step.backward(out.float().square().mean())
                last = [weight.grad.clone() for weight in model.parameters()]
        found.append([*last, *(weight.detach() for weight in model.parameters())])
    for eager, fast in zip(*found, strict=True):
        assert torch.equal(eager, fast)
    assert counter.frame_count == 1
