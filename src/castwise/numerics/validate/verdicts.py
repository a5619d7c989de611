"""What a validation says: results, modules and operators, each beside its limit.

Records of plain values: they compare, print as one line and go to JSON.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from castwise.errors import BudgetError
from castwise.numerics.call_site import is_below
from castwise.numerics.error import Measures, NoiseRule
from castwise.numerics.validate.module_runs import ModuleMeasures
from castwise.numerics.validate.operators_on_trial import OperatorError

_MOST_NAMED = 4

ModuleState = Literal["holds", "own", "inherited"]
"""`own`: an operator of the module is at fault; `inherited`: what it was fed is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """One result of the candidate beside its noise floor."""

    name: str
    """`output`, `weight gradients`, `input gradients`."""

    measures: Measures
    """The worst over batches and seeds, measure by measure."""

    floor: Measures
    """The same of the baseline."""

    rule: NoiseRule
    """What is allowed."""

    @property
    def limit(self) -> float:
        """The largest relative error that is allowed."""
        return self.rule.limit(self.floor.relative)

    @property
    def holds(self) -> bool:
        """Whether the error is allowed, in the norm and for every element."""
        return self.rule.holds(
            self.measures.relative, self.floor.relative
        ) and self.rule.holds(self.measures.maximum, self.floor.maximum)

    @property
    def is_exact(self) -> bool:
        """Whether it agrees with the reference in every bit."""
        return self.measures.relative == 0 and self.measures.ulp == 0

    def __str__(self) -> str:
        m = self.measures
        return (
            f"{self.name} {m.relative:.1e} of {self.limit:.1e} (floor "
            f"{self.floor.relative:.1e}, cosine {m.cosine:.6f}, not finite "
            f"{m.nonfinite:.1%}, zero {m.zero:.1%} where {m.reference_zero:.1%} is "
            "right)"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleVerdict:
    """How far one module is off, and whose fault that is."""

    module: str
    """fqn; empty for the model itself."""

    kind: str
    """Name of its class."""

    compute: str
    """The format that the policy computes it in."""

    measures: ModuleMeasures
    """The worst over batches, seeds and calls."""

    floor: ModuleMeasures
    """The same of the baseline."""

    state: ModuleState
    """Whether it holds."""

    blamed: str | None = None
    """Its operator that is farthest off when tried alone, where one is at fault."""

    def errors(self) -> dict[str, tuple[float, float]]:
        """Name -> error and floor, of what could be measured."""
        return _errors_of(self.measures, self.floor)

    def excess(self, rule: NoiseRule) -> float:
        """The largest error over its limit; above 1 it does not hold."""
        return excess_of(self.measures, self.floor, rule)

    def __str__(self) -> str:
        listed = ", ".join(
            f"{name} {error:.1e} (floor {floor:.1e})"
            for name, (error, floor) in self.errors().items()
        )
        why = f"; its own {self.blamed}" if self.blamed else ""
        return (
            f"{self.module or '(model)'} in {self.compute}: {self.state}: {listed}{why}"
        )


def excess_of(
    measures: ModuleMeasures, floor: ModuleMeasures, rule: NoiseRule
) -> float:
    """The largest error of a module over its limit; above 1 it does not hold."""
    errors = _errors_of(measures, floor).values()
    return max((_over(error, rule.limit(own)) for error, own in errors), default=0.0)


def _errors_of(
    measures: ModuleMeasures, floor: ModuleMeasures
) -> dict[str, tuple[float, float]]:
    found = {}
    for name in ("output", "output_gradient"):
        pair = getattr(measures, name), getattr(floor, name)
        if None not in pair:
            found[name] = pair[0].relative, pair[1].relative
    if measures.weight_gradient is not None:
        found["weight_gradient"] = (
            measures.weight_gradient,
            floor.weight_gradient or 0.0,
        )
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """What a candidate's errors are, what they may be, and whether they hold."""

    candidate: str
    """Name of the policy or function."""

    reference: str
    """What it was compared with."""

    device: str
    """Where it ran."""

    rule: NoiseRule
    """What is allowed."""

    because: str
    """Where the tolerance comes from."""

    num_batches: int
    """How many batches."""

    seeds: tuple[int, ...]
    """The seeds of the random draws."""

    results: tuple[Judged, ...]
    """Output and gradients of the whole."""

    loss_drift: float | None
    """Largest relative drift of the loss; none for a function."""

    loss_floor: float
    """The same of the baseline."""

    scale: float
    """The loss scale that the gradients were made with."""

    modules: tuple[ModuleVerdict, ...]
    """Every module, from the root down."""

    operators: tuple[OperatorError, ...]
    """Every operator, tried alone."""

    lifted: tuple[str, ...]
    """Formats that the code names by hand and that the reference widened."""

    compared: bool
    """Whether there was anything that could have differed."""

    untried: tuple[str, ...] = ()
    """Operators without an error of their own: they do not run alone in fp64."""

    @property
    def holds(self) -> bool:
        """Whether everything was compared, and is within what is allowed."""
        return not self.faults()

    def faults(self) -> tuple[str, ...]:
        """What does not hold, one sentence each."""
        if not self.compared:
            return (
                (
                    "nothing was compared: candidate and reference agree in every bit, "
                    "so they compute the same in the same format; give a reference "
                    "that is not the candidate, or a policy that lowers something"
                ),
            )
        found = [str(each) for each in self.results if not each.holds]
        drift = self.loss_drift
        if drift is not None and not self.rule.holds(drift, self.loss_floor):
            found.append(
                f"loss drift {drift:.1e} of {self.rule.limit(self.loss_floor):.1e}"
            )
        return (*found, *self._module_faults())

    def _module_faults(self) -> list[str]:
        """Innermost modules that are at fault; those that inherit as one sentence."""
        own = [each for each in self.modules if each.state == "own"]
        found = [
            str(each)
            for each in own
            if not any(is_below(o.module, each.module) for o in own if o is not each)
        ]
        heirs = [each for each in self.modules if each.state == "inherited"]
        if found and len(heirs) > _MOST_NAMED:
            named = ", ".join(each.module for each in heirs[:_MOST_NAMED])
            return [*found, f"{len(heirs)} modules inherit their errors: {named}, ..."]
        return [*found, *map(str, heirs)]

    def blamed(self) -> tuple[OperatorError, ...]:
        """The operators that are at fault when tried alone, the worst first."""
        bad = (each for each in self.operators if not each.holds(self.rule))
        return tuple(sorted(bad, key=lambda each: -each.error))

    def check(self) -> Validation:
        """Return the validation itself if it holds.

        Raises:
            BudgetError: It does not; everything that is too far off is named.
        """
        if not self.holds:
            lines = (*self.faults(), *(f"operator {each}" for each in self.blamed()))
            raise BudgetError("\n  ".join((self.summary(), *lines)))
        return self

    def summary(self) -> str:
        """One line for logs and reports."""
        if not self.compared:
            return f"validation of {self.candidate} broken: nothing was compared"
        verdict = "holds" if self.holds else "broken"
        parts = [
            f"{e.name} {e.measures.relative:.1e} of {e.limit:.1e}" for e in self.results
        ]
        if self.loss_drift is not None:
            parts.append(f"loss drift {self.loss_drift:.1e}")
        if self.modules:
            num_bad = sum(each.state != "holds" for each in self.modules)
            parts.append(f"{num_bad} of {len(self.modules)} modules off")
        if self.untried:
            parts.append(f"not tried alone: {', '.join(self.untried)}")
        runs = f"{self.num_batches} batches, {len(self.seeds)} seeds"
        return (
            f"validation of {self.candidate} {verdict}: {', '.join(parts)}; "
            f"{self.rule} ({self.because}), {runs}"
        )

    def record(self) -> dict[str, Any]:
        """Plain values for JSON, with verdict and faults."""
        return {
            **asdict(self),
            "holds": self.holds,
            "faults": list(self.faults()),
            "summary": self.summary(),
        }


def _over(error: float, limit: float) -> float:
    if error == 0:
        return 0.0
    return error / limit if limit > 0 and not math.isnan(error) else math.inf
