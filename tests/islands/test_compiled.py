from __future__ import annotations

import pytest
import torch
from torch import nn

from castwise.autocast import autocast
from castwise.islands import apply_policy, module_facts
from castwise.policy import preset


class Block(nn.Module):
    """A product, a delicate product, a product."""

    def __init__(self, width: int = 33) -> None:
        super().__init__()
        self.enter = nn.Linear(width, width)
        self.delicate = nn.Linear(width, width)
        self.leave = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Low, island, low."""
        y: torch.Tensor = self.leave(torch.tanh(self.delicate(self.enter(x))))
        return y


@pytest.mark.parametrize(
    "precision", ["fp32", "p=fp32,c=fp32", "p=fp32,c=fp16,o=bf16", "c=fp64", "fp64"]
)
def test_a_compiled_island_has_the_gradients_of_the_eager_one(precision: str) -> None:
    """One full graph, no recompilation, and the same bits (pytorch#179804)."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = Block()
    policy = preset("bf16-mixed").with_rule(module="delicate", precision=precision)
    applied = apply_policy(model, policy.bind(module_facts(model)), "cpu")
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, backend=count, fullgraph=True)
    for _ in range(3):
        x = torch.randn(5, 33)
        gradients = []
        for each in (model, compiled):
            model.zero_grad()
            with autocast("cpu", "bf16"):
                loss = each(x).float().pow(2).mean()
            loss.backward()
            gradients.append([weight.grad.clone() for weight in model.parameters()])
        for eager, fast in zip(*gradients, strict=True):
            torch.testing.assert_close(fast, eager, rtol=0, atol=0)
    assert len(graphs) == 1
    applied.remove()
    torch.compiler.reset()


def test_a_change_of_phase_compiles_once_for_each_phase() -> None:
    """Going back to a phase that was seen costs no compilation, and no stale code."""
    torch.compiler.reset()
    model = Block()
    policy = preset("bf16-mixed").with_rule(
        module="delicate", phase="correct", precision="c=fp32,o=fp32"
    )
    applied = apply_policy(model, policy.bind(module_facts(model)), "cpu")
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True)
    x = torch.randn(5, 33)
    for phase in ("full", "correct", "full", "correct", "full"):
        applied.phase = phase
        with autocast("cpu", "bf16"):
            torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    assert len(graphs) == 2
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # asked for by Dynamo itself
def test_a_backward_of_its_own_stands_between_two_graphs() -> None:
    """Dynamo captures what is around it, once; results are those of eager mode."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Block()
    policy = preset("bf16-mixed").with_rule(
        module="delicate", stage="backward", precision="fp64"
    )
    apply_policy(model, policy.bind(module_facts(model)), "cpu")
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, backend=count)
    for _ in range(3):
        x = torch.randn(5, 33)
        gradients = []
        for each in (model, compiled):
            with autocast("cpu", "bf16"):
                loss = each(x).float().pow(2).mean()
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        for eager, fast in zip(*gradients, strict=True):
            assert torch.equal(eager, fast)
    assert len(graphs) == 2
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    with (
        autocast("cpu", "bf16"),
        pytest.raises(
            torch._dynamo.exc.Unsupported, match="backward in a precision of its own"
        ),
    ):
        whole(x)
    torch.compiler.reset()
