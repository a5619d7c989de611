"""From a model to graphs: Dynamo captures, the planner plans, an inner compiler runs.

Dynamo hands each graph that it captures to a backend. Ours plans it, inserts the casts,
and hands it on to what runs it (`castwise.graph.inner`). It sees the operators of
Python (`linear`, `softmax`), not those they fall apart into, so the operator table
holds as it is, autograd makes the backward, and attention is still one operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from castwise.graph.classify import PARAMETER
from castwise.graph.coverage import covered
from castwise.graph.inner import Inner, inner_compiler
from castwise.graph.kept_weights import KeptWeights
from castwise.graph.planner import plan_graph

if TYPE_CHECKING:
    from castwise.graph.plan import GraphPlan
    from castwise.graph.settings import Surroundings


class PlanningBackend:
    """What Dynamo hands its graphs to, in one phase."""

    def __init__(
        self,
        surroundings: Surroundings,
        inner: Inner,
        *,
        kept: KeptWeights | None,
        saves: str | None = None,
    ) -> None:
        self._surroundings = surroundings
        self._kept = kept
        self._compile, self.bills = inner_compiler(inner, saves)
        self._num_graphs = 0
        self.graphs: list[GraphPlan] = []
        """The plans of all graphs and of the bodies inside of them."""

    @property
    def captured(self) -> set[str]:
        """Modules that captured nodes with a value come from."""
        return {
            node.module
            for graph in self.graphs
            for node in graph.nodes
            if node.role not in {"input", "output"}
        }

    @property
    def num_graphs(self) -> int:
        """How many graphs were captured, those of recompilations included."""
        return self._num_graphs

    def __call__(
        self, module: fx.GraphModule, examples: Sequence[Any], **_: Any
    ) -> Callable[..., Any]:
        """Plan a graph, and return what runs it."""
        nodes = (node for node in module.graph.nodes if node.op == "placeholder")
        for node, example in zip(nodes, examples, strict=True):
            node.meta[PARAMETER] = isinstance(example, nn.Parameter)
        name = f"graph {self._num_graphs}"
        self._num_graphs += 1
        self.graphs += plan_graph(module, self._surroundings, name)
        inputs = list(examples)
        if self._kept is None:
            return covered(self._compile(module, inputs))
        module, lend = self._kept.take_out(module, inputs)
        run = covered(self._compile(module, inputs))
        return lambda *args: run(*args, *lend(args))
