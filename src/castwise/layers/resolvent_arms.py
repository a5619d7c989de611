"""Arms: as many chains as fill a vector register, and what they remember.

An arm walks its chains site by site and keeps one record for each. Numbers come from
the rows of a batch in blocks, into columns that hold one site of every row, and go
back into rows by way of columns. An arm that walks to the left meets the last site
first. Couplings that all rows share are read where they lie; those of a row of its own
become a field of the records.

Lanes without a row of their own repeat the last one, and write the same numbers to the
same place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from castwise.layers.lanes import (
    WIDTH,
    load_one,
    num_lanes,
    part,
    prefetch,
    prefetch_to_write,
    splat,
    store,
    store_one,
)
from castwise.layers.resolvent_columns import (
    SQUARE,
    bring,
    bring_pairs,
    row_numbers,
    take,
    take_pairs,
    take_pairs_past,
    take_past,
)

Number = Any  # a scalar that stands for its format

# fields of a record; couplings of rows of their own come last
Q, Q_IM, M, M_IM = range(4)
# what an arm carries inward, and outward
X, Y, FLOW, FLOW_IM, LARGEST, Z, A_IM = range(7)
G, G_IM, U, U_IM, SQUARES = range(5)
NUM_CARRIED = 7
# columns of a site of a square: a real number, and the two parts of a complex one
REAL, PAIR = 0, 1
NUM_COLUMNS = 3
MOST_LANES = 16
BLOCK = 32  # sites whose columns stand in the first cache at once
AHEAD = 64  # sites that are asked of the memory at once, before they are wanted


class Job(NamedTuple):
    """What to solve; distances in bytes."""

    d: int
    """Diagonal `[B, N]`."""
    k: int
    """Couplings `[1 or B, N-1]`."""
    k_stride: int
    """From row to row; 0 where all rows share one."""
    shared: int | None
    """None where all rows share their couplings: a type, so that code knows it."""
    z: int
    """Shifts `[B]`, complex128."""
    z_stride: int
    """From row to row; 0 where all rows share one."""
    num_rows: int
    """B."""
    length: int
    """N."""
    tile: int
    """Sites of an arm that are remembered at once."""
    size: int
    """Of a number outside."""
    column: int
    """Of one number outside for each lane."""
    record: int
    """From site to site."""
    past: bool
    """Whether what is written in whole lines goes past the caches."""
    side: Number
    """0 for the causal form, else 1."""
    io: Number
    """A one in the format outside."""
    one: Number
    """A one in the format inside."""


class Arm(NamedTuple):
    """As many rows as fill a register, and how they are walked."""

    rows: tuple[int, ...]
    """Their numbers."""
    first: int
    """Site where the walk begins."""
    turn: int
    """1 to the right, -1 to the left."""
    idle: bool
    """Whether it only repeats another arm, and nobody wants its results."""
    past: bool
    """Whether what it writes goes past the caches; where lanes repeat a row, a line
    that was written past them would be waited for."""
    carried: int
    """Address of what it carries inward."""
    back: int
    """Address of what it carries outward."""
    total: int
    """Address of its sum of dL/da, in fp64."""
    nothing: int
    """Address of zeros."""
    square: int
    """Address of the columns of a square."""
    records: int
    """Address of what it remembers: a tile, and two records for the middle."""


HEAD = (
    2 * NUM_CARRIED * WIDTH
    + 16 * MOST_LANES  # total
    + WIDTH  # nothing
    + BLOCK * NUM_COLUMNS * WIDTH
)


@part
def arm(job: Job, row: int, turn: int, idle: bool, memory: int) -> Arm:
    """Take as many rows as there are lanes, and make ready what is carried."""
    rows = row_numbers(min(row, job.num_rows - 1), job.num_rows - 1, job.one)
    back = memory + NUM_CARRIED * WIDTH
    total = back + NUM_CARRIED * WIDTH
    nothing = total + 16 * MOST_LANES
    square = nothing + WIDTH
    for address in range(memory, square, WIDTH):
        store(address, splat(0.0), 1.0)
    for lane in range(num_lanes(job.one)):
        z = job.z + job.z_stride * rows[lane]
        here = memory + lane * (WIDTH // num_lanes(job.one))
        re, im = load_one(z, 1.0, job.one), -load_one(z + 8, 1.0, job.one)
        store_one(here + X * WIDTH, re, job.one)
        store_one(here + Y * WIDTH, im, job.one)
        store_one(here + Z * WIDTH, re, job.one)
        store_one(here + A_IM * WIDTH, im, job.one)
    return Arm(
        rows,
        0 if turn > 0 else job.length - 1,
        turn,
        idle,
        job.past and row + num_lanes(job.one) <= job.num_rows,
        memory,
        back,
        total,
        nothing,
        square,
        square + BLOCK * NUM_COLUMNS * WIDTH,
    )


@part
def lowest(walk: Arm, t: int) -> int:
    """Return the leftmost of the eight sites that an arm meets from step t on."""
    return walk.first + (t if walk.turn > 0 else -(t + SQUARE - 1))


@part
def rising(walk: Arm, at: int, step: int) -> tuple[int, int]:
    """Return where the column of the leftmost of eight sites is, and the way on."""
    if walk.turn > 0:
        return at, step
    return at + (SQUARE - 1) * step, -step


@part
def ask(
    job: Job, walk: Arm, base: int, stride: int, size: int, t: int, ahead: int
) -> None:
    """Ask for a share of what the rows have, of numbers of this size, `ahead` steps on.

    A share is that of an eighth of the rows; eight squares in a row ask for all. What
    is read is asked for twice as early: the last of them would come too late.
    """
    rows = num_lanes(job.one) // SQUARE
    for i in range(rows):
        lane = t // SQUARE % SQUARE * rows + i
        number = min(walk.rows[0] + lane, job.num_rows - 1)
        site = walk.first + walk.turn * ((t - t % AHEAD) + ahead)
        if walk.turn < 0:
            site -= AHEAD - 1
        at = base + number * stride + site * size
        for line in range(0, AHEAD * size, WIDTH):
            if ahead > 0:
                prefetch(at + line)
            else:
                prefetch_to_write(at + line)


@part
def fetch(
    job: Job, walk: Arm, base: int, stride: int, t: int, n: int, to: int, step: int
) -> None:
    """Copy up to eight real numbers of each row into columns."""
    rows, size, low = walk.rows, job.size, lowest(walk, t)
    if n == SQUARE:
        put, way = rising(walk, to, step)
        bring(base + low * size, rows, stride, put, way, job.io)
        return
    for i in range(n):
        at = base + (walk.first + walk.turn * (t + i)) * size
        for lane in range(num_lanes(job.one)):
            put = to + i * step + lane * size
            store_one(put, load_one(at + rows[lane] * stride, job.io, job.io), job.io)


@part
def fetch_pairs(job: Job, walk: Arm, base: int, t: int, n: int, to: int) -> None:
    """Copy up to eight complex numbers of each row into columns."""
    rows, size, step = walk.rows, 2 * job.size, NUM_COLUMNS * job.column
    stride = size * job.length
    if n == SQUARE:
        put, way = rising(walk, to, step)
        bring_pairs(base + lowest(walk, t) * size, rows, stride, put, way, job.io)
        return
    for i in range(n):
        at = base + (walk.first + walk.turn * (t + i)) * size
        for lane in range(num_lanes(job.one)):
            put, here = to + i * step + lane * job.size, at + rows[lane] * stride
            store_one(put, load_one(here, job.io, job.io), job.io)
            imag = load_one(here + job.size, job.io, job.io)
            store_one(put + job.column, imag, job.io)


@part
def deliver(job: Job, walk: Arm, base: int, t: int, n: int, at: int) -> None:
    """Copy up to eight real numbers into each row of a chain's length."""
    rows, size, step = walk.rows, job.size, NUM_COLUMNS * job.column
    stride = size * job.length
    if n == SQUARE:
        get, way = rising(walk, at, step)
        to = base + lowest(walk, t) * size
        if walk.past:
            take_past(to, rows, stride, get, way, job.io)
        else:
            take(to, rows, stride, get, way, job.io)
        return
    for i in range(n):
        to = base + (walk.first + walk.turn * (t + i)) * size
        for lane in range(num_lanes(job.one)):
            value = load_one(at + i * step + lane * size, job.io, job.io)
            store_one(to + rows[lane] * stride, value, job.io)


