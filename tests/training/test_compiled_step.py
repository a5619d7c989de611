from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from castwise.autocast import uninstall
from castwise.policy import Policy, preset
from castwise.training.step import prepare

POLICY = Policy.parse(
    """
castwise: 1
default: p=fp32,c=bf16,o=bf16,r=fp32
rules:
  - module: solver
    phase: correct
    precision: c=fp32,o=fp32
  - op: softmax
    phase: predict
    category: as_is
"""
)


class Counter:
    """A backend that keeps every graph that it was given, forward and backward."""

    def __init__(self) -> None:
        self.forward: list[torch.fx.GraphModule] = []
        self.backward: list[torch.fx.GraphModule] = []
        self.backend = aot_autograd(
            fw_compiler=self._into(self.forward), bw_compiler=self._into(self.backward)
        )

    @staticmethod
    def _into(kept: list[torch.fx.GraphModule]) -> Callable[..., Any]:
        def compile_graph(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
            kept.append(graph)
            return make_boxed_func(graph.forward)

        return compile_graph

    @property
    def number(self) -> tuple[int, int]:
        """Forward and backward graphs so far."""
        return len(self.forward), len(self.backward)


class Net(nn.Module):
    """A low product, a solver, a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.solver = nn.Linear(33, 33), nn.Linear(33, 33)

    def forward(self, x: Tensor) -> Tensor:
        """Low, delicate, softmax."""
        y: Tensor = self.solver(self.enter(x)).softmax(-1)
        return y


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    uninstall()


@pytest.mark.parametrize("name", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_a_compiled_training_step_compiles_nothing_after_the_second(name: str) -> None:
    """Weights, gradients and the loss scale change; formats and guards do not."""
    model, counter = Net(), Counter()
    policy = preset(name).with_rule(module="solver", precision="p=fp32,c=fp32")
    scale = None
    if name == "16-mixed":
        from castwise.loss_scale import DynamicScale

        scale = DynamicScale(initial=2.0**6, interval=1)  # another one each step
    run = prepare(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        policy,
        loss_scale=scale,
        clip_norm=0.01,
    )
    compiled = torch.compile(model, backend=counter.backend, fullgraph=True)
    after = []
    for _ in range(6):
        with run.step() as step:
            step.backward(compiled(torch.randn(7, 33)).float().square().mean())
        after.append(counter.number)
    assert after[1][0] >= 1
    assert after[1][1] >= 1
    assert set(after[1:]) == {after[1]}
    run.remove()


def test_phases_compile_once_each_forward_and_backward() -> None:
    """Islands and operators by phase: a phase that was seen costs no compilation."""
    model, counter = Net(), Counter()
    run = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), POLICY)
    compiled = torch.compile(model, backend=counter.backend, fullgraph=True)
    x, seen = torch.randn(7, 33), {}

    def one_round() -> None:
        for phase in ("full", "correct", "predict", "correct", "full"):
            run.phase = phase
            with run.step() as step:
                y, eager = compiled(x), model(x)
                torch.testing.assert_close(y, eager, rtol=0, atol=0)
                step.backward(y.float().square().mean())
            assert seen.setdefault(phase, y.dtype) == y.dtype

    one_round()
    assert counter.number == (3, 3)
    for _ in range(2):
        one_round()
    assert counter.number == (3, 3)
    assert seen == {
        "full": torch.float32,
        "correct": torch.float32,
        "predict": torch.bfloat16,
    }
    run.remove()
