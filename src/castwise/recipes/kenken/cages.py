"""Puzzles: a Latin square, random cages over it, and clues that its digits satisfy.

Cages grow at random: from each free cell, in random order, a cage takes free
neighbours until it has the size drawn for it (1, 2, 3 or 4 cells with weights 6, 45,
35, 14) or none is left. A pair gets one of the operations that fit it, larger cages
+ or x, each with equal chance; a cage of one cell gives its digit away.

A candidate is kept when the exact solver proves that its solution is unique. So the
puzzles are uniform squares under random cages, given uniqueness and a proof within
the node cap; nothing is repaired, which would favour some cages over others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from castwise.recipes.kenken.clues import OP_ADD, OP_DIV, OP_GIVEN, OP_MUL, OP_SUB
from castwise.recipes.kenken.compiled import kernel, typed
from castwise.recipes.kenken.exact import search
from castwise.recipes.kenken.propagation import load_cages, make_workspace
from castwise.recipes.kenken.streams import below, fold, shuffle
from castwise.recipes.kenken.symmetry import puzzle_key

if TYPE_CHECKING:
    from numpy.typing import NDArray

NODE_CAP = 3000
MAX_CAGE_CELLS = 4

_STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))


@kernel
def _draw_size(state: NDArray[np.uint64]) -> int:
    """Draw how many cells a cage should have."""
    ticket = below(state, 100)
    if ticket < 45:
        return 2
    if ticket < 80:
        return 3
    return 4 if ticket < 94 else 1


@kernel
def _number_in_reading_order(cage_of: NDArray[np.int64], num_cages: int) -> None:
    """Renumber the cages by their first cells."""
    n = cage_of.shape[0]
    number = np.full(num_cages, -1, dtype=np.int64)
    used = 0
    for r in range(n):
        for c in range(n):
            cage = cage_of[r, c]
            if number[cage] < 0:
                number[cage] = used
                used += 1
            cage_of[r, c] = number[cage]


@kernel
def grow_cages(n: int, state: NDArray[np.uint64], cage_of: NDArray[np.int64]) -> int:
    """Divide the grid into random cages.

    Args:
        n: Size of the grid.
        state: uint64 [1], advanced.
        cage_of: int64 [n, n], written: cage of each cell.

    Returns:
        The number of cages.
    """
    order = np.arange(n * n)
    shuffle(state, order)
    cage_of[:, :] = -1
    members = np.empty(MAX_CAGE_CELLS, dtype=np.int64)
    num_cages = 0
    for seed_cell in order:
        if cage_of[seed_cell // n, seed_cell % n] >= 0:
            continue
        wanted = _draw_size(state)
        members[0] = seed_cell
        cage_of[seed_cell // n, seed_cell % n] = num_cages
        size = 1
        while size < wanted:
            chosen, count = -1, 0
            for i in range(size):
                for down, right in _STEPS:
                    y, x = members[i] // n + down, members[i] % n + right
                    if 0 <= y < n and 0 <= x < n and cage_of[y, x] < 0:
                        count += 1
                        if below(state, count) == 0:
                            chosen = y * n + x
            if chosen < 0:
                break
            members[size] = chosen
            cage_of[chosen // n, chosen % n] = num_cages
            size += 1
        num_cages += 1
    _number_in_reading_order(cage_of, num_cages)
    return num_cages


@kernel
def quotient(a: int, b: int) -> tuple[bool, int]:
    """Divide one of two digits by the other, whichever way is exact."""
    if b != 0 and a % b == 0:
        return True, a // b
    if a != 0 and b % a == 0:
        return True, b // a
    return False, 0


@kernel
def _pair_clue(a: int, b: int, state: NDArray[np.uint64]) -> tuple[int, int]:
    """Draw one of the operations that fit two digits; return it and its target."""
    exact, ratio = quotient(a, b)
    ticket = below(state, 4 if exact else 3)
    if ticket == 0:
        return OP_ADD, a + b
    if ticket == 1:
        return OP_SUB, abs(a - b)
    if ticket == 2:
        return OP_MUL, a * b
    return OP_DIV, ratio


@kernel
def write_clues(
    cage_of: NDArray[np.int64],
    num_cages: int,
    square: NDArray[np.uint8],
    alphabet: NDArray[np.int64],
    state: NDArray[np.uint64],
    op: NDArray[np.uint8],
    target: NDArray[np.int32],
) -> None:
    """Give each cage an operation and the target that the square's digits make.

    Args:
        cage_of: int64 [n, n], cage of each cell.
        num_cages: Number of cages.
        square: uint8 [n, n] of ranks.
        alphabet: int64 [n], digit of each rank.
        state: uint64 [1], advanced.
        op: uint8 [at least num_cages], written.
        target: int32 [at least num_cages], written.
    """
    n = alphabet.size
    sizes = np.zeros(num_cages, dtype=np.int64)
    sums = np.zeros(num_cages, dtype=np.int64)
    products = np.ones(num_cages, dtype=np.int64)
    latest = np.zeros(num_cages, dtype=np.int64)
    for r in range(n):
        for c in range(n):
            cage, digit = cage_of[r, c], alphabet[square[r, c]]
            sizes[cage] += 1
            sums[cage] += digit
            products[cage] *= digit
            latest[cage] = digit
    for cage in range(num_cages):
        if sizes[cage] == 1:
            op[cage], target[cage] = OP_GIVEN, latest[cage]
        elif sizes[cage] == 2:
            other = sums[cage] - latest[cage]
            op[cage], target[cage] = _pair_clue(other, latest[cage], state)
        elif below(state, 2) == 0:
            op[cage], target[cage] = OP_ADD, sums[cage]
        else:
            op[cage], target[cage] = OP_MUL, products[cage]


@kernel
def make_unique(
    alphabet: NDArray[np.int64],
    squares: NDArray[np.uint8],
    key: np.uint64,
    start: int,
    lot: NDArray[np.int64],
    cage_id: NDArray[np.uint8],
    cage_op: NDArray[np.uint8],
    cage_target: NDArray[np.int32],
    num_cages: NDArray[np.int16],
    nodes: NDArray[np.int32],
    keys: NDArray[np.uint64],
    source: NDArray[np.int64],
    tally: NDArray[np.int64],
) -> int:
    """Cage every square and keep the puzzles with a proved unique solution.

    Args:
        alphabet: int64 [n], digit of each rank.
        squares: uint8 [K, n, n], the solutions to cage.
        key: Key of the stream of cages; the place in the sequence is folded in.
        start: Place of the first square in the sequence.
        lot: int64 [3], from, to and modulus: only puzzles whose key modulo the
            modulus lies in from..to-1 are looked at.
        cage_id: uint8 [K, n, n], written, as are all that follow.
        cage_op: uint8 [K, n*n], zero behind the last cage.
        cage_target: int32 [K, n*n], zero behind the last cage.
        num_cages: int16 [K].
        nodes: int32 [K], trials of the proof.
        keys: uint64 [K], `puzzle_key` of each.
        source: int64 [K], which square each puzzle was made from.
        tally: int64 [4], added to: candidates by `Outcome`.

    Returns:
        The number of puzzles kept.
    """
    n = alphabet.size
    ws = make_workspace(alphabet)
    state = np.empty(1, dtype=np.uint64)
    cage_of = np.empty((n, n), dtype=np.int64)
    free = np.full((n, n), -1, dtype=np.int8)
    solutions = np.empty((2, n, n), dtype=np.uint8)
    kept = 0
    node_cap = typed(NODE_CAP)
    for k in range(squares.shape[0]):
        state[0] = fold(key, np.uint64(start + k))
        num = grow_cages(n, state, cage_of)
        op, target = cage_op[kept], cage_target[kept]
        op[:], target[:] = 0, 0
        write_clues(cage_of, num, squares[k], alphabet, state, op, target)
        for r in range(n):
            for c in range(n):
                cage_id[kept, r, c] = cage_of[r, c]
        identity = puzzle_key(squares[k], cage_id[kept], op, target, num)
        ticket = np.int64(identity % np.uint64(lot[2]))
        if not lot[0] <= ticket < lot[1]:
            continue
        load_cages(ws, cage_id[kept], op, target, num)
        found, trials, capped = search(ws, num, free, node_cap, solutions)
        tally[3 if capped else found] += 1
        if found != 1 or capped:
            continue
        num_cages[kept], nodes[kept], keys[kept] = num, trials, identity
        source[kept] = k
        kept += 1
    return kept
