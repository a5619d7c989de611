"""Beliefs on made-up problems, whose true loads differ from what was scored."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from typing import Any

import pytest

from castwise.numerics.search.belief import Belief
from castwise.numerics.search.budget import Budget
from castwise.numerics.search.candidates import parse_candidates
from castwise.numerics.search.found import Trial
from castwise.numerics.search.problem import Choice, Problem
from castwise.numerics.search.record_file import Record
from castwise.numerics.search.trials import Trials

NUM = 9


class Made(Problem):
    """Groups with given costs and loads; nothing is behind them."""

    def __init__(self, costs: list[float], loads: list[float]) -> None:
        self.candidates = parse_candidates(["bf16", "fp32"])
        self.costs = [[cost, 2 * cost] for cost in costs]
        self.loads = [[load, 0.0] for load in loads]
        self.constant = 0.0

    def safest(self) -> Choice:
        """All high."""
        return (1,) * len(self.costs)

    def policy(self, choice: Choice, *, name: str = "") -> Any:
        """The choice itself stands for its policy."""
        del name
        return choice


def trial(problem: Made, choice: Choice, usage: float) -> Trial:
    """A trial that measured something."""
    return Trial(
        choice=choice,
        predicted=problem.predicted(choice),
        usage=usage,
        errors=({"gradient": usage},),
        cost=problem.cost(choice),
        holds=usage <= 1,
    )


def low_loads(belief: Belief) -> list[float]:
    """What each group is believed to load in bf16."""
    return [each[0] for each in belief.loads()]


def test_without_trials_the_scores_are_believed() -> None:
    """Nothing was measured, so nothing is corrected."""
    problem = Made([1.0] * 3, [0.1, 0.2, 0.3])
    assert low_loads(Belief(problem, [], 1.0)) == pytest.approx([0.1, 0.2, 0.3])


def test_what_failed_together_is_suspect_and_the_rest_is_not() -> None:
    """Two trials differ in one group; the one with it was worse by far."""
    problem = Made([1.0] * 4, [0.2] * 4)
    without = trial(problem, (0, 0, 1, 1), math.sqrt(0.4))
    with_it = trial(problem, (0, 0, 0, 1), math.sqrt(1.2))
    loads = low_loads(Belief(problem, [without, with_it], 1.0))
    suspect, others = loads[2], [*loads[:2], loads[3]]
    assert suspect > 1.5 * max(others)


def test_the_group_that_was_least_sure_takes_most_of_the_blame() -> None:
    """Deviations are in proportion to loads, so the larger load moves further."""
    problem = Made([1.0] * 3, [0.05, 0.5, 0.05])
    first = trial(problem, (1, 1, 0), math.sqrt(0.05))
    both = trial(problem, (0, 0, 1), math.sqrt(1.1))
    loads = low_loads(Belief(problem, [first, both], 1.0))
    assert loads[1] - 0.5 > 5 * abs(loads[0] - 0.05)


def test_infinite_loads_stay_infinite_and_nan_never_appears() -> None:
    """What cannot be taken is not learnt about; an overflow teaches no number."""
    problem = Made([1.0] * 3, [0.1, math.inf, 0.3])
    trials = [
        trial(problem, (0, 1, 0), math.inf),
        trial(problem, (0, 1, 1), 0.4),
    ]
    belief = Belief(problem, trials, 1.0)
    assert math.isinf(low_loads(belief)[1])
    best = trials[1]
    prospect = belief.best_prospect(best, {each.choice for each in trials})
    assert prospect is None or prospect.choice[1] == 1


def test_an_exchange_is_seen_where_no_single_change_fits() -> None:
    """Low where it is dear and high where it is cheap, in one step."""
    problem = Made([1.0, 5.0], [0.8, 0.8])
    best = trial(problem, (0, 1), math.sqrt(0.8))
    both = trial(problem, (0, 0), math.sqrt(1.6))
    belief = Belief(problem, [best, both], 1.0)
    prospect = belief.best_prospect(best, {best.choice, both.choice})
    assert prospect is not None
    assert prospect.choice == (1, 0)
    assert 0 < prospect.gain < 4.0


class MadeTrials(Trials):
    """Trials whose errors follow hidden loads instead of a model."""

    hidden: list[float]
    clash: tuple[int, int]

    def errors(self, policy: Any, *, to_the_end: bool = False) -> Any:
        """Hidden loads of what is low; one pair of groups does not just add up."""
        del to_the_end
        return ({"gradient": self.usage_of(policy)},)

    def usage_of(self, choice: Choice) -> float:
        """The true use of the budget."""
        load = sum(h for h, one in zip(self.hidden, choice, strict=True) if one == 0)
        if all(choice[at] == 0 for at in self.clash):
            load += 2 * math.sqrt(math.prod(self.hidden[at] for at in self.clash))
        return math.sqrt(load)


def gaps(seed: int) -> tuple[float, float]:
    """How far the search is above the optimum, before and after the last trials."""
    chance = random.Random(seed)
    costs = [chance.choice([1.0, 2.0, 4.0, 8.0]) for _ in range(NUM)]
    scored = [10 ** chance.uniform(-2.5, 0.3) for _ in range(NUM)]
    problem = Made(costs, scored)
    trials = MadeTrials(
        None,  # type: ignore[arg-type]
        Budget(gradient=1.0),
        margin=0.9,
        most=10,
        record=Record(fingerprint=""),
        report=lambda *_: None,
    )
    trials.hidden = [load * math.exp(chance.gauss(0, 0.5)) for load in scored]
    trials.clash = (0, 1)
    holding = [
        choice
        for choice in itertools.product((0, 1), repeat=NUM)
        if trials.usage_of(choice) <= 0.9
    ]
    floor = problem.cost((0,) * NUM)
    optimum = min(problem.cost(choice) for choice in holding) - floor
    first = trials.narrowed(problem)
    last = trials.polished(problem, first)
    assert last.holds
    assert len(trials.done) <= 10
    if not optimum:
        return 0.0, 0.0
    return (first.cost - floor) / optimum - 1, (last.cost - floor) / optimum - 1


def test_learning_from_trials_brings_the_choice_near_the_optimum() -> None:
    """On 40 problems with wrong scores and a clash: less than half of the gap."""
    before, after = zip(*map(gaps, range(40)), strict=True)
    assert statistics.mean(after) < 0.5 * statistics.mean(before)
    assert statistics.mean(after) < 0.02
