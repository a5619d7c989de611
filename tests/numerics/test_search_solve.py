"""The knapsack: always within the capacity, and close to the best there is."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest

from castwise.numerics.search.solve import solve


def brute_force(
    costs: list[list[float]], loads: list[list[float]], capacity: float
) -> float | None:
    """The least cost of all choices that fit."""
    found = [
        sum(costs[at][one] for at, one in enumerate(choice))
        for choice in itertools.product(*(range(len(row)) for row in costs))
        if sum(loads[at][one] for at, one in enumerate(choice)) <= capacity
    ]
    return min(found, default=None)


def instance(seed: int) -> tuple[list[list[float]], list[list[float]], float]:
    """Seven groups of three candidates, loads over decades."""
    chance = random.Random(seed)
    costs, loads = [], []
    for _ in range(7):
        size, load = chance.uniform(1, 9), 10 ** chance.uniform(-4, 0)
        costs.append([size, 2 * size, 4 * size])
        loads.append([load, load * chance.uniform(0, 0.3), load * 1e-6])
    return costs, loads, 10 ** chance.uniform(-4, 0.3)


def test_choices_fit_and_are_close_to_the_optimum() -> None:
    """On 150 random instances the mean gap is below 2 %, and the worst below 15 %."""
    gaps = []
    for seed in range(150):
        costs, loads, capacity = instance(seed)
        best = brute_force(costs, loads, capacity)
        choice = solve(costs, loads, capacity)
        if best is None:
            assert choice is None
            continue
        assert choice is not None
        assert sum(loads[at][one] for at, one in enumerate(choice)) <= capacity
        cost = sum(costs[at][one] for at, one in enumerate(choice))
        assert cost >= best - 1e-9
        gaps.append(cost / best - 1)
    assert len(gaps) > 100
    assert statistics.mean(gaps) < 0.02
    assert max(gaps) < 0.15


def test_candidates_that_cannot_be_taken_never_are() -> None:
    """An infinite load is out at any capacity, however cheap."""
    assert solve([[1.0, 9.0]], [[math.inf, 1.0]], math.inf) == (1,)
    assert solve([[1.0, 9.0]], [[math.inf, 1.0]], 0.5) is None


def test_what_costs_less_and_errs_less_is_taken() -> None:
    """fp32 that is cheaper than bf16 wins, though bf16 fits."""
    assert solve([[3.0, 2.0], [1.0, 2.0]], [[1.0, 0.0], [0.1, 0.0]], 5.0) == (1, 0)


@pytest.mark.parametrize("capacity", [0.0, 1e-12, 1.0])
def test_solving_is_deterministic_and_moves_only_when_it_saves(capacity: float) -> None:
    """Equal candidates stay where they are."""
    costs, loads = [[1.0, 1.0]] * 5, [[0.0, 0.0]] * 5
    assert solve(costs, loads, capacity) == (0,) * 5
