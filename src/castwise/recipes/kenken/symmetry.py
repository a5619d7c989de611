"""What stays the same when rows and columns are permuted and the grid is transposed.

A model that sees relations (same row, same column, same cage) and no positions cannot
tell such twins apart, so training on one and testing on the other would test memory.
`puzzle_key` is a hash that all twins of a puzzle share: it refines colours of cells,
rows, columns and cages by what they touch, three times, starting from clue and
solution, for the puzzle and for its transpose. Two puzzles that are no twins share a
key with negligible chance or when refinement cannot tell them apart; then they merely
land in the same split, and one of them is dropped as a duplicate.

For a plain Latin square `canonical_form` is exact: choose a row to come first, permute
the columns until it reads 0 1 2 ..., sort the rows by their first entry; the smallest
of these over all rows, and over the transposed square, is the form of all twins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from castwise.recipes.kenken.compiled import kernel
from castwise.recipes.kenken.streams import fold, mix64

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROUNDS = 3


@kernel
def _refined_hash(  # noqa: C901 -- three plain loops over the grid
    colour: NDArray[np.uint64],
    cage_id: NDArray[np.uint8],
    num_cages: int,
    transposed: bool,
) -> np.uint64:
    """Refine cell colours (uint64 [n, n]) and hash what results."""
    n = colour.shape[0]
    cells = colour.copy()
    for _ in range(_ROUNDS):
        across = np.zeros(n, dtype=np.uint64)
        down = np.zeros(n, dtype=np.uint64)
        cages = np.zeros(max(num_cages, 1), dtype=np.uint64)
        for r in range(n):
            for c in range(n):
                scattered = mix64(cells[r, c])
                across[r] += scattered
                down[c] += scattered
                if num_cages:
                    cages[cage_id[r, c]] += scattered
        for r in range(n):
            for c in range(n):
                first, second = across[r], down[c]
                if transposed:
                    first, second = second, first
                key = fold(fold(cells[r, c], first), second)
                if num_cages:
                    key = fold(key, cages[cage_id[r, c]])
                cells[r, c] = key
    total = np.uint64(0)
    for r in range(n):
        for c in range(n):
            total += mix64(cells[r, c])
    return total


@kernel
def puzzle_key(
    solution: NDArray[np.uint8],
    cage_id: NDArray[np.uint8],
    op: NDArray[np.uint8],
    target: NDArray[np.int32],
    num_cages: int,
) -> np.uint64:
    """Hash a puzzle and its solution so that all twins share the hash.

    Args:
        solution: uint8 [n, n] of ranks.
        cage_id: uint8 [n, n], cage of each cell.
        op: uint8 [C], operation codes.
        target: int32 [C], targets.
        num_cages: How many cages; 0 for a plain Latin square.

    Returns:
        A 64-bit key.
    """
    n = solution.shape[0]
    colour = np.empty((n, n), dtype=np.uint64)
    for r in range(n):
        for c in range(n):
            key = np.uint64(solution[r, c] + 1)
            if num_cages:
                cage = cage_id[r, c]
                key = fold(key, np.uint64(op[cage]))
                key = fold(key, np.uint64(np.int64(target[cage])))
            colour[r, c] = key
    straight = _refined_hash(colour, cage_id, num_cages, False)
    transposed = _refined_hash(colour, cage_id, num_cages, True)
    return mix64(straight + transposed)


@kernel
def _smaller(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> bool:
    n = first.shape[0]
    for r in range(n):
        for c in range(n):
            if first[r, c] != second[r, c]:
                return bool(first[r, c] < second[r, c])
    return False


@kernel
def canonical_form(square: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the smallest reduced twin of a Latin square (uint8 [n, n])."""
    n = square.shape[0]
    best = np.full((n, n), 255, dtype=np.uint8)
    form = np.empty((n, n), dtype=np.uint8)
    for transposed in range(2):
        grid = square.T if transposed else square
        for top in range(n):
            origin = 0  # column where the top row reads 0
            for c in range(n):
                if grid[top, c] == 0:
                    origin = c
            for r in range(n):
                place = grid[r, origin]
                for c in range(n):
                    form[place, grid[top, c]] = grid[r, c]
            if _smaller(form, best):
                best, form = form, best
    return best


@kernel
def latin_key(square: NDArray[np.uint8]) -> np.uint64:
    """Hash the canonical form of a Latin square (uint8 [n, n] of ranks)."""
    form = canonical_form(square)
    key = np.uint64(form.shape[0])
    for r in range(form.shape[0]):
        for c in range(form.shape[1]):
            key = fold(key, np.uint64(form[r, c]))
    return key


@kernel
def latin_keys(squares: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Hash many Latin squares (uint8 [K, n, n]) to uint64 [K]."""
    keys = np.empty(squares.shape[0], dtype=np.uint64)
    for k in range(squares.shape[0]):
        keys[k] = latin_key(squares[k])
    return keys
