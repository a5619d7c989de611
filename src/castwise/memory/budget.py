"""Recompute by a budget of bytes: which blocks pay with time so that the step fits.

    plan = plan_for_budget(model, batch, loss_fn, policy, budget=2 << 30)
    plan.choices                       # block -> "keep", "store" or "recompute"
    plan.curve                         # the least time for every number of bytes
    chosen = plan.put(model)           # and chosen.remove()

For each block three things are known before the step runs: the bytes that it holds for
its backward and the bytes that it holds when it is recomputed (from two estimates), and
the seconds of its forward (timed without gradients, so that nothing is held). A block
may be kept as it is, have its saved activations stored in another format, or be
recomputed. Adding block after block to the front of best (bytes, seconds) pairs, and
dropping every pair that another beats in both, gives the least time for every number of
bytes: an exact knapsack, whose front stays short because blocks are alike.

Sums of bytes are not the peak: a block that is recomputed fills up again in the
backward. So what was chosen is estimated as a whole, and as long as it is above the
budget, more is asked for.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch

from castwise.errors import BudgetError
from castwise.fitting import device_of
from castwise.memory.estimate import Estimate, LossFn, estimate
from castwise.memory.recompute import Recomputed, blocks_of, recompute_modules
from castwise.memory.save_formats import store_of
from castwise.memory.saves import StoredSaves
from castwise.region import Region

if TYPE_CHECKING:
    from castwise.policy.rules import Policy

Choice = Literal["keep", "store", "recompute"]
"""What becomes of the activations of a block."""

_FRONT = 512  # pairs that are kept while blocks are added
_TRIES = 8
_TIMINGS = 3
_PROBE = 1 << 21  # numbers that are stored once to time it


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCost:
    """What one block holds and takes."""

    fqn: str
    """Where it stands."""

    saved_bytes: int
    """Held for its backward when it is kept."""

    stored_bytes: int
    """Held when its saves are stored in the other format; as above without one."""

    recomputed_bytes: int
    """Held when it is recomputed."""

    forward_seconds: float
    """Of its forward: what a recompute costs."""

    store_seconds: float
    """Of storing its saves and of widening them again."""

    def options(self, *, stores: bool) -> tuple[tuple[Choice, int, float], ...]:
        """Every choice, the bytes that it saves and the seconds that it costs."""
        found: list[tuple[Choice, int, float]] = [("keep", 0, 0.0)]
        if stores:
            gain = self.saved_bytes - self.stored_bytes
            found.append(("store", gain, self.store_seconds))
        gain = self.saved_bytes - self.recomputed_bytes
        found.append(("recompute", gain, self.forward_seconds))
        return tuple(each for each in found if each[0] == "keep" or each[1] > 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePoint:
    """One best pair: no other choice takes fewer bytes in this time."""

    bytes_saved: int
    """Fewer bytes of activations than when all is kept."""

    extra_seconds: float
    """More time per step."""

    choices: tuple[Choice, ...]
    """What becomes of each block, in the order of the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetPlan:
    """What becomes of each block, and what it costs."""

    budget_bytes: int
    """What the step had to fit into."""

    peak_bytes: int
    """The estimated peak of the step as planned."""

    unplanned_bytes: int
    """The estimated peak when every block is kept."""

    extra_seconds: float
    """More time per step than when every block is kept."""

    forward_seconds: float
    """Of all blocks together."""

    choices: Mapping[str, Choice]
    """fqn of each block -> what becomes of it."""

    store: str | None
    """The format of stored activations."""

    curve: tuple[CurvePoint, ...]
    """The least time for every number of bytes, from nothing saved to the most."""

    def modules(self, choice: Choice) -> tuple[str, ...]:
        """Return the blocks with a choice."""
        return tuple(fqn for fqn, each in self.choices.items() if each == choice)

    def put(self, model: torch.nn.Module) -> PlanInForce:
        """Recompute and store as planned."""
        return _put(model, self.choices, self.store)

    def summary(self) -> str:
        """One line for a log."""
        peak, budget, without = (
            f"{size / 2**20:,.1f}"
            for size in (self.peak_bytes, self.budget_bytes, self.unplanned_bytes)
        )
        again, low = len(self.modules("recompute")), len(self.modules("store"))
        stored = f", {low} stored in {self.store}" if low else ""
        return (
            f"peak {peak} MiB of {budget} ({without} without); {again} of "
            f"{len(self.choices)} blocks recomputed{stored}; "
            f"{1e3 * self.extra_seconds:.1f} ms more per step"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanInForce:
    """A plan that was put on a model."""

    recomputed: Recomputed
    """The blocks that are recomputed."""

    stored: tuple[StoredSaves, ...]
    """Those whose saves are stored in another format."""

    def remove(self) -> None:
        """Keep all activations as before."""
        self.recomputed.remove()
        for each in self.stored:
            each.remove()


def plan_for_budget(
    model: torch.nn.Module,
    batch: Sequence[Any],
    loss_fn: LossFn,
    policy: Policy | None = None,
    *,
    budget: int,
    optimizer: Any = None,
    store: str | None = None,
) -> BudgetPlan:
    """Choose what to keep, to store and to recompute so that a step fits.

    Args:
        model: Any module tree without a policy on it; it stays as it is.
        batch: The model's inputs and, last, the target of the loss.
        loss_fn: From the model's output and the target to a scalar.
        policy: What runs in which format. Default: the model as it is.
        budget: Bytes of weights, gradients, states and activations together.
        optimizer: Of the model, or what builds one. Default: none.
        store: A format in which activations may be stored besides: fp16, bf16 or int8.
            Default: none, so that gradients stay the same bit by bit.

    Raises:
        BudgetError: No choice makes it fit; the message says by how much it misses.
        SettingsError: The model has no blocks, or there is no such format.
    """
    blocks = blocks_of(model, what="a budget")

    def estimated(choices: Mapping[str, Choice]) -> Estimate:
        return estimate(
            model,
            batch,
            loss_fn,
            policy,
            optimizer=optimizer,
            recompute=lambda copy: _put(copy, choices, store),
        )

    kept = estimated({})
    seconds = _forward_seconds(model, batch, blocks, policy)
    costs = _costs(model, blocks, seconds, kept, estimated, store)
    front = best_choices(costs, stores=store is not None)
    asked = kept.peak_bytes - budget
    point, peak = front[0], kept.peak_bytes
    for _ in range(_TRIES):
        if peak <= budget:
            break
        point = next((p for p in front if p.bytes_saved >= asked), front[-1])
        peak = estimated(dict(zip(blocks, point.choices, strict=True))).peak_bytes
        if point is front[-1]:
            break
        asked = max(asked + peak - budget, point.bytes_saved + 1)
    if peak > budget:
        raise BudgetError(
            f"a step within {budget / 2**20:,.1f} MiB misses it by "
            f"{(peak - budget) / 2**20:,.1f} MiB with every block at its smallest "
            f"(kept: {kept.peak_bytes / 2**20:,.1f} MiB); halve the batch and "
            "accumulate gradients, store weights or states in fewer bits, or raise "
            "the budget"
        )
    return BudgetPlan(
        budget_bytes=budget,
        peak_bytes=peak,
        unplanned_bytes=kept.peak_bytes,
        extra_seconds=point.extra_seconds,
        forward_seconds=sum(cost.forward_seconds for cost in costs),
        choices=dict(zip(blocks, point.choices, strict=True)),
        store=store,
        curve=front,
    )


def best_choices(costs: Sequence[BlockCost], *, stores: bool) -> tuple[CurvePoint, ...]:
    """Return every best pair of bytes and seconds, fewest bytes saved first.

    Args:
        costs: Of each block.
        stores: Whether activations may be stored in the other format.
    """
    front: list[tuple[int, float, tuple[Choice, ...]]] = [(0, 0.0, ())]
    for cost in costs:
        options = cost.options(stores=stores)
        grown = [
            (saved + gain, seconds + more, (*choices, choice))
            for saved, seconds, choices in front
            for choice, gain, more in options
        ]
        front = _thinned(_undominated(grown))
    return tuple(
        CurvePoint(bytes_saved=saved, extra_seconds=seconds, choices=choices)
        for saved, seconds, choices in front
    )


def _undominated(
    pairs: list[tuple[int, float, tuple[Choice, ...]]],
) -> list[tuple[int, float, tuple[Choice, ...]]]:
    """Keep those that no other beats in bytes and seconds, fewest bytes first."""
    # Where two are equal, the last block shall be kept: its memory is free again before
    # the backward comes to those that fill up once more.
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2][-1] != "keep"))
    kept: list[tuple[int, float, tuple[Choice, ...]]] = []
    for pair in pairs:  # from the most bytes saved to the fewest: time must fall
        if not kept or pair[1] < kept[-1][1]:
            kept.append(pair)
    return kept[::-1]


