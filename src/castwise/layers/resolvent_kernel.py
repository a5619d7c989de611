"""The resolvent of a real tridiagonal chain on the CPU, as a SIMD kernel (numba).

Rows of the batch travel in the lanes of vector registers. A long chain is cut into
tiles that stay in the first-level cache; between passes only the value that crosses
each tile border is kept, so memory traffic is input plus output. The recurrences
(a_i = d_i - z, k_i = upper_i * lower_i; `left` and `right` are the pulls of the two
neighbours):

    left pivot    u_i = a_i - left_i,    left_(i+1)  = k_i / u_i
    right pivot   w_i = a_i - right_i,   right_(i-1) = k_(i-1) / w_i
    diagonal      G_i = 1 / (a_i - left_i - right_i)

and, with p_i = -s_i G_i^2 and s the conjugate of the upstream gradient,

    U_i = p_i + U_(i+1) k_i / u_i^2,     W_i = p_i + W_(i-1) k_(i-1) / w_i^2
    dL/da_i = U_i + W_i - p_i            = -sum_j s_j G_ij G_ji, exactly
    dL/dk_i = -(U_(i+1) / u_i + W_i / w_(i+1))

`side` is 1, or 0 for the causal form, in which nothing comes from the right. Scratch is
one flat array indexed [field, site, lane] by unsigned integers with constant strides:
signed indices would bring a wrap-around test, and variable strides an aliasing test,
and either keeps LLVM from using vector instructions.
"""

from __future__ import annotations

import functools
import threading
from typing import Any, NamedTuple

import numba
import numpy as np

# what numba sees; it infers the types itself
Array = Any  # contiguous
Index = Any  # unsigned inside a tile, signed across the batch
Real = Any  # scalar of the arithmetic

MAX_LANES = 16
TILE = 128  # sites of a long chain that are worked on at once
WHOLE = 1024  # a chain of up to so many is one tile: its borders are known beforehand

ONE = np.uint64(1)
SITE = np.uint64(MAX_LANES)  # from one site to the next
NEXT = np.uint64((WHOLE + 1) * MAX_LANES)  # from one field to the next


def field(place: int) -> np.uint64:
    """Return the offset of the field at this place in the scratch."""
    return np.uint64(place) * NEXT


A, A_IM, K = field(0), field(1), field(2)  # K is the bond on the left of the site
LEFT, LEFT_IM = field(3), field(4)
RIGHT, RIGHT_IM = field(5), field(6)  # at site t + 1: pull on site t
OUT, OUT_IM = field(7), field(8)
IU, IU_IM = field(9), field(10)
IW, IW_IM = field(11), field(12)
P, P_IM = field(13), field(14)
FLOW, FLOW_IM = field(15), field(16)  # at site t + 1: W of site t
BACK, BACK_IM = field(17), field(18)  # U of the site
DK, DK_IM = field(19), field(20)
NUM_FIELDS = 21


class Kernel(NamedTuple):
    """The two entry points, compiled."""

    forward: Any
    """`forward(d, k, z, side, one, s, border, tile, lanes, out, bad)`"""

    backward: Any
    """`backward(d, k, z, side, one, s, border, tile, lanes, grad, need_k, ...)`"""


def load_tile(
    s: Array,
    d: Array,
    k: Array,
    z: Array,
    row0: Index,
    lanes: Index,
    site0: Index,
    n: Index,
) -> None:
    """Copy one tile into the lanes; lanes without a row repeat the last one."""
    last = d.shape[1] - 1
    for lane in range(lanes):
        row = min(row0 + np.int64(lane), d.shape[0] - 1)
        z_re = z[row, 0]
        s[A_IM + lane] = -z[row, 1]  # the same at every site
        for t in range(n):
            s[t * SITE + A + lane] = d[row, site0 + np.int64(t)] - z_re
    if k.shape[0] == 1:
        for t in range(n + ONE):
            bond = site0 + np.int64(t) - 1
            value = k[0, bond] if 0 <= bond < last else 0
            for lane in range(lanes):
                s[t * SITE + K + lane] = value
        return
    for lane in range(lanes):
        row = min(row0 + np.int64(lane), d.shape[0] - 1)
        for t in range(n + ONE):
            bond = site0 + np.int64(t) - 1
            s[t * SITE + K + lane] = k[row, bond] if 0 <= bond < last else 0


def run_right(s: Array, n: Index, side: Real, one: Real, lanes: Index) -> None:
    """Run only the right pivots through a tile, from its last site to its first."""
    for t in range(n):
        b = (n - ONE - t) * SITE
        for lane in range(lanes):
            re = s[b + A + lane] - s[b + SITE + RIGHT + lane]
            im = s[A_IM + lane] - s[b + SITE + RIGHT_IM + lane]
            f = one / (re * re + im * im)
            k = side * s[b + K + lane]
            s[b + RIGHT + lane] = (k * re) * f
            s[b + RIGHT_IM + lane] = -(k * im) * f


