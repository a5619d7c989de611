"""The sweep in machine code: one pass over memory, compiled by numba on first use.

A sweep walks over chunks of parameters. Everything happens to a number at once, in one
loop, while it is in a register:

    gradient  bf16, fp16 or fp32  -> fp32, times the factor that unscales and clips
    states    fp32, or 8-bit codes with one scale a block -> fp32
    weight    fp32, or bf16 and remainder -> fp32
    update                           AdamW, SGD or Lion, as in their twins
    states, weight                -> back to where they came from

Only what is no array of numbers, 8-bit states and gradients in fp16, goes through a
scratch of some 1,024 numbers, which stays in the first-level cache. Main memory is read
once and written once, while roots and quotients, the slowest of all instructions here,
are worked out. `read` and `write` tell LLVM that the arrays lie
apart; without that it would not vectorise a loop over so many.

No fast-math is allowed, hence no fused multiply-add: every operation rounds as the
operators of torch do, and the sweep equals the twin bit by bit. Where an operation is
written differently than mathematics would, this is why.

What is swept is a table of addresses, one row a chunk (`machine_rows`): one call for
all parameters of a model, however small they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload
from numba.np.numpy_support import carray

from castwise.optim.addresses import bits_of, pointer, read, wide, write
from castwise.optim.machine_codes import load_fp16, load_state, store_state
from castwise.optim.machine_rows import (
    ABSENT,
    BF16,
    COUNT,
    FIRST,
    FIRST_FORMAT,
    FIRST_SCALES,
    FP16,
    FP32,
    GRADIENT,
    GRADIENT_FORMAT,
    LION,
    NUMBERS,
    REMAINDER,
    SECOND,
    SECOND_FORMAT,
    SECOND_SCALES,
    SGD,
    SPAN,
    WEIGHT,
    WEIGHT_FORMAT,
)

# Arrays of one loop: they lie apart.
_G, _M, _V, _HIGH, _LOW, _ROOT = range(6)

_COMPILE: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}


# Two names for numba alone: it compiles the overloads below, by the format of weights,
# wherever compiled code calls them; Python has no call of them to make.


def _weight_at(high: Any, low: Any, i: int) -> Any:
    """Return a weight in fp32, from its array or from both pieces (compiled code)."""
    raise NotImplementedError  # compiled code only


def _set_weight(high: Any, low: Any, i: int, weight: Any) -> None:
    """Write a weight to its array or in two pieces (compiled code)."""
    raise NotImplementedError  # compiled code only


@overload(_weight_at, strict=False)
def _weight_at_of(high: Any, low: Any, i: Any) -> Any:
    """Compile `_weight_at` for a format of weights; `pieces` draws the two pieces."""
    del low, i
    if high.dtype == types.float32:
        return lambda high, low, i: read(high, i, _HIGH)  # noqa: ARG005 -- one signature for both

    def joined(high: Any, low: Any, i: Any) -> Any:
        upper = np.int32(read(high, i, _HIGH)) << np.int32(16)
        return wide(np.int32(upper + np.int32(read(low, i, _LOW))))

    return joined


@overload(_set_weight, strict=False)
def _set_weight_of(high: Any, low: Any, i: Any, weight: Any) -> Any:
    """Compile `_set_weight` for a format of weights; `pieces` draws the two pieces."""
    del low, i, weight
    if high.dtype == types.float32:
        return lambda high, low, i, weight: write(high, i, weight, _HIGH)  # noqa: ARG005 -- as above

    def split(high: Any, low: Any, i: Any, weight: Any) -> None:
        bits = bits_of(weight)
        write(high, i, np.int16((bits + np.int32(0x8000)) >> np.int32(16)), _HIGH)
        # The lower half is the remainder: h << 16 has none.
        write(low, i, np.int16(bits), _LOW)

    return split


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _adamw(
    n: int, gradient: Any, m: Any, v: Any, high: Any, low: Any, numbers: Any
) -> None:
    """`adamw.adamw_` on one span."""
    factor, decay = numbers[0], numbers[1]
    rise_m, keep_v, rise_v = numbers[2], numbers[3], numbers[4]
    step, unbias, eps = numbers[5], numbers[6], numbers[7]
    for i in range(n):
        g = wide(read(gradient, i, _G)) * factor
        variance = read(v, i, _V) * keep_v + (g * g) * rise_v
        before = read(m, i, _M)
        moment = before + (g - before) * rise_m
        write(v, i, variance, _V)
        write(m, i, moment, _M)
        fall = (moment * step) / (np.sqrt(variance) * unbias + eps)
        _set_weight(high, low, i, _weight_at(high, low, i) * decay - fall)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _adamw_rooted(
    n: int, gradient: Any, m: Any, v: Any, root: Any, high: Any, low: Any, numbers: Any
) -> None:
    """`_adamw` that leaves the square root of `v` behind, for its code."""
    factor, decay = numbers[0], numbers[1]
    rise_m, keep_v, rise_v = numbers[2], numbers[3], numbers[4]
    step, unbias, eps = numbers[5], numbers[6], numbers[7]
    for i in range(n):
        g = wide(read(gradient, i, _G)) * factor
        variance = read(v, i, _V) * keep_v + (g * g) * rise_v
        before = read(m, i, _M)
        moment = before + (g - before) * rise_m
        square_root = np.sqrt(variance)
        write(v, i, variance, _V)
        write(m, i, moment, _M)
        write(root, i, square_root, _ROOT)
        fall = (moment * step) / (square_root * unbias + eps)
        _set_weight(high, low, i, _weight_at(high, low, i) * decay - fall)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _lion(n: int, gradient: Any, m: Any, high: Any, low: Any, numbers: Any) -> None:
    """`lion.lion_` on one span."""
    factor, decay, keep, rise = numbers[0], numbers[1], numbers[2], numbers[3]
    keep_m, rise_m, lr = numbers[4], numbers[5], numbers[6]
    for i in range(n):
        g = wide(read(gradient, i, _G)) * factor
        before = read(m, i, _M)
        blend = before * keep + g * rise
        fall = lr if blend > 0 else (-lr if blend < 0 else np.float32(0))
        write(m, i, before * keep_m + g * rise_m, _M)
        _set_weight(high, low, i, _weight_at(high, low, i) * decay - fall)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _sgd(n: int, gradient: Any, high: Any, low: Any, numbers: Any) -> None:
    """`sgd.sgd_` on one span, without momentum."""
    factor, decay, lr, look = numbers[0], numbers[1], numbers[4], numbers[5]
    for i in range(n):
        weight = _weight_at(high, low, i)
        g = wide(read(gradient, i, _G)) * factor + weight * decay
        _set_weight(high, low, i, weight - (g * look) * lr)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _sgd_moving(
    n: int, gradient: Any, m: Any, high: Any, low: Any, numbers: Any
) -> None:
    """`sgd.sgd_` on one span, with momentum."""
    factor, decay, keep, rise = numbers[0], numbers[1], numbers[2], numbers[3]
    lr, look, reach = numbers[4], numbers[5], numbers[6]
    for i in range(n):
        weight = _weight_at(high, low, i)
        g = wide(read(gradient, i, _G)) * factor + weight * decay
        moment = read(m, i, _M) * keep + g * rise
        write(m, i, moment, _M)
        _set_weight(high, low, i, weight - (g * look + moment * reach) * lr)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _state(fmt: int, address: int, scales: int, start: int, n: int, out: Any) -> Any:
    """Return a state in fp32: where it lies, or decoded in `out`."""
    if fmt == FP32:
        return carray(pointer(address + start * 4), (n,), np.float32)
    if fmt != ABSENT:
        load_state(fmt, address, scales, start, n, out)
    return out


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _span(rule: int, row: Any, start: int, n: int, room: Any, numbers: Any) -> None:
    """Take `n` numbers of a chunk through all stages; `room` is scratch in cache."""
    fmt = row[GRADIENT_FORMAT]
    if fmt == FP32:
        full = carray(pointer(row[GRADIENT] + start * 4), (n,), np.float32)
        _with_gradient(rule, row, start, n, full, room, numbers)
    elif fmt == BF16:
        half = carray(pointer(row[GRADIENT] + start * 2), (n,), np.int16)
        _with_gradient(rule, row, start, n, half, room, numbers)
    else:
        load_fp16(row[GRADIENT] + start * 2, n, room[0])
        full = room[0].view(np.float32)
        _with_gradient(rule, row, start, n, full, room, numbers)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _with_gradient(
    rule: int, row: Any, start: int, n: int, gradient: Any, room: Any, numbers: Any
) -> None:
    """Take `n` numbers with their gradient, fp32 or the bits of bf16, further."""
    low = carray(pointer(row[REMAINDER] + start * 2), (n,), np.int16)
    if row[WEIGHT_FORMAT] == FP32:
        full = carray(pointer(row[WEIGHT] + start * 4), (n,), np.float32)
        _update(rule, row, start, n, gradient, full, low, room, numbers)
    else:
        high = carray(pointer(row[WEIGHT] + start * 2), (n,), np.int16)
        _update(rule, row, start, n, gradient, high, low, room, numbers)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _update(
    rule: int,
    row: Any,
    start: int,
    n: int,
    gradient: Any,
    high: Any,
    low: Any,
    room: Any,
    numbers: Any,
) -> None:
    """Take `n` numbers with gradient and weight, fp32 or in pieces, to the end."""
    floats = room.view(np.float32)
    m = _state(row[FIRST_FORMAT], row[FIRST], row[FIRST_SCALES], start, n, floats[1])
    v = _state(row[SECOND_FORMAT], row[SECOND], row[SECOND_SCALES], start, n, floats[2])
    root = floats[3]
    if rule == SGD:
        if row[FIRST_FORMAT] == ABSENT:
            _sgd(n, gradient, high, low, numbers)
        else:
            _sgd_moving(n, gradient, m, high, low, numbers)
    elif rule == LION:
        _lion(n, gradient, m, high, low, numbers)
    elif row[SECOND_FORMAT] == FP32:
        _adamw(n, gradient, m, v, high, low, numbers)
    else:
        _adamw_rooted(n, gradient, m, v, root, high, low, numbers)
    first, second = room[1], room[2]
    store_state(row[FIRST_FORMAT], row[FIRST], row[FIRST_SCALES], start, n, first, root)
    store_state(
        row[SECOND_FORMAT], row[SECOND], row[SECOND_SCALES], start, n, second, root
    )


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _needs_scratch(row: Any) -> bool:
    """Return whether anything of a chunk is no array of numbers."""
    coded = row[FIRST_FORMAT] not in (FP32, ABSENT)
    return (
        coded
        or row[SECOND_FORMAT] not in (FP32, ABSENT)
        or row[GRADIENT_FORMAT] == FP16
    )


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def sweep(rule: int, table: Any, numbers: Any) -> None:
    """Update every chunk of a table.

    Args:
        rule: ADAMW, SGD or LION.
        table: int64 [chunks, NUM_COLUMNS], as `machine_rows` says.
        numbers: fp32 [rows, 8]; a chunk names the row that it uses.
    """
    # Parameters begin at the start of a page; scratch that lay a power of two apart
    # would fall on the same cache lines as they do.
    room = np.zeros((4, SPAN + 80), np.int32)
    for c in range(table.shape[0]):
        row = table[c]
        # A loop that runs on and on is faster than one that starts again and again.
        most = SPAN if _needs_scratch(row) else row[COUNT]
        for start in range(0, row[COUNT], most):
            n = min(most, row[COUNT] - start)
            _span(rule, row, start, n, room, numbers[row[NUMBERS]])
