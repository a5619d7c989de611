"""Gradients summed and scaled in place by machine code on the CPU (numba).

One call for all gradients, by a table of addresses. Squares are added into lanes that
lie side by side, so that a processor adds eight or sixteen at a time without changing
the order that is written here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from castwise.optim.addresses import bits_of, pointer, wide

ADDRESS, COUNT, IS_BF16, NUM_COLUMNS = 0, 1, 2, 3
SPAN = 2048  # lanes of a sum: they stay in the first-level cache
_COMPILE: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _add(n: int, values: Any, factor: Any, lanes: Any) -> None:
    for i in range(n):
        scaled = lanes.dtype.type(wide(values[i]) * factor)
        lanes[i] += scaled * scaled


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _sum(row: Any, factor: Any, lanes: Any) -> float:
    """Return the sum of the squares of one gradient times the factor."""
    lanes[:] = 0
    for start in range(0, row[COUNT], SPAN):
        n = min(SPAN, row[COUNT] - start)
        if row[IS_BF16]:
            low = carray(pointer(row[ADDRESS] + 2 * start), (SPAN,), np.int16)
            _add(n, low, factor, lanes)
        else:
            full = carray(pointer(row[ADDRESS] + 4 * start), (SPAN,), np.float32)
            _add(n, full, factor, lanes)
    total = 0.0
    for i in range(SPAN):
        total += lanes[i]
    return total


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def square_sums(table: Any, factor: Any, out: Any) -> None:
    """Sum the squares of each gradient times the factor.

    Args:
        table: int64 [gradients, NUM_COLUMNS].
        factor: fp32.
        out: fp64 [gradients], written; not finite exactly where a gradient, times the
            factor, is not: where squares overflow fp32, they are added in fp64.
    """
    lanes = np.empty(SPAN, np.float32)
    for at in range(len(table)):
        out[at] = _sum(table[at], factor, lanes)
        if not np.isfinite(out[at]):
            out[at] = _sum(table[at], factor, np.empty(SPAN, np.float64))


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _scale_full(address: int, n: int, factor: Any) -> None:
    values = carray(pointer(address), (n,), np.float32)
    for i in range(n):
        values[i] *= factor


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _scale_low(address: int, n: int, factor: Any) -> None:
    """Multiply, and round to nearest, ties to even; all numbers are finite here."""
    low = carray(pointer(address), (n,), np.int16)
    for i in range(n):
        bits = np.int32(bits_of(wide(low[i]) * factor))
        odd = np.int32(bits >> np.int32(16)) & np.int32(1)
        rounded = np.int32(bits + np.int32(0x7FFF)) + np.int32(odd)
        low[i] = np.int16(np.int32(rounded) >> np.int32(16))


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def scale(table: Any, factor: Any) -> None:
    """Multiply every gradient by the factor, in place, the last read first."""
    for at in range(len(table) - 1, -1, -1):
        row = table[at]
        if row[IS_BF16]:
            _scale_low(row[ADDRESS], row[COUNT], factor)
        else:
            _scale_full(row[ADDRESS], row[COUNT], factor)
