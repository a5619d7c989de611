"""Gradient flow: how large the gradient of every value is, and which loss scale fits.

    flow = gradient_flow(model, batch, loss_fn)
    print(flow.summary())           # 75 gradients, largest 2^-6; scale 2^18, ...
    flow.suggest_scale().value      # a power of two
    flow.underflow(2.0**10)         # worst share of a gradient that would be lost
    print(flow.select(module="blocks.0"))

One real batch runs in fp32, graph by graph, and each gradient is counted where autograd
hands it over: by exponent, so that one histogram answers for every loss scale and every
format (see `numerics.watch`). The gradient of a value is linear in the loss scale by
construction; local derivatives, which are not, are never looked at. A scale is limited
by the gradients that come in the low format under the plan of the policy: that of the
loss itself is one, and stays in fp32.

Some gradients are noise: that of a bias in front of a softmax or a norm is zero in
theory, and what is seen is rounding, some 2^-24 below what it was summed from. These
are told apart, and set no scale.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from castwise.graph.classify import PARAMETER
from castwise.graph.gradient_records import GradientFlow, GradientNode
from castwise.graph.operators import name_of
from castwise.graph.planner import Planned, choose
from castwise.graph.settings import Surroundings
from castwise.numerics.target import checked_batches, checked_loss
from castwise.numerics.watch.exponents import NUM_BINS, ExponentHistogram, exponent_bins
from castwise.policy.presets import preset

if TYPE_CHECKING:
    from torch import nn

    from castwise.policy.rules import Policy

NOISE_BITS = 18
"""A bias whose gradient is that many bits below what it is summed from is noise."""

DEFAULT_SAMPLE = 4096
"""Numbers counted of each gradient, at random: a stride would hit structure."""


def gradient_flow(
    model: nn.Module,
    batch: Sequence[Any],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    policy: Policy | str = "16-mixed",
    *,
    sample: int | None = DEFAULT_SAMPLE,
) -> GradientFlow:
    """Run one batch forward and backward in fp32, and count every gradient.

    Args:
        model: A copy of it runs.
        batch: The model's inputs and, last, the target.
        loss_fn: From the model's output and the target to a scalar.
        policy: What tells which gradients come in a low format.
        sample: How many numbers of each gradient are counted; none counts all.

    Raises:
        TargetError: The batch is no tuple, or the loss no scalar with a gradient.
    """
    (given,) = checked_batches([batch], what="a gradient flow")
    twin = copy.deepcopy(model)
    chosen = preset(policy) if isinstance(policy, str) else policy
    counter = GradientCounter(twin, chosen, sample)
    run = torch.compile(twin, backend=counter)
    with torch.random.fork_rng(devices=[]):
        loss = checked_loss(
            loss_fn(run(*given[:-1]), given[-1]), what="a gradient flow"
        )
        loss.backward()  # type: ignore[no-untyped-call]
    return counter.flow()


class GradientCounter:
    """A backend that runs graphs node by node and listens to their gradients."""

    def __init__(self, model: nn.Module, policy: Policy, sample: int | None) -> None:
        self._surroundings = Surroundings.of(model, policy)
        self._low: set[fx.Node] = set()
        self._names = {id(weight): name for name, weight in model.named_parameters()}
        self._sample = sample
        self._draws = torch.Generator().manual_seed(0)
        self._num_graphs = 0
        self._order: dict[str, fx.Node] = {}
        self._bins: dict[str, torch.Tensor] = {}
        self._taken: dict[str, torch.Tensor] = {}
        self._drawn: dict[int, torch.Tensor] = {}
        self._sizes: dict[str, int] = {}
        self._keys: dict[fx.Node, str] = {}

    def __call__(
        self, module: fx.GraphModule, examples: Sequence[Any]
    ) -> Callable[..., Any]:
        """Note a graph, and return what runs it."""
        graph = f"graph {self._num_graphs}"
        self._num_graphs += 1
        nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
        for node, example in zip(nodes, examples, strict=True):
            node.meta[PARAMETER] = isinstance(example, torch.nn.Parameter)
            self._keys[node] = self._names.get(id(example), f"{graph}, {node.name}")
        self._low |= _low_values(choose(module.graph, self._surroundings))
        for node in module.graph.nodes:
            key = self._keys.setdefault(node, f"{graph}, {node.name}")
            self._order.setdefault(key, node)
        run: Callable[..., Any] = _Listening(module, self).run
        return run

    def listen(self, node: fx.Node, value: Any) -> None:
        """Count the gradient of a value when it comes."""
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            return
        if value.is_complex() or node.op == "output":
            return
        key = self._keys[node]
        value.register_hook(lambda gradient: self._count(key, gradient))  # type: ignore[no-untyped-call]

    def _count(self, key: str, gradient: torch.Tensor) -> None:
        """Take the numbers out; a sample is counted when the batch is done."""
        values = gradient.detach().reshape(-1)
        self._sizes[key] = values.numel()
        if self._sample is None:
            self._bins[key] = _counted(values)
        elif values.numel() <= self._sample:
            self._taken[key] = values.clone()
        else:
            self._taken[key] = values[self._places(values)]

    def _places(self, values: torch.Tensor) -> torch.Tensor:
        """Where a tensor of that size is sampled; drawn once for each size."""
        size = values.numel()
        if size not in self._drawn:
            assert self._sample is not None
            places = torch.randint(size, (self._sample,), generator=self._draws)
            self._drawn[size] = places.to(values.device)
        return self._drawn[size]

    def flow(self) -> GradientFlow:
        """Everything that was counted."""
        self._bins |= {key: _counted(values) for key, values in self._taken.items()}
        keys = [key for key in self._order if key in self._bins]
        histograms = dict(
            zip(
                keys,
                ExponentHistogram.from_bins(
                    torch.stack([self._bins[key] for key in keys]).cpu()
                ),
                strict=True,
            )
            if keys
            else ()
        )
        return GradientFlow(
            nodes=tuple(
                GradientNode(
                    name=key,
                    op=_op_of(self._order[key]),
                    module=self._surroundings.module_of(self._order[key]),
                    histogram=histograms[key],
                    num_elements=self._sizes[key],
                    is_low=self._order[key] in self._low,
                    is_noise=self._is_noise(key, histograms),
                )
                for key in keys
            )
        )

    def _is_noise(self, key: str, known: dict[str, ExponentHistogram]) -> bool:
        """A bias adds with derivative one, so its gradient is a sum of its user's."""
        node, highest = self._order[key], known[key].highest
        value = node.meta.get("example_value")
        is_vector = isinstance(value, torch.Tensor) and value.dim() == 1
        if highest is None or not node.meta.get(PARAMETER) or not is_vector:
            return False
        users = [
            known[self._keys[user]].highest
            for user in node.users
            if name_of(user) in {"linear", "add", "conv1d", "conv2d", "conv3d"}
            and self._keys[user] in known
        ]
        tops = [each for each in users if each is not None]
        return len(tops) == len(node.users) and highest < max(tops) - NOISE_BITS


class _Listening(fx.Interpreter):
    """Runs a graph node by node, and listens to each value."""

    def __init__(self, module: fx.GraphModule, counter: GradientCounter) -> None:
        super().__init__(module)
        self._counter = counter

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self._counter.listen(n, value)
        return value


def _counted(values: torch.Tensor) -> torch.Tensor:
    return torch.bincount(exponent_bins(values), minlength=NUM_BINS)


def _low_values(planned: Planned) -> set[fx.Node]:
    """Values whose gradients come low: held low, or cast to low for a user."""
    problem, labels = planned.problem, planned.solution.labels
    held = {node for node, var in problem.var.items() if labels[var] == "low"}
    casts = planned.solution.needs.casts
    return held | {cast.source for cast in casts if cast.to.itemsize < 4}


def _op_of(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "weight" if node.meta.get(PARAMETER) else "input"
    return name_of(node)
