"""The resolvent of a real tridiagonal chain on the CPU, as a SIMD kernel (numba).

Two arms walk from the ends of a chain to its middle and back, eight rows at a time in
the lanes of vector registers. Each arm sees its chain begin where it begins, so one
code serves both; `k_t` couples its sites t and t + 1 (a_t = d_t - z):

    inward     u_t = a_t - k_(t-1) q_(t-1),    q_t = 1 / u_t
    middle     the pulls k q of both arms act on one site, which has G = q
    outward    G_t = q_t (1 + k_t q_t G_(t+1))

One division per site: neither a second chain of pivots nor 1 / (u + w - a) is needed,
and the way back is linear. With s the conjugate of the upstream gradient, its adjoint

    inward     h_t = s_t + k_(t-1) q_(t-1)^2 h_(t-1)
    outward    dL/da_t = k_t q_t^2 dL/da_(t+1) - q_t^2 h_t (1 + 2 k_t q_t G_(t+1))
               dL/dk_t = h_t q_t^2 G_(t+1) - q_t dL/da_(t+1)

goes the same two ways in the same two runs. Rounding is that of the two-sided form, as
long as no pivot is tiny; a row where some |q|^2 exceeds `GROWTH` times the mean |G|^2
is reported as broken, for a better tier to solve.

In the causal form nothing comes from the right (`side` is 0): an arm walks a whole
chain, and the second arm takes the next eight rows. Lanes without a row of their own
repeat the last one, and write the same numbers to the same place.

What an arm must remember stands in one record per site. Of a chain too long for the
second-level cache only a tile at a time is remembered, and walked once more on the way
back from what entered it.
"""

from __future__ import annotations

import functools
import threading
from typing import Any, NamedTuple

import numba
import numpy as np

from castwise.layers.lanes import (
    NUM_LANES,
    itemsize,
    larger,
    load,
    load_one,
    load_pairs,
    splat,
    store,
    store_one,
    store_pairs,
    transposed,
    widened,
)

Number = Any  # a scalar that stands for its format
Eight = Any  # lanes
Marks = Any  # one bool for each row

TILE = 2048  # sites of an arm that are remembered at once
BLOCK = 32  # sites that are fetched, walked and stored while the first cache holds them
GROWTH = 1e8  # |q|^2 above so many times the mean |G|^2 costs half of fp64's digits

# fields of a record, in units of eight lanes
Q, Q_IM, K, H, H_IM = range(5)  # before the walk Q holds d, and H the upstream gradient
# fields of what an arm carries inward, and outward
PULL, PULL_IM, FLOW, FLOW_IM, LARGEST, Z, A_IM = range(7)
G, G_IM, U, U_IM, SQUARES, SUM, SUM_IM = range(7)
NUM_CARRIED = 8


class Kernel(NamedTuple):
    """The two entry points, compiled; all arrays are contiguous, and addresses."""

    forward: Any
    """`forward(*inputs, bad, out)`: writes G `[B, N]` and marks broken rows."""

    backward: Any
    """`backward(*inputs, bad, grad, site, bond, point)`: writes Re dL/da `[B, N]`,
    dL/dk `[B, N-1]` unless its address is 0, and dL/dz `[B]` in fp64; all analytic."""


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


def lowest(walk: Arm, t: int) -> int:
    """Return the leftmost of the eight sites that an arm meets from step t on."""
    return walk.first + (t if walk.turn > 0 else -(t + NUM_LANES - 1))


def rising(job: Job, walk: Arm, at: int) -> tuple[int, int]:
    """Return where the leftmost of eight records lies, and the way to the next."""
    if walk.turn > 0:
        return at, job.record
    return at + (NUM_LANES - 1) * job.record, -job.record


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


def pivot(
    at: int, w: int, z: Eight, a_im: Eight, x: Eight, y: Eight, unit: Eight, one: Number
) -> tuple[Eight, Eight, Eight, Eight, Eight]:
    """Turn the d of a record into q; return the pull on the next site, |q|^2 and q."""
    re = (load(at, one, one) - z) - x
    im = a_im - y
    k = load(at + K * w, one, one)
    f = unit / (re * re + im * im)
    q, q_im = re * f, -(im * f)
    store(at, q, one)
    store(at + Q_IM * w, q_im, one)
    return (k * re) * f, -((k * im) * f), f, q, q_im


