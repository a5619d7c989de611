from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from castwise.recipes.kenken.alphabets import Mode
from castwise.recipes.kenken.dataset import generate_puzzle_set
from castwise.recipes.kenken.latin import latin_squares
from castwise.recipes.kenken.symmetry import (
    canonical_form,
    latin_key,
    latin_keys,
    puzzle_key,
)
from reference.kenken_brute_force import SQUARES


def twin(
    grid: NDArray[np.uint8],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    flip: bool,
) -> NDArray[np.uint8]:
    """Permute rows and columns, then transpose or not."""
    moved = grid[rows][:, columns]
    return np.ascontiguousarray(moved.T if flip else moved)


def test_twins_of_a_puzzle_share_their_key() -> None:
    """Rows, columns, transposition and the numbering of cages leave the key alone."""
    random = np.random.default_rng(0)
    puzzles = generate_puzzle_set(5, Mode.NEGATIVE, 200, 1, "train")
    for k in range(200):
        num = int(puzzles.num_cages[k])
        rows, columns = random.permutation(5), random.permutation(5)
        flip = bool(random.integers(2))
        names = random.permutation(num)
        op, target = np.zeros(num, np.uint8), np.zeros(num, np.int32)
        op[names] = puzzles.cage_op[k, :num]
        target[names] = puzzles.cage_target[k, :num]
        cages = names[puzzles.cage_id[k]].astype(np.uint8)
        key = puzzle_key(
            twin(puzzles.solution[k], rows, columns, flip),
            twin(cages, rows, columns, flip),
            op,
            target,
            num,
        )
        assert key == puzzles.key[k]


def test_a_change_of_a_puzzle_changes_its_key() -> None:
    """Another target, operation or border is another puzzle; no keys collide."""
    puzzles = generate_puzzle_set(6, Mode.STANDARD, 2000, 1, "train")
    keys = set(puzzles.key.tolist())
    assert len(keys) == 2000
    for k in range(200):
        num = int(puzzles.num_cages[k])
        parts = [puzzles.solution[k], puzzles.cage_id[k].copy()]
        op, target = puzzles.cage_op[k].copy(), puzzles.cage_target[k].copy()
        target[k % num] += 1
        assert puzzle_key(*parts, op, target, num) not in keys
        target[k % num] -= 1
        op[k % num] += 1
        assert puzzle_key(*parts, op, target, num) not in keys
        op[k % num] -= 1
        parts[1][k % 6, k % 5] = parts[1][k % 6, k % 5 + 1]
        moved = (parts[1] != puzzles.cage_id[k]).any()
        assert (puzzle_key(*parts, op, target, num) not in keys) == moved


def test_canonical_forms_are_exact_at_size_4() -> None:
    """The 576 squares fall into the same 4 classes as under all 1,152 symmetries."""
    forms: dict[bytes, bytes] = {}
    for grid in SQUARES:
        square = np.array(grid, np.uint8)
        forms[square.tobytes()] = canonical_form(square).tobytes()
    assert len(set(forms.values())) == 4
    orders = [np.array(order) for order in itertools.permutations(range(4))]
    for form in set(forms.values()):
        square = np.frombuffer(form, np.uint8).reshape(4, 4)
        orbit = {
            twin(square, rows, columns, flip).tobytes()
            for rows in orders
            for columns in orders
            for flip in (False, True)
        }
        assert orbit == {name for name, held in forms.items() if held == form}


def test_twins_of_a_square_share_their_canonical_form() -> None:
    """Also at odd and large sizes; the form is itself a twin that starts 0 1 2 ..."""
    random = np.random.default_rng(1)
    for n in (5, 7, 16):
        squares = latin_squares(n, 20, seed=n)
        assert latin_keys(squares).tolist() == [latin_key(s) for s in squares]
        for square in squares:
            other = twin(
                square,
                random.permutation(n),
                random.permutation(n),
                bool(random.integers(2)),
            )
            form = canonical_form(square)
            assert (canonical_form(other) == form).all()
            assert (form[0] == np.arange(n)).all()
            assert (form[:, 0] == np.arange(n)).all()


def test_renaming_symbols_is_no_symmetry_of_a_set() -> None:
    """A model tells digits apart, so squares with other symbols are other squares."""
    squares = latin_squares(7, 50, seed=0)
    renamed = np.array([1, 0, 2, 3, 4, 5, 6], np.uint8)[squares]
    assert (latin_keys(squares) != latin_keys(renamed)).mean() > 0.9
