"""The recurrences of the resolvent, two arms at a time: one hides the other's latency.

`resolvent_kernel` says what is computed. The walk inward turns d into q and the
upstream gradient into h; the walk outward turns q into G, or into dL/da, and h into
dL/dk.
"""

from __future__ import annotations

from typing import Any

from castwise.layers.lanes import NUM_LANES, larger, load, part, splat, store, widened
from castwise.layers.resolvent_arms import (
    A_IM,
    FLOW,
    FLOW_IM,
    G_IM,
    H_IM,
    LARGEST,
    PULL_IM,
    Q_IM,
    SQUARES,
    U_IM,
    Arm,
    H,
    Job,
    K,
    Number,
    U,
    Z,
)

Eight = Any  # lanes


@part
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


@part
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


@part
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


@part
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


@part
def answer(
    at: int, w: int, side: Eight, g: Eight, h: Eight, one: Number
) -> tuple[Eight, Eight, Eight, Eight]:
    """Return G of a site from that of the next, and side * k q G of the next."""
    q, q_im = load(at, one, one), load(at + Q_IM * w, one, one)
    k = side * load(at + K * w, one, one)
    x, y = k * (q * g - q_im * h), k * (q * h + q_im * g)
    return q + (q * x - q_im * y), q_im + (q * y + q_im * x), x, y


@part
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


@part
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


@part
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


@part
def add_total(total: int, re: Eight, im: Eight) -> None:
    """Add to a sum in fp64, in which many sites lose nothing."""
    imag = total + 8 * NUM_LANES
    store(total, load(total, 1.0, 1.0) + widened(re), 1.0)
    store(imag, load(imag, 1.0, 1.0) + widened(im), 1.0)
