"""Narrowing what each cell of a puzzle may hold, to a fixed point.

Every cell keeps a bit set of possible ranks, its *domain*. Two kinds of reasoning
take turns until neither changes anything:

    lines    a rank placed in a row or column leaves its other cells; a rank that fits
             one cell of a line alone goes there
    cages    each cage lists the tuples of ranks that satisfy its clue, packed n bits a
             cell into one word; tuples that no longer fit are swapped behind the live
             ones (so going back is restoring a count), and the union of the live ones
             is what its cells may hold

A cage too large to be listed is checked by enumeration once few possibilities are
left, at the latest when every cell is decided; so nothing wrong is ever accepted.
"""

from __future__ import annotations

from collections import namedtuple
from typing import TYPE_CHECKING, Any

import numpy as np

from castwise.recipes.kenken.clues import (
    can_reach,
    extend,
    last_digits,
    rank_table,
    start_value,
)
from castwise.recipes.kenken.compiled import kernel, typed

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TABLE_ROOM = 1 << 18  # packed tuples of all cages of one puzzle
_LISTING_CAP = 1 << 20  # steps spent on listing one cage
_CHECKING_CAP = 1 << 12  # possibilities of an unlisted cage worth enumerating
_WORD = 64  # bits that a packed tuple has

# One puzzle and the memory to solve it in; a namedtuple, because numba reads those.
#   n               size
#   digits, ranks   int64 [n], [64]: digit of a rank, rank of a digit
#   cage_id         int64 [n*n]: cage of each cell
#   op, target      int64 [C]
#   cells, first    int64 [n*n], [C+1]: cells of cage c are cells[first[c]:first[c+1]]
#   table, begin    int64 [_TABLE_ROOM], [C]: packed tuples of cage c from begin[c]
#   live            int64 [depth, C]: tuples that still fit, -1 for an unlisted cage
#   domain          int64 [depth, n*n]: bit set of possible ranks
#   dirty, waiting  uint8 [C], int64 [2]: cages, and rows and columns, to look at
#   chosen, options, value   int64 [n*n+1]: the odometer of an enumeration
#   support         int64 [n*n]: ranks that an enumeration met
#   tried, left     int64 [n*n+1]: cell tried at each depth, ranks left to try
Workspace = namedtuple(  # noqa: PYI024 -- numba compiles collections.namedtuple alone
    "Workspace",
    "n digits ranks cage_id op target cells first table begin live domain dirty "
    "waiting chosen options value support tried left",
)


@kernel
def make_workspace(digits: NDArray[np.int64]) -> Any:
    """Allocate what one thread needs to solve puzzles of this alphabet."""
    n = digits.size
    area = n * n
    return Workspace(
        n,
        digits,
        rank_table(digits),
        np.zeros(area, np.int64),
        np.zeros(area, np.int64),
        np.zeros(area, np.int64),
        np.zeros(area, np.int64),
        np.zeros(area + 1, np.int64),
        np.empty(_TABLE_ROOM, np.int64),
        np.zeros(area, np.int64),
        np.zeros((area + 1, area), np.int64),
        np.zeros((area + 1, area), np.int64),
        np.zeros(area, np.uint8),
        np.zeros(2, np.int64),
        np.zeros(area + 1, np.int64),
        np.zeros(area + 1, np.int64),
        np.zeros(area + 1, np.int64),
        np.zeros(area, np.int64),
        np.zeros(area + 1, np.int64),
        np.zeros(area + 1, np.int64),
    )


@kernel
def rank_of_bit(bit: int) -> int:
    """Return the place of the only bit."""
    rank = 0
    while bit > 1:
        bit >>= 1
        rank += 1
    return rank


@kernel
def count_bits(bits: int) -> int:
    """Count the ones."""
    count = 0
    while bits:
        bits &= bits - 1
        count += 1
    return count