def _thinned(
    front: list[tuple[int, float, tuple[Choice, ...]]],
) -> list[tuple[int, float, tuple[Choice, ...]]]:
    """Keep a front short where blocks are all unlike; its ends always stay."""
    if len(front) <= _FRONT:
        return front
    step = (len(front) - 1) / (_FRONT - 1)
    return [front[round(place * step)] for place in range(_FRONT)]


def _costs(
    model: torch.nn.Module,
    blocks: Sequence[str],
    seconds: Mapping[str, float],
    kept: Estimate,
    estimated: Callable[[Mapping[str, Choice]], Estimate],
    store: str | None,
) -> list[BlockCost]:
    """Return what each block holds, by estimates, and takes."""
    recomputed = estimated(dict.fromkeys(blocks, "recompute"))
    stored = kept if store is None else estimated(dict.fromkeys(blocks, "store"))
    seconds = _alike(model, kept, seconds)
    per_byte = 0.0 if store is None else _seconds_per_byte(model, store)
    return [
        BlockCost(
            fqn=fqn,
            saved_bytes=(saved := kept.num_bytes("saved", module=fqn)),
            stored_bytes=stored.num_bytes("saved", module=fqn),
            recomputed_bytes=recomputed.num_bytes("saved", module=fqn),
            forward_seconds=seconds[fqn],
            store_seconds=per_byte * saved,
        )
        for fqn in blocks
    ]


