"""The recurrences of the resolvent, two arms at a time: one hides the other's latency.

`resolvent_kernel` says what is computed. The walk inward turns d into q and the
upstream gradient into m = q h; the walk outward turns q into G, or q and m into dL/da
and dL/dk. What is carried inward is already shifted: x + i y is what a site adds d to,
so that a_t - k_(t-1) q_(t-1) takes one subtraction between two divisions. A record
keeps -Im q.
"""

from __future__ import annotations

from typing import Any

from castwise.layers.lanes import (
    WIDTH,
    add_wide,
    larger,
    load,
    load_one,
    num_lanes,
    part,
    splat,
    store,
)
from castwise.layers.resolvent_arms import (
    A_IM,
    BLOCK,
    FLOW,
    FLOW_IM,
    G_IM,
    LARGEST,
    M_IM,
    NUM_COLUMNS,
    PAIR,
    Q_IM,
    SQUARES,
    U_IM,
    Arm,
    Job,
    M,
    U,
    Y,
    Z,
    bring_gradients_out,
    bring_in,
    bring_out,
    couplings,
)

Lanes = Any


@part
def coupling(job: Job, at: int) -> Lanes:
    """Load k for every lane, from one number that all rows share, or one for each."""
    if job.shared is None:
        return splat(load_one(at, job.io, job.one))
    return load(at, job.io, job.one)


@part
def pivot(
    d: Lanes, k: Lanes, x: Lanes, y: Lanes, z: Lanes, a_im: Lanes, unit: Lanes
) -> tuple[Lanes, Lanes, Lanes, Lanes, Lanes]:
    """Return what the next site takes, then q, -Im q and |q|^2."""
    re = d - x
    f = unit / (re * re + y * y)
    return z + (k * re) * f, a_im + (k * y) * f, re * f, y * f, f


@part
def inward(
    job: Job,
    left: Arm,
    right: Arm,
    t: int,
    n: int,
    at: int,
    linked: bool,
) -> None:
    """Walk n sites of both arms from step t on, and remember them from record `at`."""
    w, one = WIDTH, job.one
    unit = splat(one)
    a, b = left.carried, right.carried
    z, a_im = load(a + Z * w, one, one), load(a + A_IM * w, one, one)
    v, b_im = load(b + Z * w, one, one), load(b + A_IM * w, one, one)
    x0, y0 = load(a, one, one), load(a + Y * w, one, one)
    x1, y1 = load(b, one, one), load(b + Y * w, one, one)
    m0, m1 = load(a + LARGEST * w, one, one), load(b + LARGEST * w, one, one)
    step = NUM_COLUMNS * job.column
    for i in range(0, n, BLOCK):
        m = min(BLOCK, n - i)
        bring_in(job, left, t + i, m, at + i, None, linked)
        bring_in(job, right, t + i, m, at + i, None, linked)
        p = left.records + (at + i) * job.record
        r = right.records + (at + i) * job.record
        k, along = couplings(job, left, t + i, at + i, linked)
        other, across = couplings(job, right, t + i, at + i, linked)
        d, e = left.square, right.square
        for _ in range(m):
            k0, k1 = coupling(job, k), coupling(job, other)
            x0, y0, q0, i0, f0 = pivot(load(d, job.io, one), k0, x0, y0, z, a_im, unit)
            x1, y1, q1, i1, f1 = pivot(load(e, job.io, one), k1, x1, y1, v, b_im, unit)
            store(p, q0, one)
            store(p + Q_IM * w, i0, one)
            store(r, q1, one)
            store(r + Q_IM * w, i1, one)
            m0, m1 = larger(f0, m0), larger(f1, m1)
            d += step
            e += step
            k += along
            other += across
            p += job.record
            r += job.record
    store(a, x0, one)
    store(a + Y * w, y0, one)
    store(b, x1, one)
    store(b + Y * w, y1, one)
    store(a + LARGEST * w, m0, one)
    store(b + LARGEST * w, m1, one)


@part
def flow(
    job: Job,
    source: int,
    at: int,
    k: Lanes,
    q: Lanes,
    p: Lanes,
    h: Lanes,
    h_im: Lanes,
) -> tuple[Lanes, Lanes]:
    """Add the upstream gradient to what flows in; keep m, return what flows on."""
    one = job.one
    h = h + load(source, job.io, one)
    h_im = h_im - load(source + job.column, job.io, one)
    m, m_im = q * h + p * h_im, q * h_im - p * h
    store(at + M * WIDTH, m, one)
    store(at + M_IM * WIDTH, m_im, one)
    e, o = k * q, k * p
    return e * m + o * m_im, e * m_im - o * m


