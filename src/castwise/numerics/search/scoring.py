"""Scoring: one reference step, replays, and probes, put together into scores.

What it costs, in forward and backward runs of the model, whatever the number of
modules: one reference step, one step with all modules low, a replay in each candidate,
one or two in the reference, and K probes. Candidates of 32 bits are replayed only where
the budget is so small that their error matters; else the error of the whole model in
fp32 stands for all of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from castwise.islands.border import LOW
from castwise.numerics.search.assignment import tree_of
from castwise.numerics.search.bench import Bench
from castwise.numerics.search.candidates import Candidate
from castwise.numerics.search.cost import CostModel, Costs
from castwise.numerics.search.handovers import Handovers, observe_handovers
from castwise.numerics.search.isolation import (
    Rounding,
    loss_scale_for,
    play_all,
    rounding_between,
)
from castwise.numerics.search.probes import (
    Key,
    Prober,
    Stacks,
    directions,
    find_unstable,
    unit_of,
    weight_products,
)
from castwise.numerics.search.record_file import Record
from castwise.numerics.search.reference_step import Captured, capture
from castwise.numerics.search.scores import Score, Scores
from castwise.numerics.search.structure import flat, floating_in
from castwise.numerics.search.unit_play import Played
from castwise.numerics.search.units import (
    Grouping,
    Unit,
    find_units,
    group_units,
    innermost,
    never_called,
    operator_unit,
)
from castwise.policy.rules import Policy

_HOLDS_OTHERS = "holds other modules, which its own backward would run again"

_SILENT = Score(gradient=(), output=(), loss=0.0, fisher=0.0)
"""What an operator does beside what it does to the modules that call it."""

Report = Callable[[str, int, int], None]
"""Is told of progress: what is being done, how much is done, of how much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringSettings:
    """How scores are taken."""

    num_probes: int
    """K; the relative deviation of an estimate is sqrt(2 / K) before shrinkage."""

    seed: int
    """Of the directions."""

    grouping: Grouping
    """What moves together."""

    cost: CostModel
    """What a unit costs in a candidate."""

    with_outputs: bool
    """Whether the error of the output is wanted."""

    operators: bool = False
    """Whether operators that the table holds in fp32 may run low."""


