"""Solve: the cheapest choice of one candidate for each group within a budget.

    minimise  sum of costs      subject to  sum of loads <= capacity

This is a knapsack with multiple choice. Each group first keeps only the candidates on
the lower convex hull of cost over load. From the lowest loads the steps down the hulls
are taken, the largest saving for each bit of load first, as long as they fit: the
optimum of the relaxed problem up to its last step. Then single candidates and pairs are
exchanged while that saves anything. It is fast and deterministic; how far it is from an
integer program, `benchmarks/search.py` measures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

_MOST_PAIRS = 200  # groups, beyond which pairs are not exchanged


def solve(
    costs: Sequence[Sequence[float]],
    loads: Sequence[Sequence[float]],
    capacity: float,
) -> tuple[int, ...] | None:
    """Choose one candidate for each group; None where nothing fits.

    Args:
        costs: For every group what each candidate costs.
        loads: For every group what each candidate takes of the capacity; infinite
            where it cannot be taken.
        capacity: What all loads together may be.
    """
    chosen = [_least(cost, load) for cost, load in zip(costs, loads, strict=True)]
    used = sum(loads[at][one] for at, one in enumerate(chosen))
    if not used <= capacity:
        return None
    chosen = _down_the_hulls(chosen, costs, loads, capacity)
    while _improve(chosen, costs, loads, capacity):
        pass
    return tuple(chosen)


def _least(costs: Sequence[float], loads: Sequence[float]) -> int:
    return min(range(len(costs)), key=lambda at: (loads[at], costs[at], at))


def _down_the_hulls(
    chosen: list[int],
    costs: Sequence[Sequence[float]],
    loads: Sequence[Sequence[float]],
    capacity: float,
) -> list[int]:
    steps = []
    for group, start in enumerate(chosen):
        hull = _hull(start, costs[group], loads[group])
        for rank, (one, other) in enumerate(itertools.pairwise(hull)):
            saved = costs[group][one] - costs[group][other]
            added = loads[group][other] - loads[group][one]
            steps.append((-_rate(saved, added), group, rank, other))
    chosen = list(chosen)
    ranks = [0] * len(chosen)
    used = sum(loads[at][one] for at, one in enumerate(chosen))
    for _, group, rank, other in sorted(steps):
        more = loads[group][other] - loads[group][chosen[group]]
        if rank == ranks[group] and used + more <= capacity:
            chosen[group], ranks[group] = other, rank + 1
            used += more
    return chosen


def _hull(start: int, costs: Sequence[float], loads: Sequence[float]) -> list[int]:
    """Candidates from `start` down in cost, each step worse than the one before."""
    hull = [start]
    while True:
        here = hull[-1]
        cheaper = [
            at
            for at in range(len(costs))
            if costs[at] < costs[here] and math.isfinite(loads[at])
        ]
        if not cheaper:
            return hull
        hull.append(
            max(
                cheaper,
                key=lambda at: (
                    _rate(costs[here] - costs[at], loads[at] - loads[here]),
                    -costs[at],
                ),
            )
        )


def _rate(saved: float, added: float) -> float:
    return math.inf if added <= 0 else saved / added


def _improve(
    chosen: list[int],
    costs: Sequence[Sequence[float]],
    loads: Sequence[Sequence[float]],
    capacity: float,
) -> bool:
    """Make the change of one group or two that saves the most; whether there is one."""
    used = sum(loads[at][one] for at, one in enumerate(chosen))
    spare = capacity - used
    moves = [
        (
            costs[at][one] - costs[at][other],
            loads[at][other] - loads[at][one],
            at,
            other,
        )
        for at, one in enumerate(chosen)
        for other in range(len(costs[at]))
        if other != one and math.isfinite(loads[at][other])
    ]
    total = sum(costs[at][one] for at, one in enumerate(chosen))
    threshold = 1e-12 * abs(total)
    best: tuple[float, tuple[tuple[int, int], ...]] = (threshold, ())
    for saved, added, at, other in moves:
        if added <= spare and saved > best[0]:
            best = saved, ((at, other),)
    if len(chosen) <= _MOST_PAIRS:
        gains = [move for move in moves if move[0] > threshold]
        frees = [move for move in moves if move[1] < 0]
        for saved, added, at, other in gains:
            for lost, freed, second, instead in frees:
                gain = saved + lost
                if second != at and gain > best[0] and added + freed <= spare:
                    best = gain, ((at, other), (second, instead))
    for at, other in best[1]:
        chosen[at] = other
    return bool(best[1])
