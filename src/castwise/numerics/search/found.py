"""What a search found: a policy, what it costs, what it was measured to do, and why.

`Found` holds plain values only. The Pareto curve and the policy for another budget are
solved from the scores again, without the model; what was measured stands beside what
was predicted, and is never mixed with it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from castwise.errors import BudgetError
from castwise.numerics.search.budget import Budget
from castwise.numerics.search.problem import Choice, Problem
from castwise.numerics.search.scores import Scores
from castwise.policy.rules import Policy

_NUM_POINTS = 40  # of the Pareto curve


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One policy, run for real."""

    choice: Choice
    """For each group the place of its candidate."""

    predicted: float
    """Predicted use of the budget; 1 is all of it."""

    usage: float
    """Measured use of the budget, the worst of the batches."""

    errors: tuple[dict[str, float], ...]
    """Kind -> error for each batch that was run; the first bad one ends a trial."""

    cost: float
    """By the cost model."""

    holds: bool
    """Whether it keeps within the margin of the budget on every batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParetoPoint:
    """The cheapest choice for one budget, by the scores."""

    usage: float
    """Predicted use of the budget, corrected by what trials measured."""

    cost: float
    """By the cost model."""

    num_high: int
    """Units that run in more than 16 bits."""

    choice: Choice
    """What it is; `Found.policy_at` writes it as a policy."""

    measured: float | None
    """Measured use of the budget, the worst of the batches; none where it was not run,
    infinite where it was not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitFinding:
    """What was found about one unit."""

    fqn: str
    """Its name; the empty text for the model itself."""

    type: str
    """Its class."""

    chosen: str
    """Its candidate in the policy."""

    costs: dict[str, float]
    """Candidate -> cost."""

    errors: dict[str, float]
    """Candidate -> share of the budget that its rounding alone uses up."""

    because: str
    """Why it is where it is."""

    is_operator: bool = False
    """Whether it is an operator, held in fp32 by the table unless it is put low."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a search found, with its evidence."""

    policy: Policy
    """The cheapest policy that was measured to keep within the budget."""

    budget: Budget
    """What was asked for."""

    margin: float
    """The share of the budget that had to suffice on the batches that were given."""

    cost: float
    """Of the policy, by the cost model."""

    cost_model: str
    """How costs were told."""

    cost_lowest: float
    """With every unit in its cheapest candidate."""

    cost_highest: float
    """With every unit in the candidate with the most digits."""

    trials: tuple[Trial, ...]
    """Every policy that was run, in order."""

    best: Trial
    """The one that was chosen."""

    floor: dict[str, float]
    """The noise floor: errors of the whole model in fp32, the worst of the batches."""

    pareto: tuple[ParetoPoint, ...]
    """Cost against error, from the scores."""

    units: tuple[UnitFinding, ...]
    """Every unit, in the order of the model."""

    scores: Scores
    """What other budgets can be solved from."""

    seed: int
    """Of probes and of what the model draws."""

    num_batches: int
    """How many batches the policy was tried on."""

    scoring_steps: int
    """Forward and backward runs for scores in this call; 0 where a record had them."""

    trial_steps: int
    """Forward and backward runs for references, noise floor and trials."""

    seconds: float
    """Wall clock."""

    @property
    def unstable(self) -> dict[str, str]:
        """Units with a decision that turned over under rounding noise, and which."""
        return dict(self.scores.unstable)

    def policy_at(self, point: ParetoPoint) -> Policy:
        """Write a point of the Pareto curve as a policy."""
        return Problem(self.scores, self.budget).policy(point.choice)

    def policy_for(self, budget: Budget) -> Policy:
        """Solve for another budget from the scores; nothing runs and is validated.

        Raises:
            BudgetError: By the scores nothing keeps within it, or it limits what was
                not scored.
        """
        asked = set(budget.limits) - set(self.scores.rest)
        needs_output = {"output", "measure"} & set(budget.limits)
        if asked or (needs_output and not self.scores.has_outputs):
            raise BudgetError(
                f"the scores were taken for {self.budget}, and say nothing about "
                f"{', '.join(sorted(asked or needs_output))}; search again"
            )
        problem = Problem(self.scores, budget)
        choice = problem.solve(self.margin)
        if choice is None:
            least = problem.predicted(problem.safest())
            raise BudgetError(
                f"nothing keeps within {budget}: with the most digits everywhere "
                f"{least:.3g} of it would be used; allow a wider format"
            )
        return problem.policy(choice)

    def record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {
            "policy": self.policy.to_yaml(),
            "budget": {**self.budget.limits},
            "margin": self.margin,
            "cost": self.cost,
            "cost_model": self.cost_model,
            "cost_lowest": self.cost_lowest,
            "cost_highest": self.cost_highest,
            "floor": self.floor,
            "trials": [asdict(each) for each in self.trials],
            "best": asdict(self.best),
            "pareto": [asdict(each) for each in self.pareto],
            "units": [asdict(each) for each in self.units],
            "unstable": self.unstable,
            "never_called": list(self.scores.never_called),
            "seed": self.seed,
            "num_batches": self.num_batches,
            "scoring_steps": self.scoring_steps,
            "trial_steps": self.trial_steps,
            "seconds": self.seconds,
        }
        return dict(_plain(plain))

    def summary(self) -> str:
        """One line for logs and reports."""
        modules = [each for each in self.units if not each.is_operator]
        high = sum(each.chosen != self.scores.default for each in modules)
        saved = 1 - self.cost / self.cost_highest if self.cost_highest else 0.0
        worst = worst_errors(self.best.errors)
        errors = ", ".join(
            f"{kind} error {worst[kind]:.2e} of {limit:g}"
            for kind, limit in self.budget.limits.items()
        )
        return (
            f"{errors} on {self.num_batches} batches; {high} of {len(modules)} "
            f"units not in {self.scores.default}, {saved:.1%} of {self.cost_model} "
            f"saved; {self.scoring_steps} steps for scores, {self.trial_steps} for "
            f"{len(self.trials)} trials"
        )


