from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from castwise.recipes.kenken import cages
from castwise.recipes.kenken.alphabets import Mode, digits
from castwise.recipes.kenken.clues import OP_ADD, OP_MUL, SYMBOLS
from castwise.recipes.kenken.exact import Outcome, solve, solve_many
from castwise.recipes.kenken.latin import latin_squares
from reference.kenken_brute_force import Cage, holds, solutions

Arrays = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int32]]


def random_puzzles(
    n: int, mode: Mode, count: int, seed: int
) -> Iterator[tuple[NDArray[np.uint8], Arrays]]:
    """Cage random squares without asking for uniqueness."""
    state = np.array([seed + 1], dtype=np.uint64)
    cage_of = np.empty((n, n), dtype=np.int64)
    for square in latin_squares(n, count, seed):
        num = cages.grow_cages(n, state, cage_of)
        op, target = np.zeros(num, np.uint8), np.zeros(num, np.int32)
        cages.write_clues(cage_of, num, square, digits(n, mode), state, op, target)
        yield square, (cage_of.astype(np.uint8), op, target)


def read_cages(arrays: Arrays) -> list[Cage]:
    """Turn the arrays into what the brute force reads."""
    cage_id, op, target = arrays
    return [
        (SYMBOLS[op[c]], int(target[c]), [(int(y), int(x)) for y, x in cells])
        for c in range(len(op))
        for cells in (np.argwhere(cage_id == c),)
    ]


def no_hints(n: int) -> NDArray[np.int8]:
    """Reveal nothing."""
    return np.full((n, n), -1, np.int8)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("variant", ["plain", "hinted", "lying"])
def test_solver_agrees_with_all_576_squares(mode: Mode, variant: str) -> None:
    """The outcome and every solution equal brute force, whatever the puzzle.

    Lying puzzles have a target off by one or a hint from nowhere, so that many are
    impossible; the others are unique or not.
    """
    random = np.random.default_rng(7)
    outcomes = set()
    for square, arrays in random_puzzles(4, mode, 400, seed=3):
        hints = no_hints(4)
        if variant != "plain":
            shown = random.random((4, 4)) < 0.2
            hints[shown] = square[shown]
        if variant == "lying" and random.random() < 0.5:
            arrays[2][random.integers(len(arrays[2]))] += random.choice([-1, 1])
        elif variant == "lying":
            hints[tuple(random.integers(4, size=2))] = random.integers(4)
        known = {
            cell: int(hints[cell]) for cell in np.ndindex(4, 4) if hints[cell] >= 0
        }
        expected = solutions(digits(4, mode).tolist(), read_cages(arrays), known)
        verdict = solve(mode, *arrays, hints=hints)
        assert verdict.outcome == min(len(expected), 2)
        found = {tuple(map(tuple, grid.tolist())) for grid in verdict.solutions}
        assert len(found) == len(verdict.solutions) == min(len(expected), 2)
        assert found <= set(expected)
        outcomes.add(verdict.outcome)
    known_outcomes = {Outcome.UNIQUE, Outcome.MULTIPLE}
    assert outcomes == known_outcomes | ({Outcome.IMPOSSIBLE} & outcomes)
    assert (Outcome.IMPOSSIBLE in outcomes) == (variant == "lying")


@pytest.mark.parametrize("share", [0.0, 0.4, 0.7])
def test_latin_completion_agrees_with_all_576_squares(share: float) -> None:
    """Without cages the solver completes Latin squares."""
    random = np.random.default_rng(1)
    empty: Arrays = (
        np.zeros((4, 4), np.uint8),
        np.zeros(0, np.uint8),
        np.zeros(0, np.int32),
    )
    for square in latin_squares(4, 100, seed=5):
        hints = np.where(random.random((4, 4)) < share, square, -1).astype(np.int8)
        known = {
            cell: int(hints[cell]) for cell in np.ndindex(4, 4) if hints[cell] >= 0
        }
        expected = solutions(range(4), [], known)
        verdict = solve(Mode.STANDARD, *empty, hints=hints)
        assert verdict.outcome == min(len(expected), 2)
        assert tuple(map(tuple, verdict.solutions[0].tolist())) in expected


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("n", [5, 7, 9])
def test_solutions_are_squares_that_satisfy_every_clue(n: int, mode: Mode) -> None:
    """Every solution is Latin, keeps the clues, and the two of a pair differ."""
    for _, arrays in random_puzzles(n, mode, 30, seed=n):
        verdict = solve(mode, *arrays, node_cap=3000)
        for grid in verdict.solutions:
            assert (np.sort(grid, 0) == np.arange(n)[:, None]).all()
            assert (np.sort(grid, 1) == np.arange(n)).all()
            for op, target, cells in read_cages(arrays):
                values = [int(digits(n, mode)[grid[cell]]) for cell in cells]
                assert holds(op, target, values)
        if verdict.outcome is Outcome.MULTIPLE:
            assert (verdict.solutions[0] != verdict.solutions[1]).any()


