"""Uniformly distributed Latin squares by the walk of Jacobson and Matthews (1996).

A square is a cube of zeros and ones with one 1 on every line. A move adds and removes
ones at the corners of a box; when that leaves a -1 at the far corner the square is
*improper*, and the next moves start from there until it is proper again. Seen only
when proper, the walk has the uniform distribution over all Latin squares. How fast it
forgets its start is known by experiment alone; the tests check uniformity over all 12
squares of size 3 and all 576 of size 4, and class shares at sizes 4 and 5.

Three tables hold the cube (which symbol stands at row and column, which row holds a
symbol in a column, which column holds it in a row), so a move costs the same at every
size. Squares come in blocks of 256: each block has its own key, starts from the cyclic
square, walks `10 n**3` proper squares, then keeps one in every `n**2`, and each kept
square goes through a random paratopism (rows, columns and symbols permuted, the three
roles exchanged). Square i is hence a function of the seed, the size and i alone.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from castwise.errors import SettingsError
from castwise.recipes.kenken.alphabets import check_size
from castwise.recipes.kenken.compiled import kernel
from castwise.recipes.kenken.streams import below, fold, shuffle, stream_key

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 256
_BURN_IN = 10


@kernel
def _cyclic(n: int) -> NDArray[np.int64]:
    """Make the three tables of the cyclic square, int64 [3, n, n]."""
    tables = np.empty((3, n, n), dtype=np.int64)
    for x in range(n):
        for y in range(n):
            z = (x + y) % n
            tables[0, x, y] = z
            tables[1, y, z] = x
            tables[2, x, z] = y
    return tables


@kernel
def _walk(tables: NDArray[np.int64], state: NDArray[np.uint64], visits: int) -> None:
    """Walk until `visits` proper squares have been seen, ending at the last.

    In an improper square the line through the -1 at (x, y, z) holds two ones in each
    of the three directions: one stays in the table, the other in `spare`.
    """
    n = tables.shape[1]
    xy, yz, xz = tables[0], tables[1], tables[2]
    proper = True
    x = y = z = spare_x = spare_y = spare_z = np.int64(0)
    while visits > 0:
        if proper:
            x, y, z = below(state, n), below(state, n), below(state, n - 1)
            if z >= xy[x, y]:
                z += 1  # any symbol but the one that stands there
            z2, x2, y2 = xy[x, y], yz[y, z], xz[x, z]
            spare_z, spare_x, spare_y = z, x, y
        else:
            coins = below(state, 8)
            z2, x2, y2 = xy[x, y], yz[y, z], xz[x, z]
            if coins & 1:
                z2, spare_z = spare_z, z2
            if coins & 2:
                x2, spare_x = spare_x, x2
            if coins & 4:
                y2, spare_y = spare_y, y2
        xy[x, y], yz[y, z], xz[x, z] = spare_z, spare_x, spare_y
        xy[x, y2] = xy[x2, y] = z2
        yz[y, z2] = yz[y2, z] = x2
        xz[x, z2] = xz[x2, z] = y2
        proper = xy[x2, y2] == z2
        if proper:
            xy[x2, y2], yz[y2, z2], xz[x2, z2] = z, x, y
            visits -= 1
        else:
            spare_x, spare_y, spare_z = x, y, z
            x, y, z = x2, y2, z2


@kernel
def _paratope(
    square: NDArray[np.int64], state: NDArray[np.uint64], out: NDArray[np.uint8]
) -> None:
    """Write a random paratope of the square (int64 [n, n]) to `out`."""
    n = square.shape[0]
    shuffled = np.empty((3, n), dtype=np.int64)
    for role in range(3):
        for i in range(n):
            shuffled[role, i] = i
        shuffle(state, shuffled[role])
    roles = np.arange(3)
    shuffle(state, roles)
    triple = np.empty(3, dtype=np.int64)
    for x in range(n):
        for y in range(n):
            triple[0] = shuffled[0, x]
            triple[1] = shuffled[1, y]
            triple[2] = shuffled[2, square[x, y]]
            out[triple[roles[0]], triple[roles[1]]] = triple[roles[2]]


@kernel
def _fill_block(key: np.uint64, block: int, out: NDArray[np.uint8]) -> None:
    """Write the first squares of a block to `out` (uint8 [up to BLOCK, n, n])."""
    n = out.shape[1]
    state = np.empty(1, dtype=np.uint64)
    state[0] = fold(key, np.uint64(block))
    tables = _cyclic(n)
    _walk(tables, state, _BURN_IN * n**3)
    for k in range(out.shape[0]):
        _walk(tables, state, n * n)
        _paratope(tables[0], state, out[k])


def latin_squares(
    n: int, count: int, seed: int, start: int = 0, workers: int | None = None
) -> NDArray[np.uint8]:
    """Make uniformly distributed Latin squares.

    Args:
        n: Size, 3 to 16.
        count: How many.
        seed: Seed of the sequence; each size has its own.
        start: Place of the first in the sequence. Whole blocks of 256 are walked, so
            starts and counts that are multiples of 256 waste nothing.
        workers: Threads; the result does not depend on them. Default: one per core.

    Returns:
        uint8 [count, n, n] of ranks 0..n-1.
    """
    check_size(n)
    if count < 0 or start < 0:
        raise SettingsError(
            f"count and start must not be negative; got count={count}, start={start}; "
            "ask for a stretch of the sequence that begins at 0 or later."
        )
    key = stream_key(seed, "latin squares", n)
    first, last = start // BLOCK, -(-(start + count) // BLOCK)
    out = np.empty(((last - first) * BLOCK, n, n), dtype=np.uint8)

    def fill(block: int) -> None:
        begin = (block - first) * BLOCK
        need = min(BLOCK, start + count - block * BLOCK)
        _fill_block(key, block, out[begin : begin + need])

    with ThreadPoolExecutor(workers or os.cpu_count()) as threads:
        list(threads.map(fill, range(first, last)))
    skip = start - first * BLOCK
    return out[skip : skip + count]
