"""Counting in machine code, on the CPU: numbers are read where they stand (numba).

Operators of torch need a pass and a temporary for each comparison, ten of them in all,
and a small tensor costs more calls than counting. Here one call samples a tensor of any
format and counts it, and one call does so for all weights and gradients of a model.
Other devices keep the operators, and both give the same counts.

What numba compiled is kept until this file changes. What other rooms decide about
samples therefore comes as an argument, and is compiled in nowhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from castwise.numerics.watch.exponents import INFINITE, LOWEST, NAN, ZERO
from castwise.optim.addresses import pointer

FP32, BF16, FP16 = 0, 1, 2

(
    SIZE,
    PLACE,
    WEIGHT_ROW,
    WEIGHT_FORMAT,
    WEIGHT,
    GRADIENT_ROW,
    GRADIENT_FORMAT,
    GRADIENT,
    NUM_COLUMNS,
) = range(9)
"""Columns of a table of weights. `PLACE` is where the sample begins among all."""

_FIRST = -127 - LOWEST  # the bin of exponent field 0, were it a normal number
_TOP = 255
_COMPILE: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _take(source: Any, size: int, draws: Any, neighbours: int, out: Any) -> int:
    """Copy a small tensor, or some neighbours of each stretch of a large one."""
    stretches = len(draws)
    if size <= stretches * neighbours:
        for i in range(size):
            out[i] = source[i]
        return size
    stretch = size // stretches
    span = np.float64(stretch - neighbours + 1)
    for k in range(stretches):
        first = k * stretch + np.int64(draws[k] * span)
        for j in range(neighbours):
            out[k * neighbours + j] = source[first + j]
    return stretches * neighbours


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _sample(
    address: int,
    fmt: int,
    size: int,
    draws: Any,
    neighbours: int,
    halves: Any,
    out: Any,
) -> int:
    """Write the bits in fp32 of what is looked at, and return how many there are.

    Args:
        address: Where a contiguous tensor stands.
        fmt: What it holds.
        size: How many.
        draws: float64 in [0, 1), the place in each stretch; one for each.
        neighbours: How many numbers are taken of each stretch.
        halves: int32 [65536], the bits in fp32 of each number of fp16.
        out: int32, long enough for all that is taken.
    """
    if fmt == FP32:
        wide = carray(pointer(address), (size,), np.int32)
        return int(_take(wide, size, draws, neighbours, out))
    source = carray(pointer(address), (size,), np.uint16)
    taken = _take(source, size, draws, neighbours, out)
    if fmt == BF16:
        for i in range(taken):
            out[i] = out[i] << 16
    else:
        for i in range(taken):
            out[i] = halves[out[i]]
    return int(taken)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _tally(bits: Any, size: int, count: Any) -> None:
    """Count numbers of fp32 by their exponent fields."""
    for i in range(size):
        magnitude = bits[i] & 0x7FFFFFFF
        field = magnitude >> 23
        if 0 < field < _TOP:
            count[field + _FIRST] += 1
        elif magnitude == 0:
            count[ZERO] += 1
        elif field == 0:
            count[0] += 1
        elif magnitude == _TOP << 23:
            count[INFINITE] += 1
        else:
            count[NAN] += 1


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def count_tensor(
    address: int,
    fmt: int,
    size: int,
    draws: int,
    halves: int,
    scratch: int,
    counts: int,
    stretches: int,
    neighbours: int,
    num_bins: int,
    row: int,
) -> None:
    """Count one tensor in a row; as in `_sample`, with addresses for arrays.

    An integer goes into machine code in a fraction of the time of an array.
    """
    drawn = carray(pointer(draws), (stretches,), np.float64)
    table = carray(pointer(halves), (1 << 16,), np.int32)
    room = carray(pointer(scratch), (stretches * neighbours,), np.int32)
    count = carray(pointer(counts + row * num_bins * 8), (num_bins,), np.int64)
    taken = _sample(address, fmt, size, drawn, neighbours, table, room)
    _tally(room, taken, count)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def count_weights(
    table: Any,
    draws: Any,
    neighbours: int,
    halves: Any,
    old: Any,
    gradients: Any,
    counts: Any,
) -> None:
    """Count weights and their gradients, and keep the samples of both, as bits."""
    for at in range(len(table)):
        weight = table[at]
        here = old[weight[PLACE] :]
        taken = _sample(
            weight[WEIGHT],
            weight[WEIGHT_FORMAT],
            weight[SIZE],
            draws,
            neighbours,
            halves,
            here,
        )
        _tally(here, taken, counts[weight[WEIGHT_ROW]])
        here = gradients[weight[PLACE] :]
        _sample(
            weight[GRADIENT],
            weight[GRADIENT_FORMAT],
            weight[SIZE],
            draws,
            neighbours,
            halves,
            here,
        )
        _tally(here, taken, counts[weight[GRADIENT_ROW]])


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def count_lost(
    table: Any,
    draws: Any,
    neighbours: int,
    halves: Any,
    scratch: Any,
    old: Any,
    gradients: Any,
    formats: Any,
    half_ulps: Any,
    counts: Any,
) -> None:
    """Count updates, those that moved nothing, and those that other formats would lose.

    Args:
        table: The weights after the update.
        draws: As they were before it.
        neighbours: As in `_sample`.
        halves: As in `_sample`.
        scratch: int32, long enough for one sample.
        old: Bits of the weights before, as `count_weights` kept them.
        gradients: Bits of their gradients; where one is zero there was no update.
        formats: Lowest exponent field of each format.
        half_ulps: [format, exponent field] -> half an ulp.
        counts: [columns, rows]: updates, lost as it runs, lost in each format.
    """
    new = scratch.view(np.float32)
    before = old.view(np.float32)
    for at in range(len(table)):
        weight = table[at]
        row, place = weight[WEIGHT_ROW], weight[PLACE]
        taken = _sample(
            weight[WEIGHT],
            weight[WEIGHT_FORMAT],
            weight[SIZE],
            draws,
            neighbours,
            halves,
            scratch,
        )
        for i in range(taken):
            if gradients[place + i] & 0x7FFFFFFF == 0:
                continue
            change = abs(new[i] - before[place + i])
            counts[0, row] += 1
            counts[1, row] += change == 0
            field = (old[place + i] >> 23) & _TOP
            for f in range(len(formats)):
                counts[2 + f, row] += change < half_ulps[f, max(field, formats[f])]