@part
def inward_with_source(
    job: Job,
    left: Arm,
    right: Arm,
    t: int,
    n: int,
    at: int,
    linked: bool,
    grad: int,
) -> None:
    """Walk n sites of both arms, and carry the upstream gradient along."""
    w, one = WIDTH, job.one
    unit, side = splat(one), splat(job.side)
    a, b = left.carried, right.carried
    z, a_im = load(a + Z * w, one, one), load(a + A_IM * w, one, one)
    v, b_im = load(b + Z * w, one, one), load(b + A_IM * w, one, one)
    x0, y0 = load(a, one, one), load(a + Y * w, one, one)
    x1, y1 = load(b, one, one), load(b + Y * w, one, one)
    h0, j0 = load(a + FLOW * w, one, one), load(a + FLOW_IM * w, one, one)
    h1, j1 = load(b + FLOW * w, one, one), load(b + FLOW_IM * w, one, one)
    m0, m1 = load(a + LARGEST * w, one, one), load(b + LARGEST * w, one, one)
    step = NUM_COLUMNS * job.column
    first = PAIR * job.column
    for i in range(0, n, BLOCK):
        m = min(BLOCK, n - i)
        bring_in(job, left, t + i, m, at + i, grad, linked)
        bring_in(job, right, t + i, m, at + i, grad, linked)
        p = left.records + (at + i) * job.record
        r = right.records + (at + i) * job.record
        k, along = couplings(job, left, t + i, at + i, linked)
        other, across = couplings(job, right, t + i, at + i, linked)
        d, e = left.square, right.square
        for _ in range(m):
            k0, k1 = coupling(job, k), coupling(job, other)
            x0, y0, q0, i0, f0 = pivot(load(d, job.io, one), k0, x0, y0, z, a_im, unit)
            x1, y1, q1, i1, f1 = pivot(load(e, job.io, one), k1, x1, y1, v, b_im, unit)
            store(p, q0, one)
            store(p + Q_IM * w, i0, one)
            store(r, q1, one)
            store(r + Q_IM * w, i1, one)
            h0, j0 = flow(job, d + first, p, side * k0, q0, i0, h0, j0)
            h1, j1 = flow(job, e + first, r, side * k1, q1, i1, h1, j1)
            m0, m1 = larger(f0, m0), larger(f1, m1)
            d += step
            e += step
            k += along
            other += across
            p += job.record
            r += job.record
    store(a, x0, one)
    store(a + Y * w, y0, one)
    store(b, x1, one)
    store(b + Y * w, y1, one)
    store(a + FLOW * w, h0, one)
    store(a + FLOW_IM * w, j0, one)
    store(b + FLOW * w, h1, one)
    store(b + FLOW_IM * w, j1, one)
    store(a + LARGEST * w, m0, one)
    store(b + LARGEST * w, m1, one)


@part
def answer(k: Lanes, q: Lanes, p: Lanes, g: Lanes, h: Lanes) -> tuple[Lanes, Lanes]:
    """Return G of a site from that of the next, g + i h."""
    e, o = k * q, k * p
    r, s = e * q - o * p, (e + e) * p  # k q^2 = r - i s
    return (q + s * h) + r * g, (r * h - p) - s * g


