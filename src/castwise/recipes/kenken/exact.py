"""An exact solver: how many solutions a puzzle has, up to two, and which.

Propagation (`propagation.py`) narrows the cells to a fixed point; then an open cell
with the fewest possibilities is tried rank by rank, and so on down. The number of
trials is the *node count*: 0 means that propagation alone decides the puzzle. When
the count would exceed the cap, the outcome is UNKNOWN, never a guess.

Hints are revealed cells that a solution must keep. Without cages the same solver
completes Latin squares.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from castwise.recipes.kenken.alphabets import digits
from castwise.recipes.kenken.compiled import kernel, typed
from castwise.recipes.kenken.propagation import (
    close_lines,
    count_bits,
    descend,
    list_cages,
    load_cages,
    make_workspace,
    narrow,
    propagate,
    rank_of_bit,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from castwise.recipes.kenken.alphabets import Mode

DEFAULT_NODE_CAP = 1_000_000

_ENOUGH = 2  # solutions; a puzzle is unique or it is not
_CHUNK = 256  # puzzles that one thread takes at a time


class Outcome(IntEnum):
    """What is known about the number of solutions."""

    IMPOSSIBLE = 0
    UNIQUE = 1
    MULTIPLE = 2
    UNKNOWN = 3
    """The node cap was reached before the second solution or the proof."""


_UNKNOWN = int(Outcome.UNKNOWN)  # numba reads plain numbers alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the solver found out about one puzzle."""

    outcome: Outcome
    """How many solutions there are."""

    num_nodes: int
    """Trials made: the difficulty, 0 when propagation alone decides."""

    solutions: NDArray[np.uint8]
    """uint8 [0 to 2, n, n] of ranks: the solutions found, two for MULTIPLE."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdicts:
    """What the solver found out about many puzzles."""

    outcome: NDArray[np.uint8]
    """uint8 [K], values of `Outcome`."""

    num_nodes: NDArray[np.int64]
    """int64 [K], trials made."""

    num_found: NDArray[np.uint8]
    """uint8 [K], solutions found, at most two."""

    solutions: NDArray[np.uint8]
    """uint8 [K, 2, n, n] of ranks: the solutions found, zeros behind them."""


@kernel
def _most_decided(ws: Any, depth: int) -> int:
    """Return an open cell with the fewest possibilities, -1 when all are decided."""
    best, fewest = -1, 99
    for cell in range(ws.n * ws.n):
        bits = ws.domain[depth, cell]
        if bits & (bits - 1):
            count = count_bits(bits)
            if count < fewest:
                best, fewest = cell, count
                if count == 2:
                    break
    return best


@kernel
def search(  # noqa: C901 -- one loop down and up the tree; kernels do not recurse
    ws: Any,
    num_cages: int,
    hints: NDArray[np.int8],
    node_cap: int,
    solutions: NDArray[np.uint8],
) -> tuple[int, int, bool]:
    """Find up to two solutions of the puzzle in the workspace.

    Args:
        ws: From `make_workspace`, filled by `load_cages`.
        num_cages: How many cages; 0 for a plain Latin square.
        hints: int8 [n, n], the rank of a revealed cell, -1 elsewhere.
        node_cap: Trials allowed.
        solutions: uint8 [2, n, n], written.

    Returns:
        Solutions found, trials made, and whether the cap cut the search short.
    """
    n = ws.n
    area = n * n
    full = (1 << n) - 1
    for cell in range(area):
        hint = hints[cell // n, cell % n]
        ws.domain[0, cell] = full if hint < 0 else 1 << np.int64(hint)
    ws.waiting[0] = ws.waiting[1] = full
    found = nodes = depth = typed(0)
    if not close_lines(ws, depth) or not list_cages(ws, num_cages):
        return found, nodes, False
    ws.waiting[0] = ws.waiting[1] = 0
    fits = propagate(ws, depth, num_cages)
    tried, left = ws.tried, ws.left
    while True:
        if fits:
            cell = _most_decided(ws, depth)
            if cell >= 0:
                tried[depth] = cell
                left[depth] = ws.domain[depth, cell]
            else:
                for i in range(area):
                    solutions[found, i // n, i % n] = rank_of_bit(ws.domain[depth, i])
                found += 1
                if found == _ENOUGH:
                    return found, nodes, False
                depth -= 1
        else:
            depth -= 1
        while depth >= 0 and left[depth] == 0:
            depth -= 1
        if depth < 0:
            return found, nodes, False
        if nodes == node_cap:
            return found, nodes, True
        nodes += 1
        bit = left[depth] & -left[depth]
        left[depth] ^= bit
        depth += 1
        descend(ws, depth, num_cages)
        narrow(ws, depth, tried[depth - 1], bit)
        fits = propagate(ws, depth, num_cages)


@kernel
def _solve_chunk(
    alphabet: NDArray[np.int64],
    cage_id: NDArray[np.uint8],
    cage_op: NDArray[np.uint8],
    cage_target: NDArray[np.int32],
    num_cages: NDArray[np.int16],
    hints: NDArray[np.int8],
    node_cap: int,
    outcome: NDArray[np.uint8],
    num_nodes: NDArray[np.int64],
    num_found: NDArray[np.uint8],
    solutions: NDArray[np.uint8],
) -> None:
    """Solve puzzles one after the other into the last four arguments."""
    ws = make_workspace(alphabet)
    for k in range(cage_id.shape[0]):
        num = typed(num_cages[k])
        load_cages(ws, cage_id[k], cage_op[k], cage_target[k], num)
        found, nodes, capped = search(ws, num, hints[k], node_cap, solutions[k])
        outcome[k] = _UNKNOWN if capped else found
        num_found[k] = found
        num_nodes[k] = nodes


def solve_many(
    mode: Mode,
    cage_id: NDArray[np.uint8],
    cage_op: NDArray[np.uint8],
    cage_target: NDArray[np.int32],
    num_cages: NDArray[np.int16],
    *,
    hints: NDArray[np.int8] | None = None,
    node_cap: int = DEFAULT_NODE_CAP,
    workers: int | None = None,
) -> Verdicts:
    """Solve many puzzles of one size and mode, as a `PuzzleSet` holds them.

    Args:
        mode: The alphabet.
        cage_id: uint8 [K, n, n], cage of each cell.
        cage_op: uint8 [K, C], operation codes.
        cage_target: int32 [K, C], targets.
        num_cages: int16 [K], cages in use; 0 for a plain Latin square.
        hints: int8 [K, n, n], rank of a revealed cell, -1 elsewhere. Default: none.
        node_cap: Trials allowed for each before its outcome is UNKNOWN.
        workers: Threads. Default: one per core.

    Returns:
        One outcome, node count and up to two solutions per puzzle.
    """
    count, n, _ = cage_id.shape
    free = np.full((count, n, n), -1, dtype=np.int8) if hints is None else hints
    found = Verdicts(
        outcome=np.zeros(count, np.uint8),
        num_nodes=np.zeros(count, np.int64),
        num_found=np.zeros(count, np.uint8),
        solutions=np.zeros((count, _ENOUGH, n, n), np.uint8),
    )
    alphabet = digits(n, mode)

    def work(begin: int) -> None:
        part = slice(begin, begin + _CHUNK)
        _solve_chunk(
            alphabet,
            np.ascontiguousarray(cage_id[part], np.uint8),
            np.ascontiguousarray(cage_op[part], np.uint8),
            np.ascontiguousarray(cage_target[part], np.int32),
            np.ascontiguousarray(num_cages[part], np.int16),
            np.ascontiguousarray(free[part], np.int8),
            node_cap,
            found.outcome[part],
            found.num_nodes[part],
            found.num_found[part],
            found.solutions[part],
        )

    with ThreadPoolExecutor(workers or os.cpu_count()) as threads:
        list(threads.map(work, range(0, count, _CHUNK)))
    return found


def solve(
    mode: Mode,
    cage_id: NDArray[np.uint8],
    cage_op: NDArray[np.uint8],
    cage_target: NDArray[np.int32],
    *,
    hints: NDArray[np.int8] | None = None,
    node_cap: int = DEFAULT_NODE_CAP,
) -> Verdict:
    """Solve one puzzle and count its solutions up to two.

    Args:
        mode: The alphabet.
        cage_id: uint8 [n, n], cage of each cell.
        cage_op: uint8 [C], operation codes; no cages at all for a Latin square.
        cage_target: int32 [C], targets.
        hints: int8 [n, n], rank of a revealed cell and -1 elsewhere. Default: none.
        node_cap: Trials allowed before the outcome is UNKNOWN.

    Returns:
        The verdict with the solutions found.
    """
    found = solve_many(
        mode,
        cage_id[None],
        cage_op[None],
        cage_target[None],
        np.array([cage_op.size]),
        hints=None if hints is None else hints[None],
        node_cap=node_cap,
        workers=1,
    )
    solutions = found.solutions[0]
    num_found = found.num_found[0]
    return Verdict(
        outcome=Outcome(int(found.outcome[0])),
        num_nodes=int(found.num_nodes[0]),
        solutions=solutions[:num_found],
    )
