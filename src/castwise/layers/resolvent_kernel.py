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
caches only a tile at a time is remembered, and walked once more on the way back from
what entered it.
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
    load,
    load_one,
    part,
    splat,
    store,
    store_one,
)
from castwise.layers.resolvent_arms import (
    LARGEST,
    NUM_CARRIED,
    SQUARES,
    Arm,
    H,
    Job,
    K,
    Number,
    arm,
    deliver,
    deliver_pairs,
    fetch,
    fetch_pairs,
)
from castwise.layers.resolvent_walk import (
    inward,
    inward_with_source,
    outward,
    outward_with_gradient,
)

Marks = Any  # one bool for each row

WHOLE = 8192  # sites of a chain that is remembered as a whole
TILE = 1024  # sites of an arm that are remembered at once, of a longer chain
BLOCK = 32  # sites that are fetched, walked and stored while the first cache holds them
GROWTH = 1e8  # |q|^2 above so many times the mean |G|^2 costs half of fp64's digits


class Kernel(NamedTuple):
    """The two entry points, compiled; all arrays are contiguous, and addresses."""

    forward: Any
    """`forward(*inputs, bad, out)`: writes G `[B, N]` and marks broken rows."""

    backward: Any
    """`backward(*inputs, bad, grad, site, bond, point)`: writes Re dL/da `[B, N]`,
    dL/dk `[B, N-1]` unless its address is 0, and dL/dz `[B]` in fp64; all analytic."""


@part
def walk_in(
    job: Job,
    left: Arm,
    right: Arm,
    t: int,
    n: int,
    at: int,
    grad: int | None,
    linked: bool,
) -> None:
    """Fetch and walk n sites of both arms from step t on; None is no gradient."""
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
            if grad is not None:
                fetch_pairs(job, walk, grad, t + i, m, to + H * w)
        p = left.records + (at + i) * job.record
        r = right.records + (at + i) * job.record
        if grad is None:
            inward(job, p, r, m, left, right)
        else:
            inward_with_source(job, p, r, m, left, right)


@part
def walk_out(
    job: Job,
    left: Arm,
    right: Arm,
    t: int,
    n: int,
    at: int,
    grad: int | None,
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
        if grad is None:
            outward(job, p, r, m, left, right)
        else:
            outward_with_gradient(job, p, r, m, left, right)
        for walk in (left, right):
            if walk.idle:
                continue
            take = walk.records + (at + i) * job.record
            if grad is None:
                deliver_pairs(job, walk, out, job.length, t + i, m, take)
                continue
            deliver(job, walk, out, t + i, m, take)
            if bond and linked:
                first = bond if walk.turn > 0 else bond - 2 * job.size
                take += H * job.width
                deliver_pairs(job, walk, first, job.length - 1, t + i, m, take)


@part
def copy(job: Job, at: int, to: int) -> None:
    """Copy the four lanes that a walk carries from site to site."""
    for i in range(4):
        store(to + i * job.width, load(at + i * job.width, job.one, job.one), job.one)


@part
def meet(job: Job, left: Arm, right: Arm) -> None:
    """Add what the right arm carries inward to what the left one does."""
    one = job.one
    for i in range(4):
        a, b = left.carried + i * job.width, right.carried + i * job.width
        store(a, load(a, one, one) + load(b, one, one), one)


@part
def solve(
    job: Job,
    left: Arm,
    right: Arm,
    idle: Arm,
    borders: int,
    grad: int | None,
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


@part
def finish(job: Job, left: Arm, right: Arm, bad: Marks, point: int | None) -> None:
    """Mark broken rows; write dL/dz = -sum dL/da where wanted."""
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
        if point is None:
            continue
        for half in range(2):
            here = 8 * (NUM_LANES * half + lane)
            x = load_one(left.total + here, 1.0, 1.0)
            y = load_one(right.total + here, 1.0, 1.0)
            if joined:
                x = y = x + y
            store_one(point + 16 * left.rows[lane] + 8 * half, -x, 1.0)
            store_one(point + 16 * right.rows[lane] + 8 * half, -y, 1.0)


@part
def every_row(
    job: Job,
    memory: int,
    bad: Marks,
    grad: int | None,
    out: int,
    bond: int,
    point: int | None,
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
    every_row(job, memory, bad, None, out, 0, None)


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
    """Compile on first use; machine code is kept in the package's cache folder."""
    entry = numba.njit(
        fastmath={"contract"}, error_model="numpy", nogil=True, cache=True
    )
    return Kernel(entry(forward), entry(backward))


# one scratch per thread: mapping its pages anew would cost as much as a short chain;
# nothing in it outlives a call
_per_thread = threading.local()


def scratch(length: int, itemsize: int) -> tuple[int, int]:
    """Return tile, and address of memory for the longest records in this format."""
    tile = length if length <= WHOLE else TILE
    width = NUM_LANES * itemsize
    held = (2 * width + 16) * NUM_CARRIED + (tile + 2) * 5 * width
    needed = 3 * held + (length // tile + 1) * 8 * width + 64
    size, address, _ = getattr(_per_thread, "memory", (0, 0, None))
    if size < needed:
        kept = np.zeros(needed, dtype=np.uint8)
        address = (kept.ctypes.data + 63) // 64 * 64
        _per_thread.memory = needed, address, kept
    return tile, address