@part
def outward(
    job: Job,
    left: Arm,
    right: Arm,
    t: int,
    n: int,
    at: int,
    linked: bool,
    out: int,
) -> None:
    """Walk back over n sites of both arms, and leave G in columns."""
    w, io, one = WIDTH, job.io, job.one
    side = splat(job.side)
    a, b = left.back, right.back
    g0, h0 = load(a, one, one), load(a + G_IM * w, one, one)
    g1, h1 = load(b, one, one), load(b + G_IM * w, one, one)
    m0, m1 = load(a + SQUARES * w, one, one), load(b + SQUARES * w, one, one)
    step = NUM_COLUMNS * job.column
    for i in range((n - 1) // BLOCK * BLOCK, -1, -BLOCK):
        m = min(BLOCK, n - i)
        p = left.records + (at + i + m) * job.record
        r = right.records + (at + i + m) * job.record
        k, along = couplings(job, left, t + i + m, at + i + m, linked)
        other, across = couplings(job, right, t + i + m, at + i + m, linked)
        d = left.square + PAIR * job.column + m * step
        e = right.square + PAIR * job.column + m * step
        for _ in range(m):
            d -= step
            e -= step
            k -= along
            other -= across
            p -= job.record
            r -= job.record
            k0, k1 = side * coupling(job, k), side * coupling(job, other)
            q0, i0 = load(p, one, one), load(p + Q_IM * w, one, one)
            q1, i1 = load(r, one, one), load(r + Q_IM * w, one, one)
            g0, h0 = answer(k0, q0, i0, g0, h0)
            g1, h1 = answer(k1, q1, i1, g1, h1)
            m0 = m0 + (g0 * g0 + h0 * h0)
            m1 = m1 + (g1 * g1 + h1 * h1)
            store(d, g0, io)
            store(d + job.column, h0, io)
            store(e, g1, io)
            store(e + job.column, h1, io)
        bring_out(job, left, t + i, m, out)
        bring_out(job, right, t + i, m, out)
    store(a, g0, one)
    store(a + G_IM * w, h0, one)
    store(b, g1, one)
    store(b + G_IM * w, h1, one)
    store(a + SQUARES * w, m0, one)
    store(b + SQUARES * w, m1, one)


@part
def adjoint(
    job: Job,
    at: int,
    to: int,
    k: Lanes,
    g: Lanes,
    h: Lanes,
    u: Lanes,
    v: Lanes,
    side: Lanes,
    bond: int | None,
) -> tuple[Lanes, Lanes, Lanes, Lanes]:
    """Leave dL/da, and dL/dk if wanted, in columns; return G and dL/da.

    G + y is q (1 + 2 k q G_(t+1)), where y = k q^2 G_(t+1) is what G takes from there.
    """
    w, io, one = WIDTH, job.io, job.one
    q, p = load(at, one, one), load(at + Q_IM * w, one, one)
    m, n = load(at + M * w, one, one), load(at + M_IM * w, one, one)
    e, o = k * q, k * p
    r, s = e * q - o * p, (e + e) * p
    y, y_im = side * (r * g + s * h), side * (r * h - s * g)
    out, out_im = q + y, y_im - p
    x, x_im = out + y, out_im + y_im
    by_a = (r * u + s * v) - (m * x - n * x_im)
    by_a_im = (r * v - s * u) - (m * x_im + n * x)
    store(to, by_a, io)
    if bond is not None:
        # m q G - q u
        t, t_im = side * (q * g + p * h), side * (q * h - p * g)
        store(to + job.column, (m * t - n * t_im) - (q * u + p * v), io)
        store(to + 2 * job.column, (m * t_im + n * t) - (q * v - p * u), io)
    return out, out_im, by_a, by_a_im


@part
def outward_with_gradient(
    job: Job,
    left: Arm,
    right: Arm,
    t: int,
    n: int,
    at: int,
    linked: bool,
    out: int,
    bond: int | None,
) -> None:
    """Walk back over n sites of both arms; add dL/da to the totals."""
    w, one = WIDTH, job.one
    side = splat(job.side)
    a, b = left.back, right.back
    g0, h0 = load(a, one, one), load(a + G_IM * w, one, one)
    g1, h1 = load(b, one, one), load(b + G_IM * w, one, one)
    u0, v0 = load(a + U * w, one, one), load(a + U_IM * w, one, one)
    u1, v1 = load(b + U * w, one, one), load(b + U_IM * w, one, one)
    m0, m1 = load(a + SQUARES * w, one, one), load(b + SQUARES * w, one, one)
    s0 = t0 = s1 = t1 = splat(one - one)
    step = NUM_COLUMNS * job.column
    for i in range((n - 1) // BLOCK * BLOCK, -1, -BLOCK):
        m = min(BLOCK, n - i)
        p = left.records + (at + i + m) * job.record
        r = right.records + (at + i + m) * job.record
        k, along = couplings(job, left, t + i + m, at + i + m, linked)
        other, across = couplings(job, right, t + i + m, at + i + m, linked)
        d = left.square + m * step
        e = right.square + m * step
        for _ in range(m):
            d -= step
            e -= step
            k -= along
            other -= across
            p -= job.record
            r -= job.record
            k0, k1 = coupling(job, k), coupling(job, other)
            g0, h0, u0, v0 = adjoint(job, p, d, k0, g0, h0, u0, v0, side, bond)
            g1, h1, u1, v1 = adjoint(job, r, e, k1, g1, h1, u1, v1, side, bond)
            s0, t0, s1, t1 = s0 + u0, t0 + v0, s1 + u1, t1 + v1
            m0 = m0 + (g0 * g0 + h0 * h0)
            m1 = m1 + (g1 * g1 + h1 * h1)
        bring_gradients_out(job, left, t + i, m, linked, out, bond)
        bring_gradients_out(job, right, t + i, m, linked, out, bond)
    store(a, g0, one)
    store(a + G_IM * w, h0, one)
    store(b, g1, one)
    store(b + G_IM * w, h1, one)
    store(a + U * w, u0, one)
    store(a + U_IM * w, v0, one)
    store(b + U * w, u1, one)
    store(b + U_IM * w, v1, one)
    store(a + SQUARES * w, m0, one)
    store(b + SQUARES * w, m1, one)
    half = 8 * num_lanes(one)  # sums of many sites lose nothing in fp64
    add_wide(left.total, s0)
    add_wide(left.total + half, t0)
    add_wide(right.total, s1)
    add_wide(right.total + half, t1)
