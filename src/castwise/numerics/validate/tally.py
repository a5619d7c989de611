"""The tally of a validation: the worst of everything, over batches, seeds and ranks.

tally.add(right, got, baselines)          # one batch and seed
share = Share.of(tally, candidate, exact, num_batches)
share = whole_of(shares)                  # of all ranks that take part
share.tally.results()                     # errors beside their floors
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from castwise.islands import AppliedPolicy
from castwise.numerics.call_site import is_below
from castwise.numerics.error import Measures, NoiseRule, loss_drift, measure
from castwise.numerics.validate.module_runs import (
    ModuleMeasures,
    ModuleRun,
    measure_modules,
)
from castwise.numerics.validate.operators_on_trial import OperatorError, joined
from castwise.numerics.validate.three_runs import CandidateRun, WideRun
from castwise.numerics.validate.verdicts import Judged, ModuleVerdict, excess_of


class Tally:
    """The worst of everything, over batches and seeds."""

    def __init__(self, model: nn.Module, fmt: str, rule: NoiseRule) -> None:
        self._kinds = {fqn: type(m).__name__ for fqn, m in model.named_modules()}
        self._fmt, self._rule = fmt, rule
        self._off: set[str] = set()
        self.is_news = False
        """Whether the latest batch put a module off that none did before."""
        self._whole: dict[str, Measures] = {}
        self._floor: dict[str, Measures] = {}
        self._modules: dict[str, ModuleMeasures] = {}
        self._module_floors: dict[str, ModuleMeasures] = {}
        self.drift = self.drift_floor = 0.0

    def add(
        self, right: ModuleRun, got: ModuleRun, baselines: Sequence[ModuleRun]
    ) -> None:
        """Measure one batch and seed."""
        fqns = list(self._kinds)
        for name, result in _results_of(got, right, self._fmt).items():
            _keep_worst(self._whole, name, result)
        for fqn, found in measure_modules(got, right, fqns, self._fmt).items():
            _keep_worst(self._modules, fqn, found)
        self.drift = max(self.drift, loss_drift(got.outcome.loss, right.outcome.loss))
        for each in baselines:
            for name, result in _results_of(each, right, self._fmt).items():
                _keep_worst(self._floor, name, result)
            for fqn, found in measure_modules(each, right, fqns, self._fmt).items():
                _keep_worst(self._module_floors, fqn, found)
            drift = loss_drift(each.outcome.loss, right.outcome.loss)
            self.drift_floor = max(self.drift_floor, drift)
        off = {
            fqn
            for fqn, found in self._modules.items()
            if excess_of(found, self._module_floors[fqn], self._rule) > 1
        }
        self.is_news = not off <= self._off
        self._off |= off

    def join(self, other: Tally) -> None:
        """Take in what another process found."""
        for kept, found in (
            (self._whole, other._whole),
            (self._floor, other._floor),
            (self._modules, other._modules),
            (self._module_floors, other._module_floors),
        ):
            for name, measures in found.items():
                _keep_worst(kept, name, measures)
        self.drift = max(self.drift, other.drift)
        self.drift_floor = max(self.drift_floor, other.drift_floor)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added so far."""
        return not self._whole

    @property
    def compared(self) -> bool:
        """Whether anything differs at all.

        Gradients of inputs always differ from wide ones: they land in narrow leaves.
        """
        computed = {n: m for n, m in self._whole.items() if n != "input gradients"}
        counted = computed if len(computed) > 1 else self._whole
        return any(m.relative or m.nonfinite for m in counted.values())

    def results(self) -> tuple[Judged, ...]:
        """Output and gradients beside their floors."""
        return tuple(
            Judged(name=name, measures=found, floor=self._floor[name], rule=self._rule)
            for name, found in self._whole.items()
        )

    def verdicts(
        self,
        applied: AppliedPolicy,
        operators: Sequence[OperatorError],
    ) -> tuple[ModuleVerdict, ...]:
        """Each module, and whose fault it is where one is off."""
        guilty = [each for each in operators if not each.holds(self._rule)]
        return tuple(
            _verdict(
                fqn,
                self._kinds[fqn],
                applied,
                (found, self._module_floors[fqn]),
                self._rule,
                guilty,
            )
            for fqn, found in self._modules.items()
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one process adds to a validation, or all of them together."""

    tally: Tally
    """Errors and floors."""

    operators: tuple[OperatorError, ...]
    """Every operator, tried alone."""

    untried: tuple[str, ...]
    """Operators that could not be."""

    lifted: tuple[str, ...]
    """Formats that the code names by hand."""

    scale: float
    """The loss scale of the latest run."""

    num_batches: int
    """How many batches were seen."""

    @classmethod
    def of(
        cls, tally: Tally, candidate: CandidateRun, exact: WideRun, num_batches: int
    ) -> Share:
        """Take what one process found."""
        return cls(
            tally=tally,
            operators=candidate.operators,
            untried=tuple(candidate.untried),
            lifted=exact.lifted,
            scale=candidate.scale,
            num_batches=num_batches,
        )


def whole_of(shares: Sequence[Share]) -> Share:
    """The worst of all shares; of loss scales the lowest."""
    first, *others = shares
    for each in others:
        first.tally.join(each.tally)
    return replace(
        first,
        operators=joined(each for share in shares for each in share.operators),
        untried=tuple(dict.fromkeys(n for share in shares for n in share.untried)),
        lifted=tuple(dict.fromkeys(n for share in shares for n in share.lifted)),
        scale=min(share.scale for share in shares),
        num_batches=sum(share.num_batches for share in shares),
    )


def _verdict(
    fqn: str,
    kind: str,
    applied: AppliedPolicy,
    measures: tuple[ModuleMeasures, ModuleMeasures],
    rule: NoiseRule,
    guilty: Sequence[OperatorError],
) -> ModuleVerdict:
    found, floor = measures
    plain = ModuleVerdict(
        module=fqn,
        kind=kind,
        compute=applied.bound.precision_of(fqn, phase=applied.phase).compute or "",
        measures=found,
        floor=floor,
        state="holds",
    )
    if plain.excess(rule) <= 1:
        return plain
    own = [each for each in guilty if is_below(each.module, fqn)]
    worst = max(own, key=lambda each: each.error, default=None)
    return replace(
        plain,
        state="own" if own else "inherited",
        blamed=None if worst is None else str(worst),
    )


def _results_of(got: ModuleRun, right: ModuleRun, fmt: str) -> dict[str, Measures]:
    """Output and gradients of one run, measured as far as the reference has them."""
    pairs: dict[str, tuple[Any, Any]] = {
        "output": (got.outcome.output, right.outcome.output),
        "weight gradients": _common(got.outcome.gradients, right.outcome.gradients),
        "input gradients": (got.outcome.input_gradients, right.outcome.input_gradients),
    }
    return {name: measure(*pair, fmt) for name, pair in pairs.items() if pair[1]}


def _common(
    got: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients by name; one that the candidate lacks counts as zero."""
    names = sorted(right)
    missing = {n: torch.zeros_like(right[n]) for n in names if n not in got}
    return {n: got.get(n, missing.get(n, right[n])) for n in names}, {
        n: right[n] for n in names
    }


def _keep_worst(kept: dict[str, Any], name: str, found: Any) -> None:
    kept[name] = kept[name].worst(found) if name in kept else found