def run_both(s: Array, n: Index, side: Real, one: Real, lanes: Index) -> None:
    """Run both pivot chains through a tile; being independent, they hide latency."""
    for t in range(n):
        a = t * SITE
        for lane in range(lanes):
            re = s[a + A + lane] - s[a + LEFT + lane]
            im = s[A_IM + lane] - s[a + LEFT_IM + lane]
            f = one / (re * re + im * im)
            k = s[a + SITE + K + lane]
            s[a + SITE + LEFT + lane] = (k * re) * f
            s[a + SITE + LEFT_IM + lane] = -(k * im) * f
        b = (n - ONE - t) * SITE
        for lane in range(lanes):
            re = s[b + A + lane] - s[b + SITE + RIGHT + lane]
            im = s[A_IM + lane] - s[b + SITE + RIGHT_IM + lane]
            f = one / (re * re + im * im)
            k = side * s[b + K + lane]
            s[b + RIGHT + lane] = (k * re) * f
            s[b + RIGHT_IM + lane] = -(k * im) * f


def join(s: Array, n: Index, one: Real, lanes: Index) -> None:
    """Set OUT = 1 / (a - left - right), the diagonal."""
    for t in range(n):
        a = t * SITE
        for lane in range(lanes):
            re = s[a + A + lane] - s[a + LEFT + lane] - s[a + SITE + RIGHT + lane]
            im = s[A_IM + lane] - s[a + LEFT_IM + lane] - s[a + SITE + RIGHT_IM + lane]
            f = one / (re * re + im * im)
            s[a + OUT + lane] = re * f
            s[a + OUT_IM + lane] = -im * f


def invert_pivots(s: Array, n: Index, one: Real, lanes: Index) -> None:
    """Set IU = 1 / u and IW = 1 / w; no chain here, every site is independent."""
    for t in range(n):
        a = t * SITE
        for lane in range(lanes):
            re = s[a + A + lane] - s[a + LEFT + lane]
            im = s[A_IM + lane] - s[a + LEFT_IM + lane]
            f = one / (re * re + im * im)
            s[a + IU + lane] = re * f
            s[a + IU_IM + lane] = -im * f
            re = s[a + A + lane] - s[a + SITE + RIGHT + lane]
            im = s[A_IM + lane] - s[a + SITE + RIGHT_IM + lane]
            f = one / (re * re + im * im)
            s[a + IW + lane] = re * f
            s[a + IW_IM + lane] = -im * f


def load_source(
    s: Array, grad: Array, row0: Index, lanes: Index, site0: Index, n: Index
) -> None:
    """Set P = -conj(upstream) * G^2."""
    for lane in range(lanes):
        row = min(row0 + np.int64(lane), grad.shape[0] - 1)
        for t in range(n):
            s[t * SITE + P + lane] = grad[row, site0 + np.int64(t), 0]
            s[t * SITE + P_IM + lane] = -grad[row, site0 + np.int64(t), 1]
    for t in range(n):
        a = t * SITE
        for lane in range(lanes):
            g, h = s[a + OUT + lane], s[a + OUT_IM + lane]
            re, im = g * g - h * h, g * h + g * h
            p, q = s[a + P + lane], s[a + P_IM + lane]
            s[a + P + lane] = q * im - p * re
            s[a + P_IM + lane] = -(p * im + q * re)


def flow_right(s: Array, n: Index, side: Real, lanes: Index) -> None:
    """Carry W through a tile from left to right."""
    for t in range(n):
        a = t * SITE
        for lane in range(lanes):
            x, y = s[a + IW + lane], s[a + IW_IM + lane]
            k = side * s[a + K + lane]
            re, im = k * (x * x - y * y), k * (x * y + x * y)
            v, q = s[a + FLOW + lane], s[a + FLOW_IM + lane]
            s[a + SITE + FLOW + lane] = s[a + P + lane] + (v * re - q * im)
            s[a + SITE + FLOW_IM + lane] = s[a + P_IM + lane] + (v * im + q * re)


