"""Islands and operator table inside CUDA graphs: what is replayed is what was eager."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import castwise as cw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Net(nn.Module):
    """A delicate product between two others, and a softmax, which the table widens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(5, 17)
        self.delicate = nn.Linear(17, 17)
        self.leave = nn.Linear(17, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Low, island, low."""
        y: Tensor = self.leave(self.delicate(self.enter(x)).softmax(-1))
        return y


def prepared() -> tuple[Net, cw.Run]:
    """The net with an fp32 island inside bf16, on the device."""
    model = Net()
    policy = cw.preset("bf16-mixed").with_rule(
        module="delicate", precision="p=fp32,c=fp32,o=bf16"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, cw.prepare(model, optimizer, policy, device="cuda")


def step(model: nn.Module, run: cw.Run, x: Tensor) -> list[Tensor]:
    """Forward in the region, backward outside of it; the gradients."""
    with run.region():
        loss = model(x).float().square().mean()
    loss.backward()
    return [weight.grad for weight in model.parameters() if weight.grad is not None]


def test_a_captured_step_replays_the_gradients_of_eager_code() -> None:
    """For batches that the capture never saw, bit by bit."""
    model, run = prepared()
    batches = [torch.randn(7, 5, device="cuda") for _ in range(3)]
    expected = []
    for x in batches:
        model.zero_grad()
        expected.append([each.clone() for each in step(model, run, x)])

    still = batches[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            step(model, run, still)
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradients = step(model, run, still)
    for x, wanted in zip(batches, expected, strict=True):
        still.copy_(x)
        graph.replay()
        for found, each in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(found, each, rtol=0, atol=0)


def test_compiled_with_cuda_graphs_the_island_stays_high() -> None:
    """`mode="reduce-overhead"` captures and replays by itself."""
    torch.compiler.reset()
    model, run = prepared()
    call = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    x = torch.randn(7, 5, device="cuda")
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        model.zero_grad()
        found = [each.clone() for each in step(call, run, x)]
        model.zero_grad()
        wanted = [each.clone() for each in step(model, run, x)]
        scale = max(each.abs().max().item() for each in wanted)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2.0**-6 * scale)
    torch.compiler.reset()