@part
def deliver_pairs(
    job: Job, walk: Arm, base: int, length: int, t: int, n: int, at: int, past: bool
) -> None:
    """Copy up to eight complex numbers into each row of this length."""
    rows, size, step = walk.rows, 2 * job.size, NUM_COLUMNS * job.column
    stride = size * length
    if n == SQUARE:
        get, way = rising(walk, at, step)
        to = base + lowest(walk, t) * size
        if past:
            take_pairs_past(to, rows, stride, get, way, job.io)
        else:
            take_pairs(to, rows, stride, get, way, job.io)
        return
    for i in range(n):
        to = base + (walk.first + walk.turn * (t + i)) * size
        for lane in range(num_lanes(job.one)):
            get, here = at + i * step + lane * job.size, to + rows[lane] * stride
            store_one(here, load_one(get, job.io, job.io), job.io)
            imag = load_one(get + job.column, job.io, job.io)
            store_one(here + job.size, imag, job.io)


@part
def couplings(job: Job, walk: Arm, t: int, at: int, linked: bool) -> tuple[int, int]:
    """Return where the coupling behind step t is, and the way to the next one."""
    if not linked:
        return walk.nothing, 0
    if job.shared is None:
        bond = t if walk.turn > 0 else walk.first - 1 - t
        return job.k + bond * job.size, walk.turn * job.size
    return walk.records + (at + 1) * job.record - WIDTH, job.record


