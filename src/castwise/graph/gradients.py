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
theory, and what is seen is the rounding of what it was summed from. These are told
apart, and set no scale.
"""

from __future__ import annotations

import copy
import functools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from castwise.graph.classify import PARAMETER
from castwise.graph.gradient_counts import GradientCounts
from castwise.graph.gradient_records import GradientFlow, GradientNode
from castwise.graph.operators import name_of
from castwise.graph.planner import Planned, choose
from castwise.graph.settings import Surroundings
from castwise.graph.values import value_of
from castwise.numerics.target import checked_batches, checked_loss
from castwise.numerics.watch.exponents import ExponentHistogram
from castwise.policy.presets import preset

if TYPE_CHECKING:
    from torch import nn

    from castwise.policy.rules import Policy

_NOISE_BITS, _FEWEST_NOISE_BITS = 22, 18
# A sum of n numbers is wrong by some 2^-24 sqrt(n) of them: 22 - log2(n) / 2 bits below
# what it is summed from, and never more than 18, a bias is noise.

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
    """A backend that runs graphs as they are, and listens to their gradients."""

    def __init__(self, model: nn.Module, policy: Policy, sample: int | None) -> None:
        self._surroundings = Surroundings.of(model, policy)
        self._low: set[fx.Node] = set()
        self._names = {id(weight): name for name, weight in model.named_parameters()}
        self._sample = sample
        self._order: dict[str, fx.Node] = {}
        self._keys: dict[fx.Node, str] = {}
        self._counts: list[tuple[list[str], GradientCounts]] = []
        self._leaves: dict[str, weakref.ref[torch.Tensor]] = {}

    def __call__(
        self, module: fx.GraphModule, examples: Sequence[Any]
    ) -> Callable[..., Any]:
        """Note a graph, and return what runs it."""
        graph = f"graph {len(self._counts)}"
        nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
        for node, example in zip(nodes, examples, strict=True):
            node.meta[PARAMETER] = isinstance(example, torch.nn.Parameter)
            self._keys[node] = self._names.get(id(example), f"{graph}, {node.name}")
        self._low |= _low_values(choose(module.graph, self._surroundings))
        for node in module.graph.nodes:
            key = self._keys.setdefault(node, f"{graph}, {node.name}")
            self._order.setdefault(key, node)
        heard = [node for node in module.graph.nodes if _may_have_gradient(node)]
        keys = [self._keys[node] for node in heard]
        counts = GradientCounts(len(heard), self._sample)
        self._counts.append((keys, counts))
        return _with_ears(module, heard, self._listener(keys, counts))

    def _listener(
        self, keys: list[str], counts: GradientCounts
    ) -> Callable[[int, Any], None]:
        """What a graph tells its values to; it counts their gradients when they come.

        A value of a step is gone with the step, and its hook with it. A weight stays,
        and so does its hook: one that each step added would count in all later ones.
        """
        ears = [functools.partial(counts.see, row) for row in range(len(keys))]
        leaves = self._leaves

        def hear(row: int, value: Any) -> None:
            if not isinstance(value, torch.Tensor) or not value.requires_grad:
                return
            if not value.is_leaf:
                value.register_hook(ears[row])  # type: ignore[no-untyped-call]
                return
            known = leaves.get(keys[row])
            if known is None or known() is not value:
                value.register_hook(ears[row])  # type: ignore[no-untyped-call]
                leaves[keys[row]] = weakref.ref(value)

        return hear

    def flow(self) -> GradientFlow:
        """Everything that was counted since it was asked for last."""
        bins: dict[str, torch.Tensor] = {}
        sizes: dict[str, int] = {}
        for keys, counts in self._counts:
            for key, size, row in zip(keys, *counts.take(), strict=True):
                if size:
                    sizes[key] = size
                    bins[key] = bins[key] + row if key in bins else row
        keys = [key for key in self._order if key in bins]
        rows = torch.stack([bins[key] for key in keys]) if keys else None
        found = () if rows is None else ExponentHistogram.from_bins(rows)
        histograms = dict(zip(keys, found, strict=True))
        return GradientFlow(
            nodes=tuple(
                GradientNode(
                    name=key,
                    op=_op_of(self._order[key]),
                    module=self._surroundings.module_of(self._order[key]),
                    histogram=histograms[key],
                    num_elements=sizes[key],
                    is_low=self._order[key] in self._low,
                    is_noise=self._is_noise(key, histograms, sizes),
                )
                for key in keys
            )
        )

    def _is_noise(
        self, key: str, known: dict[str, ExponentHistogram], sizes: dict[str, int]
    ) -> bool:
        """A bias adds with derivative one, so its gradient is a sum of its user's."""
        node, highest = self._order[key], known[key].highest
        value = value_of(node)
        is_vector = isinstance(value, torch.Tensor) and value.dim() == 1
        if highest is None or not node.meta.get(PARAMETER) or not is_vector:
            return False
        users = [
            self._keys[user]
            for user in node.users
            if name_of(user) in {"linear", "add", "conv1d", "conv2d", "conv3d"}
            and self._keys[user] in known
        ]
        tops = [top for user in users if (top := known[user].highest) is not None]
        if len(tops) != len(node.users):
            return False
        num_summed = max(sizes[user] for user in users) / sizes[key]
        bits = min(_FEWEST_NOISE_BITS, _NOISE_BITS - math.log2(num_summed) / 2)
        return highest < max(tops) - bits


def _may_have_gradient(node: fx.Node) -> bool:
    """Whether a gradient may come to a value; none can where its fake tells so."""
    value = value_of(node)
    if node.op == "output" or value is None:
        return node.op != "output"
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _with_ears(
    module: fx.GraphModule,
    heard: Sequence[fx.Node],
    hear: Callable[[int, Any], None],
) -> Callable[..., Any]:
    """The code of a graph, which tells some of its values as soon as they are made.

    An interpreter would cost more than the counting does.
    """
    rows = {node: row for row, node in enumerate(heard)}
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in module.graph.nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
        if node in rows:
            graph.call_function(hear, (rows[node], made[node]))
    run: Callable[..., Any] = fx.GraphModule(module, graph).forward
    return run


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