def flow(
    at: int,
    w: int,
    side: Eight,
    c: tuple[Eight, Eight, Eight, Eight, Eight],
    x: Eight,
    y: Eight,
    one: Number,
) -> tuple[Eight, Eight]:
    """Turn the upstream gradient of a record into h; return what flows on."""
    pull, pull_im, _, q, q_im = c
    re = x + load(at + H * w, one, one)
    im = y - load(at + H_IM * w, one, one)
    store(at + H * w, re, one)
    store(at + H_IM * w, im, one)
    f = side * (pull * q - pull_im * q_im)
    f_im = side * (pull * q_im + pull_im * q)
    return re * f - im * f_im, re * f_im + im * f


def inward(job: Job, p: int, r: int, n: int, left: Arm, right: Arm) -> None:
    """Walk n sites of both arms, whose records begin at p and r."""
    w, one = job.width, job.one
    unit = splat(one)
    a, b = left.carried, right.carried
    z, a_im = load(a + Z * w, one, one), load(a + A_IM * w, one, one)
    y, b_im = load(b + Z * w, one, one), load(b + A_IM * w, one, one)
    x0, x1 = load(a, one, one), load(a + PULL_IM * w, one, one)
    y0, y1 = load(b, one, one), load(b + PULL_IM * w, one, one)
    m0, m1 = load(a + LARGEST * w, one, one), load(b + LARGEST * w, one, one)
    for _ in range(n):
        x0, x1, f, _, _ = pivot(p, w, z, a_im, x0, x1, unit, one)
        y0, y1, g, _, _ = pivot(r, w, y, b_im, y0, y1, unit, one)
        m0, m1 = larger(f, m0), larger(g, m1)
        p += job.record
        r += job.record
    store(a, x0, one)
    store(a + PULL_IM * w, x1, one)
    store(b, y0, one)
    store(b + PULL_IM * w, y1, one)
    store(a + LARGEST * w, m0, one)
    store(b + LARGEST * w, m1, one)


def inward_with_source(job: Job, p: int, r: int, n: int, left: Arm, right: Arm) -> None:
    """Walk n sites of both arms, and carry the upstream gradient along."""
    w, one = job.width, job.one
    unit, side = splat(one), splat(job.side)
    a, b = left.carried, right.carried
    z, a_im = load(a + Z * w, one, one), load(a + A_IM * w, one, one)
    y, b_im = load(b + Z * w, one, one), load(b + A_IM * w, one, one)
    x0, x1 = load(a, one, one), load(a + PULL_IM * w, one, one)
    y0, y1 = load(b, one, one), load(b + PULL_IM * w, one, one)
    h0, h1 = load(a + FLOW * w, one, one), load(a + FLOW_IM * w, one, one)
    j0, j1 = load(b + FLOW * w, one, one), load(b + FLOW_IM * w, one, one)
    m0, m1 = load(a + LARGEST * w, one, one), load(b + LARGEST * w, one, one)
    for _ in range(n):
        c = pivot(p, w, z, a_im, x0, x1, unit, one)
        e = pivot(r, w, y, b_im, y0, y1, unit, one)
        h0, h1 = flow(p, w, side, c, h0, h1, one)
        j0, j1 = flow(r, w, side, e, j0, j1, one)
        x0, x1, y0, y1 = c[0], c[1], e[0], e[1]
        m0, m1 = larger(c[2], m0), larger(e[2], m1)
        p += job.record
        r += job.record
    store(a, x0, one)
    store(a + PULL_IM * w, x1, one)
    store(b, y0, one)
    store(b + PULL_IM * w, y1, one)
    store(a + FLOW * w, h0, one)
    store(a + FLOW_IM * w, h1, one)
    store(b + FLOW * w, j0, one)
    store(b + FLOW_IM * w, j1, one)
    store(a + LARGEST * w, m0, one)
    store(b + LARGEST * w, m1, one)


def answer(
    at: int, w: int, side: Eight, g: Eight, h: Eight, one: Number
) -> tuple[Eight, Eight, Eight, Eight]:
    """Return G of a site from that of the next, and side * k q G of the next."""
    q, q_im = load(at, one, one), load(at + Q_IM * w, one, one)
    k = side * load(at + K * w, one, one)
    x, y = k * (q * g - q_im * h), k * (q * h + q_im * g)
    return q + (q * x - q_im * y), q_im + (q * y + q_im * x), x, y