def flow_left(s: Array, n: Index, side: Real, lanes: Index) -> None:
    """Carry U through a tile from right to left; set OUT = dL/da and DK = dL/dk.

    DK belongs to the bond on the right of the site. At the site after the tile, BACK
    and IW hold what came in from there.
    """
    for t in range(n):
        a = (n - ONE - t) * SITE
        b = a + SITE
        for lane in range(lanes):
            v, q = s[b + BACK + lane], s[b + BACK_IM + lane]
            x, y = s[a + IU + lane], s[a + IU_IM + lane]
            h, m = v * x - q * y, v * y + q * x  # U_(i+1) / u_i
            k = s[b + K + lane]
            re, im = k * (h * x - m * y), k * (h * y + m * x)
            s[a + BACK + lane] = s[a + P + lane] + re
            s[a + BACK_IM + lane] = s[a + P_IM + lane] + im
            w, r = s[b + FLOW + lane], s[b + FLOW_IM + lane]
            s[a + OUT + lane] = re + w
            s[a + OUT_IM + lane] = im + r
            x, y = side * s[b + IW + lane], side * s[b + IW_IM + lane]
            s[a + DK + lane] = -(h + (w * x - r * y))
            s[a + DK_IM + lane] = -(m + (w * y + r * x))


def take(
    s: Array, start: Index, n: Index, border: Array, at: Index, lanes: Index
) -> None:
    """Keep the complex value that stands at site n in a border record."""
    for lane in range(lanes):
        border[at, 0, lane] = s[n * SITE + start + lane]
        border[at, 1, lane] = s[n * SITE + start + NEXT + lane]


def put(
    s: Array, start: Index, n: Index, border: Array, at: Index, lanes: Index
) -> None:
    """Restore a complex value from a border record to site n."""
    for lane in range(lanes):
        s[n * SITE + start + lane] = border[at, 0, lane]
        s[n * SITE + start + NEXT + lane] = border[at, 1, lane]