def test_node_cap_gives_unknown_never_a_guess() -> None:
    """A search that is cut short says so, and counts no more trials than allowed."""
    seen = set()
    for _, arrays in random_puzzles(9, Mode.NEGATIVE, 20, seed=2):
        full = solve(Mode.NEGATIVE, *arrays, node_cap=20_000)
        short = solve(Mode.NEGATIVE, *arrays, node_cap=10)
        assert short.num_nodes <= 10
        assert short.outcome in {full.outcome, Outcome.UNKNOWN}
        if short.outcome is Outcome.UNKNOWN:
            assert len(short.solutions) <= 1
        seen.add(short.outcome)
    assert Outcome.UNKNOWN in seen


@pytest.mark.parametrize(
    ("n", "op", "target", "outcome"),
    [
        (4, OP_ADD, 40, Outcome.MULTIPLE),
        (4, OP_MUL, 24**4, Outcome.MULTIPLE),
        (4, OP_ADD, 41, Outcome.IMPOSSIBLE),
        (9, OP_ADD, 405, Outcome.MULTIPLE),
    ],
)
def test_one_cage_over_the_whole_grid_is_exact(
    n: int, op: int, target: int, outcome: Outcome
) -> None:
    """Cages too large to be listed are neither believed nor refused unchecked."""
    one_cage = np.zeros((n, n), np.uint8)
    verdict = solve(
        Mode.STANDARD, one_cage, np.array([op], np.uint8), np.array([target], np.int32)
    )
    assert verdict.outcome is outcome


def test_a_large_cage_decides_between_two_solutions() -> None:
    """Two squares that differ in four cells, of which a cage of a row sees two.

    The row's sum is the same for both, so the cage leaves one of the two cells out.
    """
    square, rows, columns = square_with_a_swap(9)
    hints = square.astype(np.int8)
    hints[np.ix_(rows, columns)] = -1
    cage_id = np.ones((9, 9), np.uint8)
    cage_id[rows[0]] = 0
    cage_id[rows[0], columns[0]] = 1
    digit = square.astype(int) + 1
    sums = [digit[cage_id == 0].sum(), digit[cage_id == 1].sum()]
    ops, targets = np.full(2, OP_ADD, np.uint8), np.array(sums, np.int32)
    verdict = solve(Mode.STANDARD, cage_id, ops, targets, hints=hints)
    assert verdict.outcome is Outcome.UNIQUE
    assert (verdict.solutions[0] == square).all()
    free = solve(Mode.STANDARD, cage_id, ops[:0], targets[:0], hints=hints)
    assert free.outcome is Outcome.MULTIPLE


def square_with_a_swap(
    n: int,
) -> tuple[NDArray[np.uint8], tuple[int, int], tuple[int, int]]:
    """Find a square with two rows and columns that hold two symbols crosswise."""
    for square in latin_squares(n, 50, seed=1):
        for r, s in itertools.combinations(range(n), 2):
            for c, d in itertools.combinations(range(n), 2):
                if square[r, c] == square[s, d] and square[r, d] == square[s, c]:
                    return square, (r, s), (c, d)
    raise AssertionError


def test_many_equals_one_by_one_for_any_number_of_workers() -> None:
    """Batches, threads and chunks change no outcome, node count or solution."""
    puzzles = [arrays for _, arrays in random_puzzles(6, Mode.STANDARD, 300, seed=4)]
    room = max(len(op) for _, op, _ in puzzles)
    cage_op = np.zeros((300, room), np.uint8)
    cage_target = np.zeros((300, room), np.int32)
    for k, (_, op, target) in enumerate(puzzles):
        cage_op[k, : len(op)], cage_target[k, : len(op)] = op, target
    cage_id = np.stack([cage_id for cage_id, _, _ in puzzles])
    num_cages = np.array([len(op) for _, op, _ in puzzles], np.int16)
    packed = (Mode.STANDARD, cage_id, cage_op, cage_target, num_cages)
    first, second = solve_many(*packed, workers=1), solve_many(*packed, workers=3)
    assert (first.solutions == second.solutions).all()
    for k in range(0, 300, 17):
        verdict = solve(Mode.STANDARD, *puzzles[k])
        assert verdict.outcome == first.outcome[k] == second.outcome[k]
        assert verdict.num_nodes == first.num_nodes[k]
        assert len(verdict.solutions) == first.num_found[k]
