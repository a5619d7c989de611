from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from castwise.recipes.kenken.alphabets import Mode, digits
from castwise.recipes.kenken.cages import MAX_CAGE_CELLS, NODE_CAP, grow_cages, quotient
from castwise.recipes.kenken.clues import SYMBOLS
from castwise.recipes.kenken.dataset import generate_puzzle_set
from castwise.recipes.kenken.exact import Outcome, solve
from castwise.recipes.kenken.faults import find_faults
from castwise.recipes.kenken.puzzles import puzzle_at
from reference.kenken_brute_force import holds


@pytest.mark.parametrize("n", [3, 4, 7, 16])
def test_cages_divide_the_grid(n: int) -> None:
    """Every cell in one cage of at most four cells, numbered in reading order."""
    state = np.array([n], dtype=np.uint64)
    cage_of = np.empty((n, n), dtype=np.int64)
    for _ in range(50):
        num = grow_cages(n, state, cage_of)
        sizes = np.bincount(cage_of.ravel())
        assert len(sizes) == num
        assert 1 <= sizes.min() <= sizes.max() <= MAX_CAGE_CELLS
        _, first = np.unique(cage_of, return_index=True)
        assert (np.diff(first) > 0).all()


def test_every_way_to_divide_a_row_of_neighbours_occurs() -> None:
    """No direction is preferred: pairs lie across as often as down."""
    state = np.array([9], dtype=np.uint64)
    cage_of = np.empty((6, 6), dtype=np.int64)
    across = down = 0
    for _ in range(3000):
        num = grow_cages(6, state, cage_of)
        sizes = np.bincount(cage_of.ravel(), minlength=num)
        for cage in np.flatnonzero(sizes == 2):
            rows = np.argwhere(cage_of == cage)[:, 0]
            across += int(rows[0] == rows[1])
            down += int(rows[0] != rows[1])
    assert stats.binomtest(across, across + down).pvalue > 1e-5


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("n", [3, 4, 6])
def test_puzzles_are_sound_unique_and_fit_their_solution(n: int, mode: Mode) -> None:
    """No fault, each clue holds for the digits, and the solver agrees afresh."""
    puzzles = generate_puzzle_set(n, mode, 60, 5, "validation")
    shown = digits(n, mode)[puzzles.solution]
    for k in range(60):
        puzzle = puzzle_at(puzzles, k)
        assert not list(find_faults(n, mode, puzzle.cages, None))
        for cage in puzzle.cages:
            values = [int(shown[k][cell]) for cell in cage.cells]
            assert holds(cage.op, cage.target, values)
        arrays = puzzle.arrays()
        assert (arrays.cage_id == puzzles.cage_id[k]).all()
        verdict = solve(mode, *arrays[:3], hints=arrays.hints)
        assert verdict.outcome is Outcome.UNIQUE
        assert verdict.num_nodes == puzzles.nodes[k] <= NODE_CAP
        assert (verdict.solutions[0] == puzzles.solution[k]).all()


@pytest.mark.parametrize("mode", Mode)
def test_every_operation_occurs_in_every_mode(mode: Mode) -> None:
    """All five, and no other; negative targets where digits are negative."""
    puzzles = generate_puzzle_set(5, mode, 300, 2, "train")
    used = np.arange(puzzles.cage_op.shape[1]) < puzzles.num_cages[:, None]
    assert {SYMBOLS[op] for op in puzzles.cage_op[used]} == set(SYMBOLS[1:])
    assert not puzzles.cage_op[~used].any()
    assert not puzzles.cage_target[~used].any()
    assert (puzzles.cage_target.min() < 0) == (mode is Mode.NEGATIVE)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (6, 2, (True, 3)),
        (2, 6, (True, 3)),
        (4, 6, (False, 0)),
        (0, 5, (True, 0)),
        (5, 0, (True, 0)),
        (-2, 1, (True, -2)),
        (3, -3, (True, -1)),
        (-4, -2, (True, 2)),
    ],
)
def test_quotients_are_exact_either_way_round(
    a: int, b: int, expected: tuple[bool, int]
) -> None:
    """Zero divides nothing; signs count."""
    assert quotient(a, b) == expected
