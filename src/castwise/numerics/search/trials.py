"""Trials: policies run for real, until the cheapest one that holds is known.

Predictions rank well and are off by a factor, the same one for similar choices. So one
number is searched, the predicted error to solve for: what a trial measured says where
to look next, and what held and what did not is a bracket around it. Trials that are
left over go where the largest saving is expected by what all trials taught.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property

from castwise.errors import BudgetError
from castwise.numerics.over_ranks import all_say, first_says
from castwise.numerics.search.belief import Belief
from castwise.numerics.search.bench import Bench
from castwise.numerics.search.budget import Budget
from castwise.numerics.search.cost import step_seconds
from castwise.numerics.search.found import (
    ParetoPoint,
    Trial,
    pareto_of,
    worst_errors,
)
from castwise.numerics.search.problem import Choice, Problem
from castwise.numerics.search.record_file import Record, digest_of
from castwise.numerics.search.scoring import Report
from castwise.policy.rules import Policy

_WORTH = 1e-3  # of the cost: what a trial must be expected to save
_WIDEST_STEP = 16.0  # by which one trial may change what is predicted
_CAUTION = 0.96  # by how much more a prediction is lowered after a failure
_CLOSE = 1.02  # a bracket that is not worth narrowing


class Trials:
    """Runs policies on every batch and remembers what they did.

    Args:
        bench: Where the model stands.
        budget: What must be kept.
        margin: The share of it that must suffice.
        most: How many policies are run at most.
        record: Keeps what was measured.
        report: Is told of progress.
        together: Whether all processes try each policy, on batches of their own.
    """

    def __init__(
        self,
        bench: Bench,
        budget: Budget,
        *,
        margin: float,
        most: int,
        record: Record,
        report: Report,
        together: bool = False,
    ) -> None:
        self._bench, self._budget = bench, budget
        self._margin, self._most = margin, most
        self._record, self._report = record, report
        self._together = together
        self.done: list[Trial] = []
        """Every policy that was run, in order."""

    @cached_property
    def num_batches(self) -> tuple[int, ...]:
        """How many batches each rank tries a policy on."""
        return tuple(all_say(lambda: len(self._bench.batches), together=self._together))

    def errors(
        self, policy: Policy, *, to_the_end: bool = False
    ) -> tuple[dict[str, float], ...]:
        """Run a policy batch by batch, until one breaks the budget; see the record."""
        found: list[dict[str, float]] = []
        measure = self._budget.measure
        digest = digest_of(
            f"{_said_by(policy)} {self._bench.loss_scale} {measure and measure.name}"
        )
        for at in range(max(self.num_batches)):

            def measured(at: int = at) -> dict[str, float] | None:
                return self._measured(policy, f"{digest} {at}", at)

            told = all_say(measured, together=self._together)
            known = [each for each in told if each is not None]
            found += known
            broken = max(map(self._budget.usage, known)) > self._margin
            if broken and not to_the_end:
                break
        return tuple(found)

    def _measured(self, policy: Policy, key: str, at: int) -> dict[str, float] | None:
        """Run a policy on one batch, or ask the record; None after the last one."""
        if at >= len(self._bench.batches):
            return None
        if key not in self._record.trials:
            self._record.trials[key] = self._bench.errors(
                policy, self._budget, scale=self._bench.loss_scale, at=at
            )
            self._record.save()
        return self._record.trials[key]

    def _try(self, problem: Problem, choice: Choice) -> Trial:
        """Run a choice for real."""
        for trial in self.done:
            if trial.choice == choice:
                return trial
        self._report("trials", len(self.done), self._most)
        errors = self.errors(problem.policy(choice, name="candidate"))
        usage = max(map(self._budget.usage, errors))
        trial = Trial(
            choice=choice,
            predicted=problem.predicted(choice),
            usage=usage,
            errors=errors,
            cost=problem.cost(choice),
            holds=usage <= self._margin,
        )
        self.done.append(trial)
        return trial

    def narrowed(self, problem: Problem) -> Trial:
        """Search the budget to predict with, by trials that bracket it."""
        margin = self._margin
        cheapest = problem.cheapest()
        low, high = 0.0, math.inf  # predictions that held, and that did not
        best: Trial | None = None
        aim, num_failures = margin, 0
        for _ in range(4 * self._most):
            # until something holds, all trials but one are for finding it
            most = self._most - 1 if best is None else self._most * 7 // 10
            if len(self.done) >= max(1, most):
                break
            choice = problem.solve(aim)
            if choice is None:
                choice = problem.safest()
                aim = problem.predicted(choice)
            trial = self._try(problem, choice)
            if trial.holds:
                best = trial if best is None or trial.cost < best.cost else best
                low, num_failures = max(low, aim), 0
                if choice == cheapest:
                    break
            else:
                high, num_failures = min(high, aim), num_failures + 1
                if choice == problem.safest():
                    break
            wanted = aim * _correction(margin, trial.usage)
            if num_failures:  # a miss by a hair must not lead to another
                wanted *= _CAUTION ** (2 ** (num_failures - 1))
            aim = _within(wanted, low, high)
            if high < math.inf and low > 0 and high / low < _CLOSE:
                break
        if best is None:
            best = self._safest(problem)
        return best

    def fastest(self, problem: Problem, best: Trial) -> Trial:
        """Compare whole steps: the best against everything high, and everything low.

        Times of single modules leave out what they share, so they may not add up.
        """
        wanted = dict.fromkeys((best.choice, problem.safest(), problem.cheapest()))
        holding = [trial for c in wanted if (trial := self._try(problem, c)).holds]
        policies = [problem.policy(trial.choice) for trial in holding]
        seconds = first_says(
            lambda: step_seconds(self._bench, policies), together=self._together
        )
        return holding[seconds.index(min(seconds))]

    def along(self, problem: Problem, num_points: int) -> tuple[ParetoPoint, ...]:
        """The Pareto curve, with what was measured of some of its points.

        Args:
            problem: Loads and costs.
            num_points: How many are run for real, evenly along those that were not.
        """
        points = pareto_of(problem, self.done)
        asked = [at for at, point in enumerate(points) if point.measured is None]
        step = max(1.0, (len(asked) - 1) / max(1, num_points - 1))
        chosen = dict.fromkeys(int(step * i + 0.5) for i in range(num_points))
        found = list(points)
        for rank, at in enumerate(asked[i] for i in chosen if i < len(asked)):
            self._report("points", rank, num_points)
            policy = problem.policy(points[at].choice, name="candidate")
            errors = self.errors(policy, to_the_end=True)
            worst = max(map(self._budget.usage, errors))
            found[at] = replace(points[at], measured=worst)
        return tuple(found)

    def _safest(self, problem: Problem) -> Trial:
        trial = self._try(problem, problem.safest())
        if not trial.holds:
            raise BudgetError(self._infeasible(problem, trial))
        return trial

    def _infeasible(self, problem: Problem, trial: Trial) -> str:
        worst = worst_errors(trial.errors)
        limits = self._budget.limits
        kind = max(limits, key=lambda each: worst[each] / limits[each])
        used = problem.unit_usage()
        names = problem.scores.candidates
        chosen = {
            problem.scores.units[at].fqn: names[one]
            for group, one in zip(problem.scores.groups, trial.choice, strict=True)
            for at in group
        }
        ranked = sorted(
            chosen,
            key=lambda fqn: (-used[fqn][chosen[fqn]], -min(used[fqn].values())),
        )
        if not any(used[fqn][chosen[fqn]] for fqn in ranked):
            ranked = sorted(chosen, key=lambda fqn: -max(used[fqn].values()))
        most = ", ".join(fqn or "(the model itself)" for fqn in ranked[:3])
        return (
            f"nothing keeps within {self._budget} times the margin of "
            f"{self._margin:g}: with the most digits everywhere the {kind} "
            f"error is {worst[kind]:.3g}, {worst[kind] / limits[kind]:.3g} times the "
            f"budget, most of it from {most}; allow "
            f"{'a wider format' if 'fp64' not in names else 'more'}, or change these "
            "modules"
        )

    def polished(self, problem: Problem, best: Trial) -> Trial:
        """Spend the trials that are left where the most is expected to be saved."""
        while len(self.done) < self._most:
            belief = Belief(problem, self.done, self._margin)
            tried = {trial.choice for trial in self.done}
            prospect = belief.best_prospect(best, tried)
            if prospect is None or prospect.gain < _WORTH * best.cost:
                break
            trial = self._try(problem, prospect.choice)
            if trial.holds and trial.cost < best.cost:
                best = trial
        return best


def _said_by(policy: Policy) -> str:
    """What a policy says, without its reasons, which name the budget."""
    return f"{policy.default} {[(rule.keys, rule.value) for rule in policy.rules]}"


def _correction(margin: float, usage: float) -> float:
    """By what a trial says the prediction was off, at most 16 either way."""
    if not math.isfinite(usage):
        return 1 / _WIDEST_STEP
    if usage == 0:
        return _WIDEST_STEP
    return min(_WIDEST_STEP, max(1 / _WIDEST_STEP, margin / usage))


def _within(wanted: float, low: float, high: float) -> float:
    """The wanted value if it lies inside of the bracket, or else its middle."""
    if low < wanted < high:
        return wanted
    if high == math.inf:
        return max(wanted, 2 * low)
    return math.sqrt(low * high) if low > 0 else min(wanted, high / 2)