@part
def bring_in(
    job: Job, walk: Arm, t: int, n: int, at: int, grad: int | None, linked: bool
) -> None:
    """Fetch what n sites of an arm need from step t on, and ask for more."""
    size, step = job.size, NUM_COLUMNS * job.column
    stride = size * job.length
    for i in range(0, n, SQUARE):
        s, m, to = t + i, min(SQUARE, n - i), walk.square + i * step
        ask(job, walk, job.d, stride, size, s, 2 * AHEAD)
        fetch(job, walk, job.d, stride, s, m, to, step)
        if grad is not None:
            ask(job, walk, grad, 2 * stride, 2 * size, s, 2 * AHEAD)
            fetch_pairs(job, walk, grad, s, m, to + PAIR * job.column)
        if linked and job.shared is not None:
            first = job.k if walk.turn > 0 else job.k - size
            to = walk.records + (at + i + 1) * job.record - WIDTH
            ask(job, walk, first, job.k_stride, size, s, 2 * AHEAD)
            fetch(job, walk, first, job.k_stride, s, m, to, job.record)


@part
def bring_out(job: Job, walk: Arm, t: int, n: int, out: int) -> None:
    """Deliver what n sites of an arm gave, and ask for where more will go."""
    if walk.idle:
        return
    size, step = job.size, NUM_COLUMNS * job.column
    for i in range(0, n, SQUARE):
        s, m, at = t + i, min(SQUARE, n - i), walk.square + i * step
        if not walk.past:
            ask(job, walk, out, 2 * size * job.length, 2 * size, s, -AHEAD)
        put = at + PAIR * job.column
        deliver_pairs(job, walk, out, job.length, s, m, put, walk.past)


@part
def bring_gradients_out(
    job: Job, walk: Arm, t: int, n: int, linked: bool, out: int, bond: int | None
) -> None:
    """Deliver the gradients of n sites, and ask for where more will go."""
    if walk.idle:
        return
    size, step = job.size, NUM_COLUMNS * job.column
    for i in range(0, n, SQUARE):
        s, m, at = t + i, min(SQUARE, n - i), walk.square + i * step
        if not walk.past:
            ask(job, walk, out, size * job.length, size, s, -AHEAD)
        deliver(job, walk, out, s, m, at + REAL * job.column)
        if bond is not None and linked:
            first = bond if walk.turn > 0 else bond - 2 * size
            length, at = job.length - 1, at + PAIR * job.column
            ask(job, walk, first, 2 * size * length, 2 * size, s, -AHEAD)
            deliver_pairs(job, walk, first, length, s, m, at, False)
