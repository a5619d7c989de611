"""Trials on a made-up model, whose errors differ from predictions in known ways."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from castwise.numerics.search.budget import Budget
from castwise.numerics.search.candidates import parse_candidates
from castwise.numerics.search.problem import Choice, Problem
from castwise.numerics.search.record_file import Record
from castwise.numerics.search.trials import Trials

NUM = 60


class Made(Problem):
    """Groups of random cost and load; nothing is behind them."""

    def __init__(self) -> None:
        chance = random.Random(4)
        self.candidates = parse_candidates(["bf16", "fp32"])
        self.costs = [[size, 2.0 * size] for size in chance.choices([1, 4, 9], k=NUM)]
        self.loads = [[10 ** chance.uniform(-3, 0), 0.0] for _ in range(NUM)]
        self.constant = 0.0

    def safest(self) -> Choice:
        """All high."""
        return (1,) * NUM

    def policy(self, choice: Choice, *, name: str = "") -> Any:
        """The choice itself stands for its policy."""
        del name
        return choice


class MadeTrials(Trials):
    """Trials whose errors follow a rule instead of a model."""

    rule: Any

    def errors(self, policy: Any, *, to_the_end: bool = False) -> Any:
        """Apply the rule."""
        del to_the_end
        return ({"gradient": self.rule(policy)},)


def found(rule: Any, most: int) -> tuple[Made, Trials, Any]:
    """Search with a number of trials."""
    problem, bench = Made(), None
    trials = MadeTrials(
        bench,  # type: ignore[arg-type]
        Budget(gradient=1.0),
        margin=0.9,
        most=most,
        record=Record(fingerprint=""),
        report=lambda *_: None,
    )
    trials.rule = lambda choice: rule(problem, choice)
    best = trials.narrowed(problem)
    return problem, trials, trials.polished(problem, best)


@pytest.mark.parametrize("most", [3, 6, 10])
@pytest.mark.parametrize("off", [0.5, 1.01, 1.3, 4.0])
def test_a_policy_between_all_high_and_all_low_is_found(off: float, most: int) -> None:
    """Whatever factor predictions are off by, all high is never the answer."""
    problem, trials, best = found(lambda p, c: off * p.predicted(c), most)
    assert best.holds
    assert len(trials.done) <= most
    assert best.cost < 0.95 * problem.cost(problem.safest())


def test_misses_by_a_hair_do_not_follow_each_other_to_the_end() -> None:
    """An error that hardly falls with what is predicted still ends below the budget."""

    def sticky(problem: Problem, choice: Choice) -> float:
        return 0.905 * (problem.predicted(choice) / 0.9) ** 0.15

    problem, _, best = found(sticky, 8)
    assert best.holds
    assert best.cost < problem.cost(problem.safest())


def test_trials_that_are_left_make_the_best_cheaper() -> None:
    """With more trials the policy never costs more."""
    costs = [found(lambda p, c: 1.2 * p.predicted(c), most)[2].cost for most in (3, 12)]
    assert costs[1] <= costs[0]


def test_overflow_in_every_low_policy_ends_with_all_high() -> None:
    """Errors that are not finite lead to the safe end, not to an endless search."""
    problem, _, best = found(
        lambda p, c: 0.0 if c == p.safest() else math.inf,
        6,
    )
    assert best.choice == problem.safest()