def enter_from_right(
    s: Array,
    d: Array,
    k: Array,
    z: Array,
    row0: Index,
    lanes: Index,
    side: Real,
    one: Real,
    border: Array,
    tile: Index,
) -> None:
    """Go once from right to left; record the pull that enters each tile there."""
    num_tiles = -(-d.shape[1] // tile)
    border[num_tiles - 1] = 0
    for back in range(num_tiles - 1):
        at = num_tiles - 1 - back
        n = np.uint64(min(tile, d.shape[1] - at * tile))
        load_tile(s, d, k, z, row0, lanes, at * tile, n)
        put(s, RIGHT, n, border, at, lanes)
        run_right(s, n, side, one, lanes)
        take(s, RIGHT, np.uint64(0), border, at - 1, lanes)


def forward(
    d: Array,
    k: Array,
    z: Array,
    side: Real,
    one: Real,
    s: Array,
    borders: Array,
    tile: Index,
    lanes: Index,
    out: Array,
    bad: Array,
) -> None:
    """Write the diagonal into `out` `[B, N, 2]` and mark rows with a broken pivot."""
    num_rows, length = d.shape
    for row0 in range(0, num_rows, np.int64(lanes)):
        enter_from_right(s, d, k, z, row0, lanes, side, one, borders[0], tile)
        borders[1, 0] = 0
        for at in range(-(-length // tile)):
            site0 = at * tile
            n = np.uint64(min(tile, length - site0))
            load_tile(s, d, k, z, row0, lanes, site0, n)
            put(s, RIGHT, n, borders[0], at, lanes)
            put(s, LEFT, np.uint64(0), borders[1], 0, lanes)
            run_both(s, n, side, one, lanes)
            join(s, n, one, lanes)
            take(s, LEFT, n, borders[1], 0, lanes)
            for lane in range(np.uint64(min(np.int64(lanes), num_rows - row0))):
                row = row0 + np.int64(lane)
                check = one - one
                for t in range(n):
                    re = s[t * SITE + OUT + lane]
                    im = s[t * SITE + OUT_IM + lane]
                    out[row, site0 + np.int64(t), 0] = re
                    out[row, site0 + np.int64(t), 1] = im
                    check += (re - re) + (im - im)  # NaN once an entry is not finite
                if check != check:  # noqa: PLR0124 -- only a NaN differs from itself
                    bad[row] = True


def rebuild_tile(
    s: Array,
    d: Array,
    k: Array,
    z: Array,
    row0: Index,
    lanes: Index,
    side: Real,
    one: Real,
    borders: Array,
    tile: Index,
    at: Index,
    grad: Array,
) -> Index:
    """Recompute pivots, diagonal, source and W of a tile from what enters it."""
    site0 = at * tile
    n = np.uint64(min(tile, d.shape[1] - site0))
    load_tile(s, d, k, z, row0, lanes, site0, n)
    put(s, RIGHT, n, borders[0], at, lanes)
    put(s, LEFT, np.uint64(0), borders[1], at, lanes)
    put(s, FLOW, np.uint64(0), borders[2], at, lanes)
    run_both(s, n, side, one, lanes)
    join(s, n, one, lanes)
    invert_pivots(s, n, one, lanes)
    load_source(s, grad, row0, lanes, site0, n)
    flow_right(s, n, side, lanes)
    return n


def store_gradients(
    s: Array,
    row0: Index,
    rows: Index,
    site0: Index,
    n: Index,
    need_k: bool,
    out_d: Array,
    out_k: Array,
    out_z: Array,
) -> None:
    """Copy the lanes of one tile out; dL/dz = -sum dL/da."""
    for lane in range(np.uint64(rows)):
        row = row0 + np.int64(lane)
        re, im = out_z[row, 0], out_z[row, 1]
        for t in range(n):
            out_d[row, site0 + np.int64(t)] = s[t * SITE + OUT + lane]
            re -= s[t * SITE + OUT + lane]
            im -= s[t * SITE + OUT_IM + lane]
        out_z[row, 0], out_z[row, 1] = re, im
        if need_k:
            for t in range(min(np.int64(n), out_k.shape[1] - site0)):
                out_k[row, site0 + t, 0] = s[np.uint64(t) * SITE + DK + lane]
                out_k[row, site0 + t, 1] = s[np.uint64(t) * SITE + DK_IM + lane]


def backward(
    d: Array,
    k: Array,
    z: Array,
    side: Real,
    one: Real,
    s: Array,
    borders: Array,
    tile: Index,
    lanes: Index,
    grad: Array,
    need_k: bool,
    out_d: Array,
    out_k: Array,
    out_z: Array,
) -> None:
    """Write Re dL/da `[B, N]`, dL/dk `[B, N-1, 2]` and dL/dz `[B, 2]`, analytic.

    Nothing of the forward pass is needed but its inputs: pivots are recomputed.
    """
    num_rows, length = d.shape
    num_tiles = -(-length // tile)
    for row0 in range(0, num_rows, np.int64(lanes)):
        enter_from_right(s, d, k, z, row0, lanes, side, one, borders[0], tile)
        borders[1, 0] = 0
        borders[2, 0] = 0
        for at in range(num_tiles - 1):
            n = rebuild_tile(
                s, d, k, z, row0, lanes, side, one, borders, tile, at, grad
            )
            take(s, LEFT, n, borders[1], at + 1, lanes)
            take(s, FLOW, n, borders[2], at + 1, lanes)
        borders[3, :2] = 0
        for back in range(num_tiles):
            at = num_tiles - 1 - back
            n = rebuild_tile(
                s, d, k, z, row0, lanes, side, one, borders, tile, at, grad
            )
            put(s, BACK, n, borders[3], 0, lanes)
            put(s, IW, n, borders[3], 1, lanes)
            flow_left(s, n, side, lanes)
            take(s, BACK, np.uint64(0), borders[3], 0, lanes)
            take(s, IW, np.uint64(0), borders[3], 1, lanes)
            rows = min(np.int64(lanes), num_rows - row0)
            store_gradients(s, row0, rows, at * tile, n, need_k, out_d, out_k, out_z)


@functools.cache
def compiled() -> Kernel:
    """Compile on first use; machine code is kept in the package's cache folder.

    The parts are replaced in this module by their compiled form, so that the entry
    points, which find them by name, call machine code.
    """
    part = numba.njit(fastmath={"contract"}, error_model="numpy")
    rooms = globals()
    for function in (
        load_tile,
        run_right,
        run_both,
        join,
        invert_pivots,
        load_source,
        flow_right,
        flow_left,
        take,
        put,
        enter_from_right,
        rebuild_tile,
        store_gradients,
    ):
        rooms[function.__name__] = part(function)
    entry = numba.njit(
        fastmath={"contract"}, error_model="numpy", nogil=True, cache=True
    )
    return Kernel(entry(forward), entry(backward))


# one scratch per thread and arithmetic: mapping its pages anew would cost as much as a
# short chain; nothing in it outlives a call
_per_thread = threading.local()


def scratch(
    num_rows: int, length: int, compute: type[np.floating[Any]]
) -> tuple[Any, ...]:
    """Return the arguments after `side`: one, s, borders, tile, lanes."""
    name = compute.__name__
    s = getattr(_per_thread, name, None)
    if s is None:
        s = np.zeros(NUM_FIELDS * int(NEXT), dtype=compute)
        setattr(_per_thread, name, s)
    tile = length if length <= WHOLE else TILE
    num_tiles = -(-length // tile)
    lanes = 8 if num_rows <= 8 else MAX_LANES
    borders = np.zeros((4, max(num_tiles, 2), 2, MAX_LANES), dtype=compute)
    return compute(1), s, borders, tile, np.uint64(lanes)
