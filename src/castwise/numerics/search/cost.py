"""Costs: what a unit costs in a candidate, by one of three models.

    flops   operations of products plus elements of everything else, times bits / 32:
            what a device does that is twice as fast in half the bits
    bytes   elements read and written, and weights, times the bytes of the format
    time    forward and backward of the unit, measured on this machine in each format,
            with the casts that it needs; what runs slower in bf16 costs more there.
            A module alone pays for casts that it shares with its neighbours, so whole
            steps with all modules of one class in another format bound what these can
            save together; and at the end whole steps are compared with everything high
            and everything low

All are for one forward and backward of the first batch. Only differences between
candidates decide anything. A backward of its own runs the module once more, and that
counts; what a module cannot be asked, such as a staged format where other modules are
in it, has a cost that is never looked at.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from castwise.errors import SettingsError
from castwise.numerics.search.assignment import policy_of, tree_of
from castwise.numerics.search.bench import Bench
from castwise.numerics.search.candidates import Candidate, parse_candidates
from castwise.numerics.search.handovers import Handovers
from castwise.numerics.search.isolation import isolated
from castwise.numerics.search.reference_step import Call
from castwise.numerics.search.unit_play import seconds_of
from castwise.numerics.search.units import Unit, innermost
from castwise.policy.rules import Policy

CostModel = str | Callable[[Unit, str], float]
"""`flops`, `bytes`, `time`, or a function of a unit and a candidate's name."""

COST_MODELS = ("flops", "bytes", "time")
"""Cost models by name."""

_REPEATS = 5


def check_cost_model(cost: CostModel) -> None:
    """Refuse a cost model that there is none of."""
    if not callable(cost) and cost not in COST_MODELS:
        raise SettingsError(
            f"cost needs one of {', '.join(COST_MODELS)} or a function of a unit and a "
            f"candidate, got {cost!r}"
        )