class Scoring:
    """Takes the scores of one model.

    Args:
        bench: Where the model stands.
        candidates: What is to be scored.
        default: What the policy's default will be.
        settings: How.
        record: Keeps what was learnt.
        report: Is told of progress.
    """

    def __init__(
        self,
        bench: Bench,
        candidates: tuple[Candidate, ...],
        default: Candidate,
        settings: ScoringSettings,
        record: Record,
        report: Report,
    ) -> None:
        self._bench, self._record, self._report = bench, record, report
        self._candidates, self._default = candidates, default
        self._settings = settings

    def run(self, scored: Sequence[Candidate], rest: dict[str, float]) -> Scores:
        """Score candidates.

        Args:
            scored: Those that are replayed.
            rest: The noise floor: errors of the model all in fp32.
        """
        bench, settings = self._bench, self._settings
        before = bench.num_steps
        self._report("reference step", 0, 1)
        captured = capture(bench, 0)
        bench.loss_scale = loss_scale_for(captured.calls)
        units = find_units(bench.model, captured)
        handovers = self._handovers()
        signs = [
            directions(bench, probe, settings.seed)
            for probe in range(settings.num_probes)
        ]
        values, roundings, along_weights = self._replays(
            captured, units, scored, signs, handovers
        )
        by_operator = {
            op: callers
            for op, callers in self._callers(captured, units).items()
            if any((unit.fqn, op) in values for unit in callers)
        }
        turned = self._probes(captured, roundings, along_weights, values)
        decided = find_unstable(captured.decisions, turned)
        unstable = {
            unit: op
            for module, op in decided.items()
            if (unit := unit_of(module, units)) is not None
        }
        steps = bench.num_steps - before
        timer = Costs(bench, captured.calls, self._candidates, self._default, handovers)
        costs = timer.of_units(units, settings.cost)
        groups = group_units(units, captured, settings.grouping)
        finished = _finished(
            {key: score for key, score in values.items() if key[1] not in by_operator},
            units,
            unstable,
            self._candidates,
        )
        operators: dict[str, dict[str, Score]] = {}
        for op, callers in by_operator.items():
            own = operator_unit(op, callers, captured)
            called = {caller.fqn: values[caller.fqn, op] for caller in callers}
            groups = (*groups, (len(units),))
            units = (*units, own)
            finished[own.fqn] = {
                each.name: _SILENT if each != self._default else _refusal(called)
                for each in scored
            }
            operators[own.fqn] = called
            costs[own.fqn] = timer.of_operator(own, callers, settings.cost)
        return Scores(
            fingerprint=self._record.fingerprint,
            tree=tree_of(bench.model),
            units=units,
            groups=groups,
            candidates=tuple(each.name for each in self._candidates),
            default=self._default.name,
            scored=tuple(each.name for each in scored),
            rest=rest,
            scales=_scales(captured),
            loss_scale=bench.loss_scale,
            values=finished,
            costs=costs,
            unstable=unstable,
            never_called=never_called(bench.model, captured),
            num_steps=steps,
            has_outputs=settings.with_outputs,
            operators=operators,
        )

    def _handovers(self) -> Handovers:
        """See in which formats tensors go round when all is low, if anything is."""
        if self._default.compute not in LOW:
            return Handovers()
        policy = Policy(name="all low", default=self._default.precision)
        return observe_handovers(self._bench, policy, 0)

    def _replays(
        self,
        captured: Captured,
        units: tuple[Unit, ...],
        scored: Sequence[Candidate],
        signs: list[list[torch.Tensor]],
        handovers: Handovers,
    ) -> tuple[dict[Key, Score], dict[Key, Rounding], dict[Key, list[float]]]:
        """Replay all units; say what rounding changes, and what of it meets weights."""
        bench = self._bench
        places = {id(weight): at for at, weight in enumerate(bench.weights)}
        values: dict[Key, Score] = {}
        roundings: dict[Key, Rounding] = {}
        along: dict[Key, list[float]] = {}
        as_the_table: dict[str, list[Played] | str] = {}
        for unit, name, rounding in itertools.chain(
            self._of_modules(captured, units, scored, handovers, as_the_table),
            self._of_operators(captured, units, handovers, as_the_table),
        ):
            key = unit.fqn, name
            values[key] = _first_look(captured, unit, rounding)
            if not isinstance(rounding, str):
                module = bench.model.get_submodule(unit.fqn)
                along[key] = weight_products(module, rounding, signs, places)
                roundings[key] = rounding
        return values, roundings, along

    def _of_modules(
        self,
        captured: Captured,
        units: tuple[Unit, ...],
        scored: Sequence[Candidate],
        handovers: Handovers,
        as_the_table: dict[str, list[Played] | str],
    ) -> Iterator[tuple[Unit, str, Rounding | str]]:
        """Replay every module in every candidate; keep what operators start from."""
        bench, calls, low = self._bench, captured.calls, self._default
        callers = {u for each in self._callers(captured, units).values() for u in each}
        wide: dict[bool, dict[str, list[Played] | str]] = {}
        for rank, candidate in enumerate(scored):
            self._report("replays", rank, len(scored))
            is_default = candidate == low
            seen = handovers if is_default else Handovers()
            if is_default not in wide:
                plays = play_all(bench, units, calls, None, low, seen)
                wide[is_default] = {unit.fqn: played for unit, played in plays}
            alone = units if candidate.backward is None else innermost(units)
            for unit in units:
                if unit not in alone:
                    yield unit, candidate.name, _HOLDS_OTHERS
            for unit, played in play_all(bench, alone, calls, candidate, low, seen):
                before = wide[is_default][unit.fqn]
                name = candidate.name
                yield unit, name, rounding_between(played, before, name)
                if is_default and unit in callers:
                    as_the_table[unit.fqn] = played

    def _of_operators(
        self,
        captured: Captured,
        units: tuple[Unit, ...],
        handovers: Handovers,
        as_the_table: dict[str, list[Played] | str],
    ) -> Iterator[tuple[Unit, str, Rounding | str]]:
        """Replay the callers of each operator, with it low and all else as before."""
        low = self._default
        for op, callers in self._callers(captured, units).items():
            plays = play_all(
                self._bench, callers, captured.calls, low, low, handovers, op
            )
            found = [
                (unit, rounding_between(played, as_the_table[unit.fqn], f"{op} low"))
                for unit, played in plays
            ]
            # an operator inside of another one is out of reach of the table
            if any(isinstance(each, str) or each.is_some() for _, each in found):
                for unit, rounding in found:
                    yield unit, op, rounding

    def _callers(
        self, captured: Captured, units: tuple[Unit, ...]
    ) -> dict[str, tuple[Unit, ...]]:
        """Operators that may be put low -> the units that call them, if it is asked."""
        if not self._settings.operators or self._default.compute not in LOW:
            return {}
        found: dict[str, tuple[Unit, ...]] = {}
        for unit in units:
            for op in captured.work[unit.fqn].in_fp32:
                found[op] = (*found.get(op, ()), unit)
        return dict(sorted(found.items()))

    def _probes(
        self,
        captured: Captured,
        roundings: dict[Key, Rounding],
        along: dict[Key, list[float]],
        values: dict[Key, Score],
    ) -> list[list[bool]]:
        """Run the probes that the record lacks; put their products into `values`."""
        settings, record = self._settings, self._record
        prober = Prober(
            self._bench,
            captured,
            Stacks(roundings),
            seed=settings.seed,
            with_outputs=settings.with_outputs,
        )
        names = sorted({name for _, name in roundings})
        for probe in range(settings.num_probes):
            self._report("probes", probe, settings.num_probes)
            entry = f"{probe} {names} {settings.with_outputs}"
            if entry not in record.probes:
                secants, outward, turned = prober.run(probe)
                record.probes[entry] = {
                    "gradient": [[*key, value] for key, value in secants.items()],
                    "output": [[*key, value] for key, value in outward.items()],
                    "turned": turned,
                }
                record.save()
        found = [
            record.probes[f"{probe} {names} {settings.with_outputs}"]
            for probe in range(settings.num_probes)
        ]
        products = {
            kind: [{(u, name): v for u, name, v in each[kind]} for each in found]
            for kind in ("gradient", "output")
        }
        for key in roundings:
            pairs = zip(products["gradient"], along[key], strict=True)
            values[key] = replace(
                values[key],
                gradient=tuple(each[key] + own for each, own in pairs if key in each),
                output=tuple(each.get(key, 0.0) for each in products["output"]),
            )
        return [each["turned"] for each in found]


