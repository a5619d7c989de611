"""The resolvent of a real tridiagonal chain on the CPU, as a SIMD kernel (numba).

Two arms walk from the ends of a chain to its middle and back, as many rows at a time as
a vector register has lanes. Each arm sees its chain begin where it begins, so one
code serves both; `k_t` couples its sites t and t + 1 (a_t = d_t - z):

    inward     u_t = a_t - k_(t-1) q_(t-1),    q_t = 1 / u_t
    middle     the pulls k q of both arms act on one site, which has G = q
    outward    G_t = q_t (1 + k_t q_t G_(t+1))

One division per site: neither a second chain of pivots nor 1 / (u + w - a) is needed,
and the way back is linear. With s the conjugate of the upstream gradient, its adjoint

    inward     h_t = s_t + k_(t-1) q_(t-1) m_(t-1),    m_t = q_t h_t
    outward    dL/da_t = k_t q_t^2 dL/da_(t+1) - q_t m_t (1 + 2 k_t q_t G_(t+1))
               dL/dk_t = m_t q_t G_(t+1) - q_t dL/da_(t+1)

goes the same two ways in the same two runs. Rounding is that of the two-sided form, as
long as no pivot is tiny; a row where some |q|^2 exceeds `GROWTH` times the mean |G|^2
is reported as broken, for a better tier to solve.

In the causal form nothing comes from the right (`side` is 0): an arm walks a whole
chain, and the second arm takes the next rows. Lanes without a row of their own
repeat the last one, and write the same numbers to the same place.

What an arm must remember stands in one record per site. Of a chain too long for the
caches only a tile at a time is remembered, and walked once more on the way back from
what entered it.

Threads take the rows of a batch a register full at a time, each with records of its
own; no row knows who took it, so that their number changes no bit. What they are called
with is the address of one table of integers, which says all that is no type.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types

from castwise.layers import (
    lanes,
    resolvent_arms,
    resolvent_columns,
    resolvent_task,
    resolvent_walk,
)
from castwise.layers.lanes import (
    WIDTH,
    count_up,
    load,
    load_one,
    num_lanes,
    part,
    store,
    store_one,
)
from castwise.layers.resolvent_arms import (
    A_IM,
    FLOW,
    FLOW_IM,
    HEAD,
    LARGEST,
    SQUARES,
    Arm,
    Job,
    Number,
    X,
    Y,
    Z,
    arm,
)
from castwise.layers.resolvent_columns import SQUARE
from castwise.layers.resolvent_task import (
    AT_BAD,
    AT_BOND,
    AT_BROKEN,
    AT_GRAD,
    AT_HELD,
    AT_MEMORY,
    AT_OUT,
    AT_POINT,
    AT_TAKEN,
    AT_THREADS,
    Kind,
    entry,
    job_of,
)
from castwise.layers.resolvent_walk import (
    inward,
    inward_with_source,
    outward,
    outward_with_gradient,
)

WHOLE = 1 << 24  # bytes of records up to which a chain is remembered as a whole
TILE = 1024  # sites of an arm that are remembered at once, of a longer chain
SPARE = 2 + SQUARE  # records for the middle, and what a square has beyond its end
GROWTH = 1e8  # |q|^2 above so many times the mean |G|^2 costs half of fp64's digits


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
    """Walk n sites of both arms from step t on; None is no gradient."""
    if grad is None:
        inward(job, left, right, t, n, at, linked)
    else:
        inward_with_source(job, left, right, t, n, at, linked, grad)


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
    bond: int | None,
) -> None:
    """Walk back over n sites of both arms, from step t + n - 1 to t."""
    if grad is None:
        outward(job, left, right, t, n, at, linked, out)
    else:
        outward_with_gradient(job, left, right, t, n, at, linked, out, bond)


@part
def copy(job: Job, at: int, to: int) -> None:
    """Copy the four lanes that a walk carries from site to site."""
    for i in range(0, 4 * WIDTH, WIDTH):
        store(to + i, load(at + i, job.one, job.one), job.one)


@part
def meet(job: Job, left: Arm, right: Arm) -> None:
    """Add what the right arm carries inward to what the left one does."""
    one, a, b = job.one, left.carried, right.carried
    for field in (FLOW, FLOW_IM):
        here = field * WIDTH
        store(a + here, load(a + here, one, one) + load(b + here, one, one), one)
    for field, shift in ((X, Z), (Y, A_IM)):  # both are shifted, their sum is once
        here = field * WIDTH
        more = load(b + here, one, one) - load(b + shift * WIDTH, one, one)
        store(a + here, load(a + here, one, one) + more, one)


@part
def solve(
    job: Job,
    left: Arm,
    right: Arm,
    idle: Arm,
    borders: int,
    grad: int | None,
    out: int,
    bond: int | None,
) -> None:
    """Walk in, turn round, walk out."""
    joined = right.turn < 0
    num_steps = (job.length - 1) // 2 if joined else job.length - 1
    num_tiles = -(-num_steps // job.tile)
    border = 4 * WIDTH
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
def finish(job: Job, left: Arm, right: Arm, bad: int, point: int | None) -> bool:
    """Mark broken rows, and say if there are any; write dL/dz = -sum dL/da."""
    joined = right.turn < 0
    one, count = job.one, num_lanes(job.one)
    broken = False
    for lane in range(count):
        here = lane * (WIDTH // count)
        q0 = load_one(left.carried + LARGEST * WIDTH + here, one, one)
        q1 = load_one(right.carried + LARGEST * WIDTH + here, one, one)
        g0 = load_one(left.back + SQUARES * WIDTH + here, one, one)
        g1 = load_one(right.back + SQUARES * WIDTH + here, one, one)
        if joined:
            q0 = q1 = max(q0, q1)
            g0 = g1 = g0 + g1
        row, other = left.rows[lane], right.rows[lane]
        lost = not (q0 * job.length <= GROWTH * g0 < np.inf)
        gone = not (q1 * job.length <= GROWTH * g1 < np.inf)
        store_one(bad + 8 * row, 1 if lost else 0, 0)
        store_one(bad + 8 * other, 1 if gone else 0, 0)
        broken |= lost or gone
        if point is None:
            continue
        for half in range(2):
            here = 8 * (count * half + lane)
            x = load_one(left.total + here, 1.0, 1.0)
            y = load_one(right.total + here, 1.0, 1.0)
            if joined:
                x = y = x + y
            store_one(point + 16 * row + 8 * half, -x, 1.0)
            store_one(point + 16 * other + 8 * half, -y, 1.0)
    return broken


@part
def every_row(
    job: Job,
    table: int,
    grad: int | None,
    bond: int | None,
    point: int | None,
) -> None:
    """Solve rows until none is left, as many at a time as two arms take."""
    causal = job.side == 0
    count = num_lanes(job.one)
    together = 2 * count if causal else count
    held = HEAD + (job.tile + SPARE) * job.record
    memory = entry(table, AT_MEMORY) + count_up(table + 8 * AT_THREADS) * entry(
        table, AT_HELD
    )
    bad, out = entry(table, AT_BAD), entry(table, AT_OUT)
    row = together * count_up(table + 8 * AT_TAKEN)
    while row < job.num_rows:
        left = arm(job, row, 1, False, memory)
        if causal:
            right = arm(job, row + count, 1, False, memory + held)
        else:
            right = arm(job, row, -1, False, memory + held)
        idle = arm(job, row, 1, True, memory + 2 * held)
        solve(job, left, right, idle, memory + 3 * held, grad, out, bond)
        if finish(job, left, right, bad, point):
            store_one(table + 8 * AT_BROKEN, 1, 0)
        row = together * count_up(table + 8 * AT_TAKEN)


def _forward(
    io: Number, one: Number, shared: int | None, edition: int
) -> Callable[[int], None]:
    record = (2 if shared is None else 3) * WIDTH

    def work(table: int) -> None:
        if edition:
            job = job_of(table, shared, record, io, one)
            every_row(job, table, None, None, None)

    return work


def _backward(
    io: Number, one: Number, shared: int | None, edition: int
) -> Callable[[int], None]:
    record = (4 if shared is None else 5) * WIDTH

    def work(table: int) -> None:
        if edition:
            job = job_of(table, shared, record, io, one)
            every_row(job, table, entry(table, AT_GRAD), None, entry(table, AT_POINT))

    return work


def _backward_with_bonds(
    io: Number, one: Number, shared: int | None, edition: int
) -> Callable[[int], None]:
    record = (4 if shared is None else 5) * WIDTH

    def work(table: int) -> None:
        if edition:
            grad, bond = entry(table, AT_GRAD), entry(table, AT_BOND)
            job = job_of(table, shared, record, io, one)
            every_row(job, table, grad, bond, entry(table, AT_POINT))

    return work


@functools.cache
def _edition() -> int:
    """Number the source that machine code is made of, never 0.

    What is kept on disk would outlive a change of it: numba watches one file alone, and
    the constants of a function.
    """
    rooms = (lanes, resolvent_arms, resolvent_columns, resolvent_task, resolvent_walk)
    source = b"".join(Path(str(room.__file__)).read_bytes() for room in rooms)
    return zlib.crc32(source) + 1


_FORMATS = {False: np.float32(1), True: np.float64(1)}


@functools.cache
def machine_code(kind: Kind) -> Any:
    """Compile on first use; machine code is kept in the package's cache folder."""
    make = _forward
    if kind.grad:
        make = _backward_with_bonds if kind.bond else _backward
    shared = None if kind.shared else 0
    work = make(_FORMATS[kind.wide_io], _FORMATS[kind.wide], shared, _edition())
    compile_it = numba.cfunc(
        types.void(types.int64), fastmath={"contract"}, error_model="numpy", cache=True
    )
    return compile_it(work)


def check() -> None:
    """Raise RuntimeError where no folder can keep machine code."""
    numba.njit(cache=True)(_forward)