class Costs:
    """Tells what units cost in each candidate.

    Args:
        bench: Where the model stands.
        calls: What each module saw.
        candidates: What is to be priced.
        default: The policy's default.
        handovers: In which formats units are given their inputs.
    """

    def __init__(
        self,
        bench: Bench,
        calls: dict[str, list[Call]],
        candidates: Sequence[Candidate],
        default: Candidate,
        handovers: Handovers,
    ) -> None:
        self._bench, self._calls = bench, calls
        self._candidates, self._default = candidates, default
        self._handovers = handovers

    def of_units(
        self, units: Sequence[Unit], cost: CostModel
    ) -> dict[str, dict[str, float]]:
        """Return unit -> candidate -> cost."""
        if cost == "time":
            return self._times(units)
        return {
            unit.fqn: {
                each.name: _counted(unit, each, cost) for each in self._candidates
            }
            for unit in units
        }

    def of_operator(
        self, unit: Unit, callers: Sequence[Unit], cost: CostModel
    ) -> dict[str, float]:
        """Return candidate -> cost of an operator, beyond what its callers cost.

        Only the default puts it low; with all others it runs in fp32, which is dearer.
        """
        if callable(cost):
            return {each.name: cost(unit, each.name) for each in self._candidates}
        low = self._default
        if cost == "time":
            table = sum(self._seconds(callers, low).values())
            more = table - sum(self._seconds(callers, low, unit.op).values())
        else:
            (fp32,) = parse_candidates(["fp32"])
            more = _counted(unit, fp32, cost) - _counted(unit, low, cost)
        return {
            each.name: max(0.0, -more if each == low else more)
            for each in self._candidates
        }

    def _times(self, units: Sequence[Unit]) -> dict[str, dict[str, float]]:
        """Measure; modules in a unit run in fp32 meanwhile, and are taken off."""
        (fp32,) = parse_candidates(["fp32"])
        alone = innermost(units)
        seconds = {
            each.name: self._seconds(alone if each.backward else units, each)
            for each in {
                fp32.name: fp32,
                **{c.name: c for c in self._candidates},
            }.values()
        }
        whole = seconds[fp32.name]
        own = {unit.fqn: max(0.0, _own(unit, units, whole)) for unit in units}
        found = {
            fqn: {
                each.name: own[fqn]
                + seconds[each.name].get(fqn, whole[fqn])
                - whole[fqn]
                for each in self._candidates
            }
            for fqn in own
        }
        self._bound_by_whole_steps(units, own, found)
        least = {fqn: min(0.0, *costs.values()) for fqn, costs in found.items()}
        return {
            fqn: {name: cost - least[fqn] for name, cost in costs.items()}
            for fqn, costs in found.items()
        }

    def _bound_by_whole_steps(
        self,
        units: Sequence[Unit],
        own: dict[str, float],
        costs: dict[str, dict[str, float]],
    ) -> None:
        """Correct what all modules of one class save by what a step really saves."""
        low, bench = self._default, self._bench
        kinds: dict[str, list[Unit]] = {}
        for unit in units:
            kinds.setdefault(unit.type, []).append(unit)
        asked: list[tuple[str | None, Candidate]] = [(None, low)]
        asked += [
            (kind, each)
            for kind in kinds
            for each in self._candidates
            if each != low and each.backward is None
        ]
        tree = tree_of(bench.model)
        runs = _step_runs(
            bench,
            [
                policy_of(
                    tree, {u.fqn: each if u.type == kind else low for u in units}, low
                )
                for kind, each in asked
            ],
        )
        before = statistics.median(runs[0])
        for (kind, each), times in zip(asked[1:], runs[1:], strict=True):
            members = [unit.fqn for unit in kinds[str(kind)]]
            more = statistics.median(times) - before
            doubt = 2 * (_deviation(times) + _deviation(runs[0]))
            alone = sum(costs[fqn][each.name] - costs[fqn][low.name] for fqn in members)
            wrong = min(max(alone, more - doubt), more + doubt) - alone
            whole = sum(own[fqn] for fqn in members)
            for fqn in members:
                share = own[fqn] / whole if whole else 1 / len(members)
                costs[fqn][each.name] += wrong * share

    def _seconds(
        self, units: Sequence[Unit], candidate: Candidate, low_operator: str = ""
    ) -> dict[str, float]:
        bench = self._bench
        bench.num_timings += _REPEATS + 1
        is_default = candidate == self._default
        found: dict[str, float] = {}
        for unit, region, formats in isolated(
            bench,
            units,
            candidate,
            self._default,
            self._handovers if is_default else Handovers(),
            inside="fp32",
            low_operator=low_operator,
        ):
            module = bench.model.get_submodule(unit.fqn)
            runs = [
                sum(
                    seconds_of(bench, region, module, call, formats[at])
                    for at, call in enumerate(self._calls[unit.fqn])
                )
                for _ in range(_REPEATS + 1)
            ]
            found[unit.fqn] = statistics.median(runs[1:])
        return found


def step_seconds(bench: Bench, policies: Sequence[Policy]) -> list[float]:
    """Measure a step of the first batch under each policy: medians, taken in turns."""
    return [statistics.median(runs) for runs in _step_runs(bench, policies)]


def _step_runs(bench: Bench, policies: Sequence[Policy]) -> list[list[float]]:
    runs: list[list[float]] = [[] for _ in policies]
    for _ in range(_REPEATS):
        for policy, found in zip(policies, runs, strict=True):
            with bench.under(policy) as region:
                bench.step(region, bench.batches[0])  # the first one warms up
                begin = time.perf_counter()
                bench.step(region, bench.batches[0])
                found.append(time.perf_counter() - begin)
            bench.num_steps -= 2
            bench.num_timings += 2
    return runs


def _deviation(runs: Sequence[float]) -> float:
    """How far a median may be off: the median distance from it."""
    middle = statistics.median(runs)
    return statistics.median(abs(run - middle) for run in runs)


def _counted(unit: Unit, candidate: Candidate, cost: CostModel) -> float:
    if callable(cost):
        return float(cost(unit, candidate.name))
    if cost == "flops":
        work = unit.num_flops + unit.num_elements
        return work * candidate.work
    elements = unit.num_elements + unit.num_weights
    return 4 * elements * candidate.work


def _own(unit: Unit, units: Sequence[Unit], whole: dict[str, float]) -> float:
    """The time of a unit without that of the outermost units in it."""
    prefix = f"{unit.fqn}." if unit.fqn else ""
    inside = [u.fqn for u in units if u.fqn != unit.fqn and u.fqn.startswith(prefix)]
    outermost = [
        fqn
        for fqn in inside
        if not any(fqn.startswith(f"{other}.") for other in inside if other != fqn)
    ]
    return whole[unit.fqn] - sum(whole[fqn] for fqn in outermost)