def _first_look(captured: Captured, unit: Unit, rounding: Rounding | str) -> Score:
    """What the reference step alone tells of a rounding."""
    if isinstance(rounding, str):
        return Score(gradient=(), output=(), loss=0.0, fisher=0.0, forced=rounding)
    loss = fisher = 0.0
    for call, deltas in zip(captured.calls[unit.fqn], rounding.deltas, strict=True):
        for gradient, delta in zip(call.gradients, deltas, strict=True):
            if gradient is not None:
                products = flat(gradient) * delta
                loss += float(products.sum())
                fisher += float(products.square().sum())
    return Score(gradient=(), output=(), loss=loss, fisher=fisher)


def _refusal(called: Mapping[str, Score]) -> Score:
    """Why an operator cannot be put low, if it cannot; its errors are its callers'."""
    forced = next((score.forced for score in called.values() if score.forced), "")
    return replace(_SILENT, forced=forced)


def _finished(
    values: dict[Key, Score],
    units: Sequence[Unit],
    unstable: dict[str, str],
    candidates: Sequence[Candidate],
) -> dict[str, dict[str, Score]]:
    """Sort scores by unit, and refuse low formats where no score can be trusted."""
    found: dict[str, dict[str, Score]] = {unit.fqn: {} for unit in units}
    bits = {each.name: each.least_bits for each in candidates}
    fp8 = {each.name for each in candidates if each.is_fp8}
    blind = {unit.fqn for unit in units if unit.is_blind}
    without = {unit.fqn for unit in units if not unit.num_flops}
    for (fqn, name), score in values.items():
        forced = score.forced
        if name in fp8 and fqn in without:
            forced = "has no product, and nothing else runs in fp8"
        elif bits[name] < 32 and max(bits.values()) >= 32:
            if fqn in unstable:
                forced = f"its {unstable[fqn]} turned over in a probe"
            elif fqn in blind:
                forced = "no gradient reaches it, so its effect cannot be measured"
        found[fqn][name] = replace(score, forced=score.forced or forced)
    return found


def _scales(captured: Captured) -> dict[str, float]:
    """The norms that errors are relative to."""
    gradients = [g for g in captured.result.gradients if g is not None]
    outputs = floating_in(captured.result.output)
    return {
        "gradient": math.hypot(*(float(flat(g).norm()) for g in gradients)),
        "output": math.hypot(*(float(flat(each).norm()) for each in outputs)),
        "loss": abs(captured.result.loss),
    }