@kernel
def narrow(ws: Any, depth: int, cell: int, domain: int) -> None:
    """Give a cell a smaller domain and note what has to be looked at again."""
    ws.domain[depth, cell] = domain
    ws.waiting[0] |= 1 << (cell // ws.n)
    ws.waiting[1] |= 1 << (cell % ws.n)
    ws.dirty[ws.cage_id[cell]] = 1


@kernel
def _close_line(  # noqa: C901 -- two passes over one line, read together
    ws: Any, depth: int, start: int, step: int
) -> bool:
    """Place what must be placed in one row or column; False for a contradiction."""
    domain = ws.domain[depth]
    full = (1 << ws.n) - 1
    placed = once = twice = 0
    for i in range(ws.n):
        bits = domain[start + i * step]
        if bits & (bits - 1) == 0:
            if placed & bits:
                return False
            placed |= bits
        twice |= once & bits
        once |= bits
    if once != full:
        return False
    if placed == full:
        return True
    alone = once & ~twice & ~placed
    for i in range(ws.n):
        cell = start + i * step
        bits = domain[cell]
        if bits & (bits - 1) == 0:
            continue
        left = bits & ~placed
        if left & alone:
            left &= alone
            if left & (left - 1):
                return False
        if left == 0:
            return False
        if left != bits:
            narrow(ws, depth, cell, left)
    return True


@kernel
def close_lines(ws: Any, depth: int) -> bool:
    """Look at waiting rows and columns until none waits."""
    n, waiting = ws.n, ws.waiting
    while waiting[0] or waiting[1]:
        for axis in range(2):
            while waiting[axis]:
                bit = waiting[axis] & -waiting[axis]
                waiting[axis] ^= bit
                line = rank_of_bit(bit)
                start = line * n if axis == 0 else line
                if not _close_line(ws, depth, start, 1 if axis == 0 else n):
                    return False
    return True


@kernel
def _enumerate_cage(  # noqa: C901, PLR0912 -- one odometer, its state in locals
    ws: Any, depth: int, cage: int, begin: int, room: int
) -> int:
    """Meet every tuple of a cage that the domains allow.

    The ranks met go to `ws.support`; with room, the packed tuples to the table.

    Returns:
        The number of tuples, or -1 when there is no room or patience for them.
    """
    n, first = ws.n, ws.first[cage]
    size = ws.first[cage + 1] - first
    op, target, domain = ws.op[cage], ws.target[cage], ws.domain[depth]
    options, chosen, value = ws.options, ws.chosen, ws.value
    ws.support[:size] = 0
    count = steps = place = 0
    value[0] = start_value(op)
    options[0] = domain[ws.cells[first]]
    if size == 1:
        options[0] &= last_digits(op, value[0], target, ws.digits, ws.ranks)
    while place >= 0:
        if options[place] == 0:
            place -= 1
            continue
        bit = options[place] & -options[place]
        options[place] ^= bit
        chosen[place] = bit
        steps += 1
        if steps > _LISTING_CAP:
            return -1
        if place == size - 1:
            if room > 0:
                if count == room:
                    return -1
                packed = 0
                for i in range(size):
                    packed |= chosen[i] << (n * i)
                ws.table[begin + count] = packed
            for i in range(size):
                ws.support[i] |= chosen[i]
            count += 1
            continue
        digit = ws.digits[rank_of_bit(bit)]
        reached = extend(op, value[place], digit, target)
        if not can_reach(op, reached, target):
            continue
        place += 1
        value[place] = reached
        cell = ws.cells[first + place]
        allowed = domain[cell]
        for i in range(place):
            other = ws.cells[first + i]
            if other // n == cell // n or other % n == cell % n:
                allowed &= ~chosen[i]
        if place == size - 1:
            allowed &= last_digits(op, reached, target, ws.digits, ws.ranks)
        options[place] = allowed
    return count


@kernel
def list_cages(ws: Any, num_cages: int) -> bool:
    """List the tuples of every cage from the domains at depth 0."""
    root = begin = typed(0)
    for cage in range(num_cages):
        ws.begin[cage] = begin
        ws.live[0, cage] = -1
        ws.dirty[cage] = 1
        size = ws.first[cage + 1] - ws.first[cage]
        room = ws.table.size - begin
        if size * ws.n > _WORD or room == 0:
            continue
        count = _enumerate_cage(ws, root, cage, begin, room)
        if count == 0:
            return False
        ws.live[0, cage] = count
        if count > 0:
            begin += count
    return True


@kernel
def _revise_listed(ws: Any, depth: int, cage: int) -> bool:
    """Drop tuples that no longer fit, then ranks that no tuple holds."""
    n, first, table = ws.n, ws.first[cage], ws.table
    size = ws.first[cage + 1] - first
    packed = 0
    for i in range(size):
        packed |= ws.domain[depth, ws.cells[first + i]] << (n * i)
    forbidden = ~packed
    i = ws.begin[cage]
    end = i + ws.live[depth, cage]
    union = 0
    while i < end:
        entry = table[i]
        if entry & forbidden:
            end -= 1
            table[i] = table[end]
            table[end] = entry
        else:
            union |= entry
            i += 1
    ws.live[depth, cage] = end - ws.begin[cage]
    if union == 0:
        return False
    if union != packed:
        full = (1 << n) - 1
        for i in range(size):
            cell = ws.cells[first + i]
            bits = (union >> (n * i)) & full
            if bits != ws.domain[depth, cell]:
                narrow(ws, depth, cell, bits)
    return True


@kernel
def _revise_unlisted(ws: Any, depth: int, cage: int) -> bool:
    """Enumerate a large cage when few possibilities are left, else believe it."""
    first = ws.first[cage]
    size = ws.first[cage + 1] - first
    possibilities = 1
    for i in range(size):
        possibilities *= count_bits(ws.domain[depth, ws.cells[first + i]])
        if possibilities > _CHECKING_CAP:
            return True
    nowhere = typed(0)
    if _enumerate_cage(ws, depth, cage, nowhere, nowhere) == 0:
        return False
    for i in range(size):
        cell = ws.cells[first + i]
        if ws.support[i] != ws.domain[depth, cell]:
            narrow(ws, depth, cell, ws.support[i])
    return True


@kernel
def propagate(ws: Any, depth: int, num_cages: int) -> bool:
    """Propagate to the fixed point; False for a contradiction."""
    working = True
    while working:
        if not close_lines(ws, depth):
            return False
        working = False
        for cage in range(num_cages):
            if ws.dirty[cage] == 0:
                continue
            if ws.live[depth, cage] >= 0:
                fits = _revise_listed(ws, depth, cage)
            else:
                fits = _revise_unlisted(ws, depth, cage)
            if not fits:
                return False
            ws.dirty[cage] = 0  # its own narrowing leaves it consistent
            if ws.waiting[0] or ws.waiting[1]:
                working = True
                break
    return True


@kernel
def descend(ws: Any, depth: int, num_cages: int) -> None:
    """Start a depth from what the one above it knows.

    Loops copy here, because numba compiles array to array assignment slowly.
    """
    for cell in range(ws.n * ws.n):
        ws.domain[depth, cell] = ws.domain[depth - 1, cell]
    for cage in range(num_cages):
        ws.live[depth, cage] = ws.live[depth - 1, cage]
        ws.dirty[cage] = 0
    ws.waiting[0] = ws.waiting[1] = 0


@kernel
def load_cages(
    ws: Any,
    cage_id: NDArray[np.uint8],
    op: NDArray[np.uint8],
    target: NDArray[np.int32],
    num_cages: int,
) -> None:
    """Put the cages of a puzzle (cage_id [n, n], op and target [C]) into a workspace.

    With no cages at all, every cell belongs to cage 0, which nobody looks at.
    """
    area = ws.n * ws.n
    ws.first[: num_cages + 1] = 0
    for cell in range(area):
        cage = cage_id[cell // ws.n, cell % ws.n] if num_cages else 0
        ws.cage_id[cell] = cage
        if num_cages:
            ws.first[cage + 1] += 1
    for cage in range(num_cages):
        ws.first[cage + 1] += ws.first[cage]
        ws.op[cage] = op[cage]
        ws.target[cage] = target[cage]
    filled = ws.value  # scratch
    for cage in range(num_cages):
        filled[cage] = ws.first[cage]
    if num_cages:
        for cell in range(area):
            cage = ws.cage_id[cell]
            ws.cells[filled[cage]] = cell
            filled[cage] += 1