def outward(job: Job, p: int, r: int, n: int, left: Arm, right: Arm) -> None:
    """Walk back over n sites; q becomes G."""
    w, one = job.width, job.one
    side = splat(job.side)
    a, b = left.back, right.back
    g0, g1 = load(a, one, one), load(a + G_IM * w, one, one)
    h0, h1 = load(b, one, one), load(b + G_IM * w, one, one)
    m0, m1 = load(a + SQUARES * w, one, one), load(b + SQUARES * w, one, one)
    p += n * job.record
    r += n * job.record
    for _ in range(n):
        p -= job.record
        r -= job.record
        g0, g1, _, _ = answer(p, w, side, g0, g1, one)
        h0, h1, _, _ = answer(r, w, side, h0, h1, one)
        m0 = m0 + (g0 * g0 + g1 * g1)
        m1 = m1 + (h0 * h0 + h1 * h1)
        store(p, g0, one)
        store(p + Q_IM * w, g1, one)
        store(r, h0, one)
        store(r + Q_IM * w, h1, one)
    store(a, g0, one)
    store(a + G_IM * w, g1, one)
    store(b, h0, one)
    store(b + G_IM * w, h1, one)
    store(a + SQUARES * w, m0, one)
    store(b + SQUARES * w, m1, one)


def adjoint(
    at: int,
    w: int,
    side: Eight,
    g: Eight,
    g_im: Eight,
    u: Eight,
    u_im: Eight,
    one: Number,
) -> tuple[Eight, Eight, Eight, Eight]:
    """Turn q of a record into dL/da and h into dL/dk; return G and dL/da."""
    q, q_im = load(at, one, one), load(at + Q_IM * w, one, one)
    h, h_im = load(at + H * w, one, one), load(at + H_IM * w, one, one)
    k = load(at + K * w, one, one)
    out, out_im, x, y = answer(at, w, side, g, g_im, one)
    # j = q h (1 + 2 x) - k q u, the gradient by a is -q j
    s, s_im = q * h - q_im * h_im, q * h_im + q_im * h
    v, v_im = q * u - q_im * u_im, q * u_im + q_im * u
    x, y = (x + x) + splat(one), y + y
    j = (s * x - s_im * y) - k * v
    j_im = (s * y + s_im * x) - k * v_im
    by_a, by_a_im = q_im * j_im - q * j, -(q * j_im + q_im * j)
    # h q^2 G - q u
    t, t_im = q * g - q_im * g_im, q * g_im + q_im * g
    store(at, by_a, one)
    store(at + H * w, side * (s * t - s_im * t_im) - v, one)
    store(at + H_IM * w, side * (s * t_im + s_im * t) - v_im, one)
    return out, out_im, by_a, by_a_im


def outward_with_gradient(
    job: Job, p: int, r: int, n: int, left: Arm, right: Arm
) -> None:
    """Walk back over n sites of both arms; add dL/da to the totals."""
    w, one = job.width, job.one
    side = splat(job.side)
    a, b = left.back, right.back
    g0, g1 = load(a, one, one), load(a + G_IM * w, one, one)
    h0, h1 = load(b, one, one), load(b + G_IM * w, one, one)
    u0, u1 = load(a + U * w, one, one), load(a + U_IM * w, one, one)
    v0, v1 = load(b + U * w, one, one), load(b + U_IM * w, one, one)
    m0, m1 = load(a + SQUARES * w, one, one), load(b + SQUARES * w, one, one)
    s0 = s1 = t0 = t1 = splat(one - one)
    p += n * job.record
    r += n * job.record
    for _ in range(n):
        p -= job.record
        r -= job.record
        g0, g1, u0, u1 = adjoint(p, w, side, g0, g1, u0, u1, one)
        h0, h1, v0, v1 = adjoint(r, w, side, h0, h1, v0, v1, one)
        s0, s1, t0, t1 = s0 + u0, s1 + u1, t0 + v0, t1 + v1
        m0 = m0 + (g0 * g0 + g1 * g1)
        m1 = m1 + (h0 * h0 + h1 * h1)
    store(a, g0, one)
    store(a + G_IM * w, g1, one)
    store(b, h0, one)
    store(b + G_IM * w, h1, one)
    store(a + U * w, u0, one)
    store(a + U_IM * w, u1, one)
    store(b + U * w, v0, one)
    store(b + U_IM * w, v1, one)
    store(a + SQUARES * w, m0, one)
    store(b + SQUARES * w, m1, one)
    add_total(left.total, s0, s1)
    add_total(right.total, t0, t1)


def add_total(total: int, re: Eight, im: Eight) -> None:
    """Add to a sum in fp64, in which many sites lose nothing."""
    imag = total + 8 * NUM_LANES
    store(total, load(total, 1.0, 1.0) + widened(re), 1.0)
    store(imag, load(imag, 1.0, 1.0) + widened(im), 1.0)


