"""The slow original that the exact KenKen solver is measured against.

It knows nothing of the package: all 576 Latin squares of size 4 from permutations, and
the meaning of a clue in the words of the documentation.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from math import prod

import numpy as np

SIZE = 4

Square = tuple[tuple[int, ...], ...]
Cage = tuple[str, int, list[tuple[int, int]]]

_ROWS = list(itertools.permutations(range(SIZE)))
SQUARES: list[Square] = [
    grid
    for grid in itertools.product(_ROWS, repeat=SIZE)
    if all(len({row[c] for row in grid}) == SIZE for c in range(SIZE))
]
_GRID = np.array(SQUARES)  # [576, 4, 4]


def holds(op: str, target: int, values: Sequence[int]) -> bool:
    """Say whether digits satisfy a clue."""
    if op == "=":
        return list(values) == [target]
    if op == "+":
        return sum(values) == target
    if op == "x":
        return prod(values) == target
    first, second = values
    if op == "-":
        return abs(first - second) == target
    quotients = []
    if second != 0:
        quotients.append(Fraction(first, second))
    if first != 0:
        quotients.append(Fraction(second, first))
    return target in quotients


@cache
def _truth(op: str, target: int, digits: tuple[int, ...], size: int) -> np.ndarray:
    """Tabulate a clue over all ranks of `size` cells, bool [4, 4, ...]."""
    tuples = itertools.product(digits, repeat=size)
    table = [holds(op, target, values) for values in tuples]
    return np.array(table).reshape((SIZE,) * size)


def solutions(
    digits: Sequence[int],
    cages: Sequence[Cage],
    hints: Mapping[tuple[int, int], int],
) -> list[Square]:
    """List every square that satisfies the cages and keeps the hints.

    Args:
        digits: Digit of each rank.
        cages: Triples of operation, target and list of (row, column).
        hints: Rank by (row, column).
    """
    fits = np.ones(len(SQUARES), dtype=bool)
    for (r, c), rank in hints.items():
        fits &= _GRID[:, r, c] == rank
    for op, target, cells in cages:
        ranks = tuple(_GRID[:, r, c] for r, c in cells)
        fits &= _truth(op, target, tuple(digits), len(cells))[ranks]
    return [SQUARES[i] for i in np.flatnonzero(fits)]
