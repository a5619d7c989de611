"""The sweep in machine code: one pass over memory, compiled by numba on first use.

A sweep walks over chunks of parameters, span by span. Some 1,024 numbers live in
the first-level cache while everything happens to them, so that main memory is read once
and written once:

    gradient  bf16, fp16 or fp32  -> fp32, times the factor that unscales and clips
    states    fp32, or 8-bit codes with one scale a block -> fp32
    weight    bf16 and remainder  -> fp32
    update                           AdamW, SGD or Lion, as in their twins
    states, weight                -> back to where they came from

Each stage is a loop over few arrays: with many, LLVM no longer checks at run time that
they do not overlap, and does not vectorise. The loop with the roots and quotients reads
most of the memory, which arrives while they are worked out. Checks and sums go over the
chunks from last to first: what they read last is in the cache when a sweep begins.

No fast-math is allowed, hence no fused multiply-add: every operation rounds as the
operators of torch do, and the sweep equals the twin bit by bit. Where an operation is
written differently than mathematics would, this is why.

What is swept is a table of addresses (one row a chunk, columns below): one call for all
parameters of a model, however small they are.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from castwise.optim.addresses import bits_of, pointer, prefetch, wide

BLOCK = 256  # numbers that share the scale of an 8-bit state
SPAN = 1024  # numbers that are worked on at a time: their scratch stays in the cache
PAGE = 4096  # bytes of memory that a processor fetches ahead in by itself
AHEAD = 512  # bytes of each array that are asked for before their span begins

# Of FP32, BF16 and FP16, repeated through a word: exponent, its unit, sign.
_EXPONENTS = np.array(
    [0x7F8000007F800000, 0x7F807F807F807F80, 0x7C007C007C007C00], np.int64
)
_UNITS = np.array(
    [0x0080000000800000, 0x0080008000800080, 0x0400040004000400], np.int64
)
_SIGNS = np.array(
    [0x8000000080000000, 0x8000800080008000, 0x8000800080008000], np.uint64
).view(np.int64)

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
def _load_fp16(address: int, n: int, bits: Any) -> None:
    """Write fp16 numbers in fp32 into the view of `bits`."""
    narrow = carray(pointer(address), (n,), np.int16)
    out = bits.view(np.float32)
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
        out[i] = out[i] * up if small else out[i]


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
    and AdamW has computed already. A state in fp32 stands where it belongs.
    """
    if fmt in (FP32, ABSENT):
        return
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
def _adamw(n: int, gradient: Any, m: Any, v: Any, fall: Any, numbers: Any) -> None:
    """The moments of `adamw.adamw_` on one span, and by how much the weight falls.

    One loop: the memory is read while roots and quotients, the slowest of all
    instructions here, are worked out.
    """
    factor = numbers[0]
    rise_m, keep_v, rise_v = numbers[2], numbers[3], numbers[4]
    step, unbias, eps = numbers[5], numbers[6], numbers[7]
    for i in range(n):
        g = wide(gradient[i]) * factor
        variance = v[i] * keep_v + (g * g) * rise_v
        moment = m[i] + (g - m[i]) * rise_m
        v[i] = variance
        m[i] = moment
        fall[i] = (moment * step) / (np.sqrt(variance) * unbias + eps)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _adamw_rooted(
    n: int, gradient: Any, m: Any, v: Any, fall: Any, root: Any, numbers: Any
) -> None:
    """`_adamw` that leaves the square root of `v` behind, for its code."""
    factor = numbers[0]
    rise_m, keep_v, rise_v = numbers[2], numbers[3], numbers[4]
    step, unbias, eps = numbers[5], numbers[6], numbers[7]
    for i in range(n):
        g = wide(gradient[i]) * factor
        variance = v[i] * keep_v + (g * g) * rise_v
        v[i] = variance
        root[i] = np.sqrt(variance)
    for i in range(n):
        moment = m[i] + (wide(gradient[i]) * factor - m[i]) * rise_m
        m[i] = moment
        fall[i] = (moment * step) / (root[i] * unbias + eps)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _lion(n: int, gradient: Any, m: Any, fall: Any, numbers: Any) -> None:
    """The moment of `lion.lion_` on one span, and by how much the weight falls."""
    factor, keep, rise = numbers[0], numbers[2], numbers[3]
    keep_m, rise_m, lr = numbers[4], numbers[5], numbers[6]
    for i in range(n):
        g = wide(gradient[i]) * factor
        blend = m[i] * keep + g * rise
        fall[i] = lr if blend > 0 else (-lr if blend < 0 else np.float32(0))
        m[i] = m[i] * keep_m + g * rise_m


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _sgd(n: int, gradient: Any, w: Any, m: Any, fall: Any, numbers: Any) -> None:
    """The moment of `sgd.sgd_` on one span, and by how much the weight falls."""
    factor, decay, keep, rise = numbers[0], numbers[1], numbers[2], numbers[3]
    lr, look, reach = numbers[4], numbers[5], numbers[6]
    for i in range(n):
        g = wide(gradient[i]) * factor + w[i] * decay
        moment = m[i] * keep + g * rise
        m[i] = moment
        fall[i] = (g * look + moment * reach) * lr


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _lower_full(n: int, w: Any, fall: Any, decay: Any) -> None:
    """Lower a weight in fp32."""
    for i in range(n):
        w[i] = w[i] * decay - fall[i]


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _lower_split(n: int, high: Any, low: Any, fall: Any, decay: Any) -> None:
    """Lower a weight in two pieces; `pieces` draws them."""
    for i in range(n):
        joined = np.int32((np.int32(high[i]) << np.int32(16)) + np.int32(low[i]))
        bits = bits_of(wide(joined) * decay - fall[i])
        high[i] = np.int16((bits + np.int32(0x8000)) >> np.int32(16))
        low[i] = np.int16(bits)  # the lower half is the remainder: h << 16 has none


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _lower(row: Any, start: int, n: int, fall: Any, decay: Any) -> None:
    """Let a weight shrink and fall, in the format that it has."""
    if row[WEIGHT_FORMAT] == FP32:
        full = carray(pointer(row[WEIGHT] + start * 4), (SPAN,), np.float32)
        _lower_full(n, full, fall, decay)
    else:
        high = carray(pointer(row[WEIGHT] + start * 2), (SPAN,), np.int16)
        low = carray(pointer(row[REMAINDER] + start * 2), (SPAN,), np.int16)
        _lower_split(n, high, low, fall, decay)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _weight(row: Any, start: int, n: int, bits: Any) -> Any:
    """Return a weight in fp32: where it lies, or joined in `bits`."""
    if row[WEIGHT_FORMAT] == FP32:
        return carray(pointer(row[WEIGHT] + start * 4), (SPAN,), np.float32)
    _join(row[WEIGHT] + start * 2, row[REMAINDER] + start * 2, n, bits)
    return bits.view(np.float32)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _state(fmt: int, address: int, scales: int, start: int, n: int, out: Any) -> Any:
    """Return a state in fp32: where it lies, or decoded in `out`."""
    if fmt == FP32:
        return carray(pointer(address + start * 4), (SPAN,), np.float32)
    if fmt != ABSENT:
        _load_state(fmt, address, scales, start, n, out)
    return out


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _ask_ahead(row: Any, start: int) -> None:
    """Ask for the first lines of the span that begins at `start`.

    Processors fetch ahead by themselves, but not into the next page of memory, and each
    span begins a page of some array. To ask for more lines, or into the first-level
    cache, was slower than to ask for none.
    """
    gradient = row[GRADIENT] + start * (4 if row[GRADIENT_FORMAT] == FP32 else 2)
    first = row[FIRST] + start * (4 if row[FIRST_FORMAT] == FP32 else 1)
    second = row[SECOND] + start * (4 if row[SECOND_FORMAT] == FP32 else 1)
    weight = row[WEIGHT] + start * (4 if row[WEIGHT_FORMAT] == FP32 else 2)
    remainder = row[REMAINDER] + start * 2
    for ahead in range(0, AHEAD, 64):
        prefetch(gradient + ahead)
        prefetch(first + ahead)
        prefetch(second + ahead)
        prefetch(weight + ahead)
        prefetch(remainder + ahead)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _span(rule: int, row: Any, start: int, n: int, room: Any, numbers: Any) -> None:
    """Take `n` numbers of a chunk through all stages; `room` is scratch in cache."""
    _ask_ahead(row, start + SPAN)
    fmt = row[GRADIENT_FORMAT]
    if fmt == FP32:
        full = carray(pointer(row[GRADIENT] + start * 4), (SPAN,), np.float32)
        _update(rule, row, start, n, full, room, numbers)
    elif fmt == BF16:
        half = carray(pointer(row[GRADIENT] + start * 2), (SPAN,), np.int16)
        _update(rule, row, start, n, half, room, numbers)
    else:
        _load_fp16(row[GRADIENT] + start * 2, n, room[0])
        _update(rule, row, start, n, room[0].view(np.float32), room, numbers)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _update(
    rule: int, row: Any, start: int, n: int, gradient: Any, room: Any, numbers: Any
) -> None:
    """Take `n` numbers with their gradient, fp32 or the bits of bf16, further."""
    floats = room.view(np.float32)
    fall, root = floats[4], floats[5]
    first = _state(
        row[FIRST_FORMAT], row[FIRST], row[FIRST_SCALES], start, n, floats[2]
    )
    second = _state(
        row[SECOND_FORMAT], row[SECOND], row[SECOND_SCALES], start, n, floats[3]
    )
    if rule == SGD:
        weight = _weight(row, start, n, room[1])
        _sgd(n, gradient, weight, first, fall, numbers)
    elif rule == LION:
        _lion(n, gradient, first, fall, numbers)
    elif row[SECOND_FORMAT] == FP32:
        _adamw(n, gradient, first, second, fall, numbers)
    else:
        _adamw_rooted(n, gradient, first, second, fall, root, numbers)
    # That of SGD has gone into the gradient.
    decay = np.float32(1) if rule == SGD else numbers[1]
    _lower(row, start, n, fall, decay)
    _store_state(
        row[FIRST_FORMAT], row[FIRST], row[FIRST_SCALES], start, n, room[2], root
    )
    _store_state(
        row[SECOND_FORMAT], row[SECOND], row[SECOND_SCALES], start, n, room[3], root
    )


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
    room = np.zeros((6, SPAN + 80), np.int32)
    for c in range(table.shape[0]):
        row = table[c]
        for start in range(0, row[COUNT], SPAN):
            n = min(SPAN, row[COUNT] - start)
            _span(rule, row, start, n, room, numbers[row[NUMBERS]])


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _add_squares(n: int, gradient: Any, factor: Any, lanes: Any) -> None:
    """Add the squares of one span to the lanes, in their precision."""
    for i in range(n):
        value = lanes.dtype.type(wide(gradient[i]) * factor)
        lanes[i] += value * value


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _square_sum(row: Any, factor: Any, bits: Any, lanes: Any) -> float:
    """Sum the squares of a chunk of scaled gradients, in the precision of `lanes`."""
    fmt = row[GRADIENT_FORMAT]
    lanes[:] = 0
    for start in range(0, row[COUNT], SPAN):
        n = min(SPAN, row[COUNT] - start)
        if fmt == FP32:
            full = carray(pointer(row[GRADIENT] + start * 4), (SPAN,), np.float32)
            _add_squares(n, full, factor, lanes)
        elif fmt == BF16:
            half = carray(pointer(row[GRADIENT] + start * 2), (SPAN,), np.int16)
            _add_squares(n, half, factor, lanes)
        else:
            _load_fp16(row[GRADIENT] + start * 2, n, bits)
            _add_squares(n, bits.view(np.float32), factor, lanes)
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
    for c in range(table.shape[0] - 1, -1, -1):
        out[c] = _square_sum(table[c], factor, bits, lanes)
        if not np.isfinite(out[c]):
            double = np.zeros(SPAN, np.float64)
            out[c] = _square_sum(table[c], factor, bits, double)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _any_special(words: Any, fmt: int) -> bool:
    """Return whether an exponent of all ones stands in words that hold numbers.

    With one unit added to each exponent, those of all ones, and no others, carry into
    the sign, where nothing else is left.
    """
    exponents, unit = words.dtype.type(_EXPONENTS[fmt]), words.dtype.type(_UNITS[fmt])
    carried = words.dtype.type(0)
    for i in range(len(words)):
        carried |= (words[i] & exponents) + unit
    return bool((carried & words.dtype.type(_SIGNS[fmt])) != 0)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def nonfinite(table: Any, out: Any) -> None:
    """Say of each chunk whether its gradients hold an infinity or NaN.

    Args:
        table: As in `sweep`.
        out: bool [chunks], written.
    """
    for c in range(table.shape[0] - 1, -1, -1):
        row = table[c]
        fmt, address, count = row[GRADIENT_FORMAT], row[GRADIENT], row[COUNT]
        length = count * (4 if fmt == FP32 else 2)
        words = carray(pointer(address), (length // 8,), np.int64)
        found = False
        for page in range(0, len(words), PAGE // 8):
            for ahead in range(PAGE, PAGE + AHEAD, 64):
                prefetch(address + page * 8 + ahead)
            found |= _any_special(words[page : page + PAGE // 8], fmt)
        rest = address + length // 8 * 8
        if fmt == FP32:
            last = _any_special(carray(pointer(rest), (count % 2,), np.int32), fmt)
        else:
            last = _any_special(carray(pointer(rest), (count % 4,), np.int16), fmt)
        out[c] = found or last


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
