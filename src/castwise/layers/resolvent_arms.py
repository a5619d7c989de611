"""Arms: eight chains in the lanes of vector registers, and what they remember.

An arm walks its chains site by site and keeps one record for each. `fetch` brings
numbers from the rows of a batch into a field of the records, `deliver` takes them back;
both turn eight by eight numbers round at a time. An arm that walks to the left meets
the last site first.

Lanes without a row of their own repeat the last one, and write the same numbers to the
same place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from castwise.layers.lanes import (
    NUM_LANES,
    load,
    load_one,
    load_pairs,
    part,
    splat,
    store,
    store_one,
    store_pairs,
    transposed,
)

Number = Any  # a scalar that stands for its format

# fields of a record, in units of eight lanes
Q, Q_IM, K, H, H_IM = range(5)  # before the walk Q holds d, and H the upstream gradient
# fields of what an arm carries inward, and outward
PULL, PULL_IM, FLOW, FLOW_IM, LARGEST, Z, A_IM = range(7)
G, G_IM, U, U_IM, SQUARES = range(5)
NUM_CARRIED = 7


class Job(NamedTuple):
    """What to solve; distances in bytes."""

    d: int
    """Diagonal `[B, N]`."""
    k: int
    """Couplings `[1 or B, N-1]`."""
    k_stride: int
    """From row to row; 0 where all rows share one."""
    z: int
    """Shifts `[B]`, complex128."""
    num_rows: int
    """B."""
    length: int
    """N."""
    tile: int
    """Sites of an arm that are remembered at once."""
    size: int
    """Of a number outside."""
    width: int
    """Of eight lanes inside."""
    record: int
    """From site to site."""
    side: Number
    """0 for the causal form, else 1."""
    io: Number
    """A one in the format outside."""
    one: Number
    """A one in the format inside."""


class Arm(NamedTuple):
    """Eight rows, and how they are walked."""

    rows: tuple[int, ...]
    """Their numbers."""
    first: int
    """Site where the walk begins."""
    turn: int
    """1 to the right, -1 to the left."""
    idle: bool
    """Whether it only repeats another arm, and nobody wants its results."""
    records: int
    """Address of what it remembers: a tile, and two records for the middle."""
    carried: int
    """Address of what it carries inward."""
    back: int
    """Address of what it carries outward."""
    total: int
    """Address of its sum of dL/da, in fp64."""


@part
def arm(job: Job, row: int, turn: int, idle: bool, memory: int) -> Arm:
    """Take eight rows, and make ready what is carried."""
    last = job.num_rows - 1
    rows = (
        min(row, last),
        min(row + 1, last),
        min(row + 2, last),
        min(row + 3, last),
        min(row + 4, last),
        min(row + 5, last),
        min(row + 6, last),
        min(row + 7, last),
    )
    w = job.width
    back = memory + NUM_CARRIED * w
    total = back + NUM_CARRIED * w
    nothing = splat(job.one - job.one)
    for i in range(2 * NUM_CARRIED):
        store(memory + i * w, nothing, job.one)
    store(total, splat(0.0), 1.0)
    store(total + 8 * NUM_LANES, splat(0.0), 1.0)
    for lane in range(NUM_LANES):
        z = job.z + 16 * rows[lane]
        here = memory + lane * (w // NUM_LANES)
        store_one(here + Z * w, load_one(z, 1.0, job.one), job.one)
        store_one(here + A_IM * w, -load_one(z + 8, 1.0, job.one), job.one)
    first = 0 if turn > 0 else job.length - 1
    records = total + 16 * NUM_LANES
    return Arm(rows, first, turn, idle, records, memory, back, total)


@part
def lowest(walk: Arm, t: int) -> int:
    """Return the leftmost of the eight sites that an arm meets from step t on."""
    return walk.first + (t if walk.turn > 0 else -(t + NUM_LANES - 1))


@part
def rising(job: Job, walk: Arm, at: int) -> tuple[int, int]:
    """Return where the leftmost of eight records lies, and the way to the next."""
    if walk.turn > 0:
        return at, job.record
    return at + (NUM_LANES - 1) * job.record, -job.record


@part
def spread(columns: Any, to: int, step: int, one: Number) -> None:
    """Store eight lanes at equal distances."""
    store(to, columns[0], one)
    store(to + step, columns[1], one)
    store(to + 2 * step, columns[2], one)
    store(to + 3 * step, columns[3], one)
    store(to + 4 * step, columns[4], one)
    store(to + 5 * step, columns[5], one)
    store(to + 6 * step, columns[6], one)
    store(to + 7 * step, columns[7], one)


@part
def collect(at: int, step: int, one: Number) -> Any:
    """Load eight lanes from equal distances, and turn them round."""
    return transposed(
        (
            load(at, one, one),
            load(at + step, one, one),
            load(at + 2 * step, one, one),
            load(at + 3 * step, one, one),
            load(at + 4 * step, one, one),
            load(at + 5 * step, one, one),
            load(at + 6 * step, one, one),
            load(at + 7 * step, one, one),
        )
    )


@part
def fetch(job: Job, walk: Arm, base: int, stride: int, t: int, n: int, to: int) -> None:
    """Copy n real numbers a row into a field of the records."""
    rows, one, io = walk.rows, job.one, job.io
    whole = n - n % NUM_LANES
    for i in range(0, whole, NUM_LANES):
        at = base + lowest(walk, t + i) * job.size
        columns = transposed(
            (
                load(at + rows[0] * stride, io, one),
                load(at + rows[1] * stride, io, one),
                load(at + rows[2] * stride, io, one),
                load(at + rows[3] * stride, io, one),
                load(at + rows[4] * stride, io, one),
                load(at + rows[5] * stride, io, one),
                load(at + rows[6] * stride, io, one),
                load(at + rows[7] * stride, io, one),
            )
        )
        put, step = rising(job, walk, to + i * job.record)
        spread(columns, put, step, one)
    for i in range(whole, n):
        at = base + (walk.first + walk.turn * (t + i)) * job.size
        for lane in range(NUM_LANES):
            value = load_one(at + rows[lane] * stride, io, one)
            put = to + i * job.record + lane * (job.width // NUM_LANES)
            store_one(put, value, one)


@part
def fetch_pairs(job: Job, walk: Arm, base: int, t: int, n: int, to: int) -> None:
    """Copy n complex numbers a row into two fields of the records."""
    rows, one, io = walk.rows, job.one, job.io
    size, stride = 2 * job.size, 2 * job.size * job.length
    whole = n - n % NUM_LANES
    for i in range(0, whole, NUM_LANES):
        at = base + lowest(walk, t + i) * size
        a = load_pairs(at + rows[0] * stride, io, one)
        b = load_pairs(at + rows[1] * stride, io, one)
        c = load_pairs(at + rows[2] * stride, io, one)
        d = load_pairs(at + rows[3] * stride, io, one)
        e = load_pairs(at + rows[4] * stride, io, one)
        f = load_pairs(at + rows[5] * stride, io, one)
        g = load_pairs(at + rows[6] * stride, io, one)
        h = load_pairs(at + rows[7] * stride, io, one)
        real = transposed((a[0], b[0], c[0], d[0], e[0], f[0], g[0], h[0]))
        imag = transposed((a[1], b[1], c[1], d[1], e[1], f[1], g[1], h[1]))
        put, step = rising(job, walk, to + i * job.record)
        spread(real, put, step, one)
        spread(imag, put + job.width, step, one)
    for i in range(whole, n):
        at = base + (walk.first + walk.turn * (t + i)) * size
        for lane in range(NUM_LANES):
            here = at + rows[lane] * stride
            put = to + i * job.record + lane * (job.width // NUM_LANES)
            store_one(put, load_one(here, io, one), one)
            store_one(put + job.width, load_one(here + job.size, io, one), one)


@part
def deliver(job: Job, walk: Arm, base: int, t: int, n: int, at: int) -> None:
    """Copy a field of n records out, as real numbers of rows of a chain's length."""
    rows, one, io, stride = walk.rows, job.one, job.io, job.size * job.length
    whole = n - n % NUM_LANES
    for i in range(0, whole, NUM_LANES):
        take, step = rising(job, walk, at + i * job.record)
        columns = collect(take, step, one)
        to = base + lowest(walk, t + i) * job.size
        store(to + rows[0] * stride, columns[0], io)
        store(to + rows[1] * stride, columns[1], io)
        store(to + rows[2] * stride, columns[2], io)
        store(to + rows[3] * stride, columns[3], io)
        store(to + rows[4] * stride, columns[4], io)
        store(to + rows[5] * stride, columns[5], io)
        store(to + rows[6] * stride, columns[6], io)
        store(to + rows[7] * stride, columns[7], io)
    for i in range(whole, n):
        to = base + (walk.first + walk.turn * (t + i)) * job.size
        for lane in range(NUM_LANES):
            take = at + i * job.record + lane * (job.width // NUM_LANES)
            store_one(to + rows[lane] * stride, load_one(take, one, one), io)


@part
def deliver_pairs(
    job: Job, walk: Arm, base: int, length: int, t: int, n: int, at: int
) -> None:
    """Copy two fields of n records out, as complex numbers of rows of this length."""
    rows, one, io = walk.rows, job.one, job.io
    size, stride = 2 * job.size, 2 * job.size * length
    whole = n - n % NUM_LANES
    for i in range(0, whole, NUM_LANES):
        take, step = rising(job, walk, at + i * job.record)
        re, im = collect(take, step, one), collect(take + job.width, step, one)
        to = base + lowest(walk, t + i) * size
        store_pairs(to + rows[0] * stride, re[0], im[0], io)
        store_pairs(to + rows[1] * stride, re[1], im[1], io)
        store_pairs(to + rows[2] * stride, re[2], im[2], io)
        store_pairs(to + rows[3] * stride, re[3], im[3], io)
        store_pairs(to + rows[4] * stride, re[4], im[4], io)
        store_pairs(to + rows[5] * stride, re[5], im[5], io)
        store_pairs(to + rows[6] * stride, re[6], im[6], io)
        store_pairs(to + rows[7] * stride, re[7], im[7], io)
    for i in range(whole, n):
        to = base + (walk.first + walk.turn * (t + i)) * size
        for lane in range(NUM_LANES):
            here = to + rows[lane] * stride
            take = at + i * job.record + lane * (job.width // NUM_LANES)
            store_one(here, load_one(take, one, one), io)
            store_one(here + job.size, load_one(take + job.width, one, one), io)