def worst_errors(errors: Sequence[dict[str, float]]) -> dict[str, float]:
    """The worst of several batches, kind by kind."""
    return {kind: max(each[kind] for each in errors) for kind in errors[0]}


def pareto_of(problem: Problem, trials: Sequence[Trial]) -> tuple[ParetoPoint, ...]:
    """Solve for many budgets, from the smallest error that can be had upwards."""
    measured = {trial.choice: trial.usage for trial in trials}
    safest, cheapest = problem.safest(), problem.cheapest()
    low, high = problem.predicted(safest), problem.predicted(cheapest)
    ratios = [
        t.usage / t.predicted for t in trials if 0 < t.usage < math.inf and t.predicted
    ]
    factor = statistics.median(ratios) if ratios else 1.0
    low = max(low, high * 1e-9, 1e-30)
    points = []
    for at in range(_NUM_POINTS + 1):
        usage = low * (high / low) ** (at / _NUM_POINTS) * (1 + 1e-9)
        choice = problem.solve(usage)
        if choice is not None:
            points.append(
                ParetoPoint(
                    usage=factor * problem.predicted(choice),
                    cost=problem.cost(choice),
                    num_high=_num_high(problem, choice),
                    choice=choice,
                    measured=measured.get(choice),
                )
            )
    return tuple(dict.fromkeys(points))


def findings_of(problem: Problem, choice: Choice) -> tuple[UnitFinding, ...]:
    """Say about every unit what was chosen, and why."""
    scores = problem.scores
    chosen = problem.spread(choice)
    used = problem.unit_usage()
    return tuple(
        UnitFinding(
            fqn=unit.fqn,
            type=unit.type,
            chosen=chosen[unit.fqn].name,
            costs=dict(scores.costs[unit.fqn]),
            errors=used[unit.fqn],
            because=problem.forced(unit.fqn),
            is_operator=bool(unit.op),
        )
        for unit in scores.units
    )


def _num_high(problem: Problem, choice: Choice) -> int:
    return sum(
        len(group)
        for group, one in zip(problem.scores.groups, choice, strict=True)
        if problem.candidates[one].bits > 16 and not problem.scores.units[group[0]].op
    )


def _plain(value: Any) -> Any:
    """Make numbers that JSON cannot say into texts."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