def _alike(
    model: torch.nn.Module, kept: Estimate, seconds: Mapping[str, float]
) -> dict[str, float]:
    """Give blocks of one class and size one time, so that noise chooses nothing."""
    groups: dict[tuple[type, int], list[str]] = {}
    for fqn in seconds:
        size = kept.num_bytes("saved", module=fqn)
        groups.setdefault((type(model.get_submodule(fqn)), size), []).append(fqn)
    return {
        fqn: statistics.median(seconds[each] for each in group)
        for group in groups.values()
        for fqn in group
    }


def _forward_seconds(
    model: torch.nn.Module,
    batch: Sequence[Any],
    blocks: Sequence[str],
    policy: Policy | None,
) -> dict[str, float]:
    """Time the forward of each block: the median over some forwards of the model.

    Without gradients, so that nothing is held. Islands are not put on for this; what
    stands around them is.
    """
    taken: dict[str, list[float]] = {fqn: [] for fqn in blocks}
    modes = [(module, module.training) for module in model.modules()]
    with contextlib.ExitStack() as stack:
        for module, mode in modes:
            stack.callback(setattr, module, "training", mode)
        model.eval()  # buffers stay as they are
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng())
        if policy is not None:
            region = Region.of(policy, "full")
            stack.enter_context(region.entered(device_of(model).type))
        for fqn in blocks:
            _time_into(taken[fqn], model.get_submodule(fqn), stack)
        sums: dict[str, list[float]] = {fqn: [] for fqn in blocks}
        for _ in range(_TIMINGS):
            model(*batch[:-1])
            for fqn in blocks:  # a block may run several times in one forward
                sums[fqn].append(sum(taken[fqn]))
                taken[fqn].clear()
    return {fqn: statistics.median(values) for fqn, values in sums.items()}


def _time_into(
    taken: list[float], module: torch.nn.Module, stack: contextlib.ExitStack
) -> None:
    started: list[float] = []

    def begin(*_: Any) -> None:
        _wait()
        started.append(time.perf_counter())

    def end(*_: Any) -> None:
        _wait()
        taken.append(time.perf_counter() - started.pop())

    stack.callback(module.register_forward_pre_hook(begin).remove)
    stack.callback(module.register_forward_hook(end).remove)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _seconds_per_byte(model: torch.nn.Module, store: str) -> float:
    """Time storing and widening one tensor, per byte that it took before."""
    weight = next(model.parameters())
    probe = torch.rand(_PROBE, device=weight.device)
    times = []
    for _ in range(_TIMINGS):
        _wait()
        started = time.perf_counter()
        kept = store_of(store).put(probe)
        assert kept is not None
        kept.get()
        _wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times) / probe.nbytes


def _put(
    model: torch.nn.Module, choices: Mapping[str, Choice], store: str | None
) -> PlanInForce:
    stored = [fqn for fqn, choice in choices.items() if choice == "store"]
    recomputed = [fqn for fqn, choice in choices.items() if choice == "recompute"]
    return PlanInForce(
        recomputed=recompute_modules(model, recomputed),
        stored=tuple(
            StoredSaves(model.get_submodule(fqn), store_of(store), spares_borders=False)
            for fqn in stored
            if store is not None
        ),
    )


def curve_steps(plan: BudgetPlan) -> list[tuple[int, float]]:
    """Return the curve as a staircase of (bytes, seconds), for a picture."""
    points = [(p.bytes_saved, p.extra_seconds) for p in plan.curve]
    steps = points[:1]
    for before, after in pairwise(points):
        steps += [(before[0], after[1]), after]
    return steps