def walk_in(
    job: Job, left: Arm, right: Arm, t: int, n: int, at: int, grad: int, linked: bool
) -> None:
    """Fetch and walk n sites of both arms from step t on; 0 is no gradient."""
    w = job.width
    for i in range(0, n, BLOCK):
        m = min(BLOCK, n - i)
        for walk in (left, right):
            to = walk.records + (at + i) * job.record
            fetch(job, walk, job.d, job.size * job.length, t + i, m, to)
            if linked:
                first = job.k if walk.turn > 0 else job.k - job.size
                fetch(job, walk, first, job.k_stride, t + i, m, to + K * w)
            else:
                store(to + K * w, splat(job.one - job.one), job.one)
            if grad:
                fetch_pairs(job, walk, grad, t + i, m, to + H * w)
        p = left.records + (at + i) * job.record
        r = right.records + (at + i) * job.record
        if grad:
            inward_with_source(job, p, r, m, left, right)
        else:
            inward(job, p, r, m, left, right)


def walk_out(
    job: Job,
    left: Arm,
    right: Arm,
    t: int,
    n: int,
    at: int,
    grad: int,
    linked: bool,
    out: int,
    bond: int,
) -> None:
    """Walk back over n sites of both arms, from step t + n - 1 to t, and deliver."""
    for back in range(-(-n // BLOCK)):
        i = (-(-n // BLOCK) - 1 - back) * BLOCK
        m = min(BLOCK, n - i)
        p = left.records + (at + i) * job.record
        r = right.records + (at + i) * job.record
        if grad:
            outward_with_gradient(job, p, r, m, left, right)
        else:
            outward(job, p, r, m, left, right)
        for walk in (left, right):
            if walk.idle:
                continue
            take = walk.records + (at + i) * job.record
            if not grad:
                deliver_pairs(job, walk, out, job.length, t + i, m, take)
                continue
            deliver(job, walk, out, t + i, m, take)
            if bond and linked:
                first = bond if walk.turn > 0 else bond - 2 * job.size
                take += H * job.width
                deliver_pairs(job, walk, first, job.length - 1, t + i, m, take)


def copy(job: Job, at: int, to: int) -> None:
    """Copy the four lanes that a walk carries from site to site."""
    for i in range(4):
        store(to + i * job.width, load(at + i * job.width, job.one, job.one), job.one)


def meet(job: Job, left: Arm, right: Arm) -> None:
    """Add what the right arm carries inward to what the left one does."""
    one = job.one
    for i in range(4):
        a, b = left.carried + i * job.width, right.carried + i * job.width
        store(a, load(a, one, one) + load(b, one, one), one)


def solve(
    job: Job,
    left: Arm,
    right: Arm,
    idle: Arm,
    borders: int,
    grad: int,
    out: int,
    bond: int,
) -> None:
    """Walk in, turn round, walk out."""
    joined = right.turn < 0
    num_steps = (job.length - 1) // 2 if joined else job.length - 1
    num_tiles = -(-num_steps // job.tile)
    border = 4 * job.width
    for i in range(num_tiles):
        t = i * job.tile
        copy(job, left.carried, borders + 2 * i * border)
        copy(job, right.carried, borders + (2 * i + 1) * border)
        walk_in(job, left, right, t, min(job.tile, num_steps - t), 0, grad, True)
    t, at = num_steps, job.tile
    if joined:
        lone = job.length - 1 - 2 * num_steps
        walk_in(job, left, idle, t, lone, at, grad, True)
        meet(job, left, right)
        walk_in(job, left, idle, t + lone, 1, at + lone, grad, False)
        walk_out(job, left, idle, t + lone, 1, at + lone, grad, False, out, bond)
        copy(job, left.back, right.back)
        walk_out(job, left, idle, t, lone, at, grad, True, out, bond)
    else:
        walk_in(job, left, right, t, 1, at, grad, False)
        walk_out(job, left, right, t, 1, at, grad, False, out, bond)
    for i in range(num_tiles - 1, -1, -1):
        t = i * job.tile
        n = min(job.tile, num_steps - t)
        if i < num_tiles - 1:
            copy(job, borders + 2 * i * border, left.carried)
            copy(job, borders + (2 * i + 1) * border, right.carried)
            walk_in(job, left, right, t, n, 0, grad, True)
        walk_out(job, left, right, t, n, 0, grad, True, out, bond)


def finish(job: Job, left: Arm, right: Arm, bad: Marks, point: int) -> None:
    """Mark broken rows; write dL/dz = -sum dL/da unless its address is 0."""
    joined = right.turn < 0
    one, w = job.one, job.width
    for lane in range(NUM_LANES):
        here = lane * (w // NUM_LANES)
        q0 = load_one(left.carried + LARGEST * w + here, one, one)
        q1 = load_one(right.carried + LARGEST * w + here, one, one)
        g0 = load_one(left.back + SQUARES * w + here, one, one)
        g1 = load_one(right.back + SQUARES * w + here, one, one)
        if joined:
            q0 = q1 = max(q0, q1)
            g0 = g1 = g0 + g1
        bad[left.rows[lane]] = not (q0 * job.length <= GROWTH * g0 < np.inf)
        bad[right.rows[lane]] = not (q1 * job.length <= GROWTH * g1 < np.inf)
        if not point:
            continue
        for part in range(2):
            here = 8 * (NUM_LANES * part + lane)
            x = load_one(left.total + here, 1.0, 1.0)
            y = load_one(right.total + here, 1.0, 1.0)
            if joined:
                x = y = x + y
            store_one(point + 16 * left.rows[lane] + 8 * part, -x, 1.0)
            store_one(point + 16 * right.rows[lane] + 8 * part, -y, 1.0)


def every_row(
    job: Job, memory: int, bad: Marks, grad: int, out: int, bond: int, point: int
) -> None:
    """Solve all rows, as many at a time as two arms take."""
    causal = job.side == 0
    held = (2 * job.width + 16) * NUM_CARRIED + (job.tile + 2) * job.record
    borders = memory + 3 * held
    for row in range(0, job.num_rows, 2 * NUM_LANES if causal else NUM_LANES):
        left = arm(job, row, 1, False, memory)
        if causal:
            right = arm(job, row + NUM_LANES, 1, False, memory + held)
        else:
            right = arm(job, row, -1, False, memory + held)
        idle = arm(job, row, 1, True, memory + 2 * held)
        solve(job, left, right, idle, borders, grad, out, bond)
        finish(job, left, right, bad, point)


def forward(
    d: int,
    k: int,
    k_stride: int,
    z: int,
    num_rows: int,
    length: int,
    tile: int,
    side: Number,
    io: Number,
    one: Number,
    memory: int,
    bad: Marks,
    out: int,
) -> None:
    """Write the diagonal, and mark rows that broke."""
    size, width = itemsize(io), NUM_LANES * itemsize(one)
    job = Job(
        d,
        k,
        k_stride,
        z,
        num_rows,
        length,
        tile,
        size,
        width,
        3 * width,
        side,
        io,
        one,
    )
    every_row(job, memory, bad, 0, out, 0, 0)


def backward(
    d: int,
    k: int,
    k_stride: int,
    z: int,
    num_rows: int,
    length: int,
    tile: int,
    side: Number,
    io: Number,
    one: Number,
    memory: int,
    bad: Marks,
    grad: int,
    site: int,
    bond: int,
    point: int,
) -> None:
    """Write the gradients; nothing of the forward is needed but its inputs."""
    size, width = itemsize(io), NUM_LANES * itemsize(one)
    job = Job(
        d,
        k,
        k_stride,
        z,
        num_rows,
        length,
        tile,
        size,
        width,
        5 * width,
        side,
        io,
        one,
    )
    every_row(job, memory, bad, grad, site, bond, point)


@functools.cache
def compiled() -> Kernel:
    """Compile on first use; machine code is kept in the package's cache folder.

    The parts are replaced in this module by their compiled form, so that the entry
    points, which find them by name, call machine code.
    """
    part = numba.njit(fastmath={"contract"}, error_model="numpy")
    rooms = globals()
    for function in (
        arm,
        lowest,
        rising,
        spread,
        collect,
        fetch,
        fetch_pairs,
        deliver,
        deliver_pairs,
        pivot,
        flow,
        inward,
        inward_with_source,
        answer,
        outward,
        adjoint,
        add_total,
        outward_with_gradient,
        walk_in,
        walk_out,
        copy,
        meet,
        solve,
        finish,
        every_row,
    ):
        rooms[function.__name__] = part(function)
    entry = numba.njit(
        fastmath={"contract"}, error_model="numpy", nogil=True, cache=True
    )
    return Kernel(entry(forward), entry(backward))


# one scratch per thread: mapping its pages anew would cost as much as a short chain;
# nothing in it outlives a call
_per_thread = threading.local()


def scratch(length: int, width: int) -> tuple[int, int]:
    """Return tile and address of memory for the longest records of this width."""
    tile = min(TILE, length)
    held = (2 * width + 16) * NUM_CARRIED + (tile + 2) * 5 * width
    needed = 3 * held + (length // tile + 1) * 8 * width + 64
    kept = getattr(_per_thread, "memory", None)
    if kept is None or kept.nbytes < needed:
        kept = _per_thread.memory = np.zeros(needed, dtype=np.uint8)
    return tile, (kept.ctypes.data + 63) // 64 * 64
