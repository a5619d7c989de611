"""The sweep in machine code: one pass over memory, compiled by numba on first use.

A sweep walks over chunks of parameters, span by span. Some 512 numbers live in
the first-level cache while everything happens to them, so that main memory is read once
and written once:

    gradient  bf16, fp16 or fp32  -> fp32, times the factor that unscales and clips
    states    fp32, or 8-bit codes with one scale a block -> fp32
    weight    bf16 and remainder  -> fp32
    update                           AdamW, SGD or Lion, as in their twins
    states, weight                -> back to where they came from

Each stage is a loop over few arrays: with many, LLVM no longer checks at run time that
they do not overlap, and does not vectorise. No fast-math is allowed, hence no
fused multiply-add: every operation rounds as the operators of torch do, and the sweep
equals the twin bit by bit. Where an operation is written differently than mathematics
would, this is why.

What is swept is a table of addresses (one row a chunk, columns below): one call for all
parameters of a model, however small they are.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from castwise.optim.addresses import pointer

BLOCK = 256  # numbers that share the scale of an 8-bit state
SPAN = 512  # numbers that are worked on at a time: five of 2 KiB in the cache

ADAMW, SGD, LION = 0, 1, 2
FP32, BF16, FP16, SPLIT = 0, 1, 2, 3  # formats of a gradient or weight
SIGNED_QUADRATIC, QUARTIC, ABSENT = 4, 5, 6  # codes of a state, besides FP32

(
    COUNT,
    GRADIENT_FORMAT,
    GRADIENT,
    WEIGHT_FORMAT,
    WEIGHT,
    REMAINDER,
    FIRST_FORMAT,
    FIRST,
    FIRST_SCALES,
    SECOND_FORMAT,
    SECOND,
    SECOND_SCALES,
    NUMBERS,
    NUM_COLUMNS,
) = range(14)

_TINY = np.float32(np.finfo(np.float32).tiny)  # a block below it is a block of zeros
_COMPILE: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _load_gradient(fmt: int, address: int, n: int, bits: Any, factor: Any) -> None:
    """Write the gradient in fp32 times a factor into the view of `bits`."""
    out = bits.view(np.float32)
    if fmt == FP32:
        wide = carray(pointer(address), (n,), np.float32)
        for i in range(n):
            out[i] = wide[i] * factor
        return
    narrow = carray(pointer(address), (n,), np.int16)
    if fmt == BF16:
        for i in range(n):
            bits[i] = np.int32(narrow[i]) << np.int32(16)
        for i in range(n):
            out[i] = out[i] * factor
        return
    # The bits of fp16 under fp32: the exponents are biased by 15 and 127, so the number
    # is 2^112 too small; the product is exact, for subnormals too. An exponent of all
    # ones means infinity or NaN and is filled up to all ones.
    up = np.float32(2.0**112)
    for i in range(n):
        half = np.int32(narrow[i])
        rest = (half & np.int32(0x7FFF)) << np.int32(13)
        special = np.int32(0x70000000) if rest >= np.int32(0x0F800000) else np.int32(0)
        bits[i] = (half & np.int32(-0x80000000)) | (rest + special)
    for i in range(n):
        small = np.abs(out[i]) < np.float32(1)  # NaN is not
        out[i] = (out[i] * up if small else out[i]) * factor


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _load_signed(address: int, scale: Any, n: int, out: Any) -> None:
    """Write one coded block in fp32 into `out`: sign and square."""
    codes = carray(pointer(address), (n,), np.int8)
    unit = scale * np.float32(1 / 127**2)
    for i in range(n):
        code = np.float32(np.int32(codes[i]))
        out[i] = (code * np.abs(code)) * unit


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _load_quartic(address: int, scale: Any, n: int, out: Any) -> None:
    """Write one coded block in fp32 into `out`: fourth power."""
    codes = carray(pointer(address), (n,), np.uint8)
    for i in range(n):
        root = np.float32(np.int32(codes[i])) * np.float32(1 / 255)
        square = root * root
        out[i] = (square * square) * scale


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _largest(n: int, bits: Any) -> Any:
    """Return the largest magnitude; as integers, because that is vectorised."""
    largest = np.int32(0)
    for i in range(n):
        largest = max(largest, bits[i] & np.int32(0x7FFFFFFF))
    return largest


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _store_signed(address: int, scale: Any, n: int, x: Any) -> None:
    """Code a block by sign and root: 127 * sqrt(|x| / largest)."""
    codes = carray(pointer(address), (n,), np.int8)
    inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
    for i in range(n):
        root = np.sqrt(np.abs(x[i]) * inverse) * np.float32(127) + np.float32(0.5)
        code = np.int32(root)
        codes[i] = np.int8(-code if x[i] < 0 else code)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _store_quartic(address: int, scale: Any, n: int, square_root: Any) -> None:
    """Code a block by the fourth root: 255 * (x / largest)^(1/4)."""
    codes = carray(pointer(address), (n,), np.uint8)
    inverse = np.float32(1) / np.sqrt(scale) if scale > 0 else np.float32(0)
    for i in range(n):
        root = np.sqrt(square_root[i] * inverse) * np.float32(255) + np.float32(0.5)
        codes[i] = np.uint8(np.int32(root))


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _load_state(
    fmt: int, address: int, scales: int, start: int, n: int, out: Any
) -> None:
    """Write the blocks of a coded state from element `start` on in fp32."""
    first = start // BLOCK
    table = carray(pointer(scales + 4 * first), (SPAN // BLOCK,), np.float32)
    for k in range((n + BLOCK - 1) // BLOCK):
        at, size = k * BLOCK, min(BLOCK, n - k * BLOCK)
        if fmt == SIGNED_QUADRATIC:
            _load_signed(address + start + at, table[k], size, out[at : at + size])
        else:
            _load_quartic(address + start + at, table[k], size, out[at : at + size])


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _store_state(
    fmt: int, address: int, scales: int, start: int, n: int, bits: Any, root: Any
) -> None:
    """Code the blocks of a state from element `start` on.

    `bits` are its fp32 bits; `root` is its square root, which only a quartic code reads
    and AdamW has computed already.
    """
    first = start // BLOCK
    table = carray(pointer(scales + 4 * first), (SPAN // BLOCK,), np.float32)
    table_bits = carray(pointer(scales + 4 * first), (SPAN // BLOCK,), np.int32)
    values = bits.view(np.float32)
    for k in range((n + BLOCK - 1) // BLOCK):
        at, size = k * BLOCK, min(BLOCK, n - k * BLOCK)
        table_bits[k] = _largest(size, bits[at : at + size])
        if table[k] < _TINY:
            table[k] = np.float32(0)
        if fmt == SIGNED_QUADRATIC:
            x = values[at : at + size]
            _store_signed(address + start + at, table[k], size, x)
        else:
            x = root[at : at + size]
            _store_quartic(address + start + at, table[k], size, x)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _join(weight: int, remainder: int, n: int, bits: Any) -> None:
    """Write the fp32 weight of both pieces as bits; `pieces` draws them."""
    high = carray(pointer(weight), (n,), np.int16)
    low = carray(pointer(remainder), (n,), np.int16)
    for i in range(n):
        bits[i] = (np.int32(high[i]) << np.int32(16)) + np.int32(low[i])


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _split(weight: int, remainder: int, n: int, bits: Any) -> None:
    """Write both pieces of an fp32 weight."""
    high = carray(pointer(weight), (n,), np.int16)
    low = carray(pointer(remainder), (n,), np.int16)
    for i in range(n):
        upper = (bits[i] + np.int32(0x8000)) >> np.int32(16)
        high[i] = np.int16(upper)
        low[i] = np.int16(bits[i])  # the lower half is the remainder: h << 16 has none


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _adamw(n: int, w: Any, g: Any, m: Any, v: Any, root: Any, numbers: Any) -> None:
    """`adamw.adamw_` on one span; leaves the square root of `v` behind."""
    decay, rise_m, keep_v, rise_v = numbers[1], numbers[2], numbers[3], numbers[4]
    step, unbias, eps = numbers[5], numbers[6], numbers[7]
    for i in range(n):
        value = v[i] * keep_v + (g[i] * g[i]) * rise_v
        v[i] = value
        root[i] = np.sqrt(value)
    for i in range(n):
        value = m[i] + (g[i] - m[i]) * rise_m
        m[i] = value
        g[i] = (value * step) / (root[i] * unbias + eps)
    for i in range(n):
        w[i] = w[i] * decay - g[i]


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _sgd(n: int, w: Any, g: Any, m: Any, numbers: Any) -> None:
    """`sgd.sgd_` on one span."""
    decay, keep, rise, lr = numbers[1], numbers[2], numbers[3], numbers[4]
    look, reach = numbers[5], numbers[6]
    for i in range(n):
        g[i] = g[i] + w[i] * decay
    for i in range(n):
        m[i] = m[i] * keep + g[i] * rise
    for i in range(n):
        g[i] = g[i] * look + m[i] * reach
    for i in range(n):
        w[i] = w[i] - g[i] * lr


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _lion(n: int, w: Any, g: Any, m: Any, u: Any, numbers: Any) -> None:
    """`lion.lion_` on one span."""
    decay, keep, rise = numbers[1], numbers[2], numbers[3]
    keep_m, rise_m, lr = numbers[4], numbers[5], numbers[6]
    for i in range(n):
        blend = m[i] * keep + g[i] * rise
        u[i] = lr if blend > 0 else (-lr if blend < 0 else np.float32(0))
    for i in range(n):
        m[i] = m[i] * keep_m + g[i] * rise_m
    for i in range(n):
        w[i] = w[i] * decay - u[i]


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _span(  # noqa: C901 -- one branch for each format of each stage
    rule: int, row: Any, start: int, n: int, room: Any, numbers: Any
) -> None:
    """Take `n` numbers of a chunk through all stages; `room` is scratch in cache."""
    floats = room.view(np.float32)
    gradient, weight, first, second = floats[0], floats[1], floats[2], floats[3]
    scratch = floats[4]
    width = 4 if row[GRADIENT_FORMAT] == FP32 else 2
    address = row[GRADIENT] + start * width
    _load_gradient(row[GRADIENT_FORMAT], address, n, room[0], numbers[0])
    code1, at1, scales1 = row[FIRST_FORMAT], row[FIRST], row[FIRST_SCALES]
    code2, at2, scales2 = row[SECOND_FORMAT], row[SECOND], row[SECOND_SCALES]
    if code1 == FP32:
        first = carray(pointer(at1 + start * 4), (SPAN,), np.float32)
    elif code1 != ABSENT:
        _load_state(code1, at1, scales1, start, n, first)
    if code2 == FP32:
        second = carray(pointer(at2 + start * 4), (SPAN,), np.float32)
    elif code2 != ABSENT:
        _load_state(code2, at2, scales2, start, n, second)
    if row[WEIGHT_FORMAT] == FP32:
        weight = carray(pointer(row[WEIGHT] + start * 4), (SPAN,), np.float32)
    else:
        _join(row[WEIGHT] + start * 2, row[REMAINDER] + start * 2, n, room[1])

    if rule == ADAMW:
        _adamw(n, weight, gradient, first, second, scratch, numbers)
    elif rule == SGD:
        _sgd(n, weight, gradient, first, numbers)
    else:
        _lion(n, weight, gradient, first, scratch, numbers)

    if code1 not in (FP32, ABSENT):
        _store_state(code1, at1, scales1, start, n, room[2], scratch)
    if code2 not in (FP32, ABSENT):
        _store_state(code2, at2, scales2, start, n, room[3], scratch)
    if row[WEIGHT_FORMAT] != FP32:
        _split(row[WEIGHT] + start * 2, row[REMAINDER] + start * 2, n, room[1])


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def sweep(rule: int, table: Any, numbers: Any) -> None:
    """Update every chunk of a table.

    Args:
        rule: ADAMW, SGD or LION.
        table: int64 [chunks, NUM_COLUMNS], rows as above.
        numbers: fp32 [rows, 8]; a chunk names the row that it uses.
    """
    # Parameters begin at the start of a page; scratch that lay a power of two apart
    # would fall on the same cache lines as they do.
    room = np.zeros((5, SPAN + 80), np.int32)
    for c in range(table.shape[0]):
        row = table[c]
        for start in range(0, row[COUNT], SPAN):
            n = min(SPAN, row[COUNT] - start)
            _span(rule, row, start, n, room, numbers[row[NUMBERS]])


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _square_sum(row: Any, factor: Any, bits: Any, lanes: Any) -> float:
    """Sum the squares of a chunk of scaled gradients, in the precision of `lanes`."""
    values = bits.view(np.float32)
    width = 4 if row[GRADIENT_FORMAT] == FP32 else 2
    lanes[:] = 0
    for start in range(0, row[COUNT], SPAN):
        n = min(SPAN, row[COUNT] - start)
        address = row[GRADIENT] + start * width
        _load_gradient(row[GRADIENT_FORMAT], address, n, bits, factor)
        for i in range(n):
            value = lanes.dtype.type(values[i])
            lanes[i] += value * value
    total = 0.0
    for i in range(SPAN):
        total += lanes[i]
    return total


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def square_sums(table: Any, factor: Any, out: Any) -> None:
    """Sum the squares of the scaled gradients of each chunk.

    A sum is finite exactly when all its gradients are: where the squares overflow fp32,
    they are summed again in fp64, which holds the square of every fp32 number.

    Args:
        table: As in `sweep`.
        factor: What the gradients are multiplied by first, fp32.
        out: fp64 [chunks], written.
    """
    bits = np.zeros(SPAN, np.int32)
    lanes = np.zeros(SPAN, np.float32)
    for c in range(table.shape[0]):
        out[c] = _square_sum(table[c], factor, bits, lanes)
        if not np.isfinite(out[c]):
            wide = np.zeros(SPAN, np.float64)
            out[c] = _square_sum(table[c], factor, bits, wide)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def join(weight: int, remainder: int, full: int, n: int) -> None:
    """Write the fp32 weights of both pieces at the address `full`."""
    _join(weight, remainder, n, carray(pointer(full), (n,), np.int32))


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def split(weight: int, remainder: int, full: int, n: int) -> None:
    """Write both pieces of the fp32 weights at the address `full`."""
    _split(weight, remainder, n, carray(pointer(full), (n,), np.int32))


def version() -> str:
    """Return what compiles the sweep, for reports."""
    return f"numba {numba.__version__}"
