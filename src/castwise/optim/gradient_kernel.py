"""Gradients scaled in place by machine code on the CPU (numba).

One call for all gradients, by the table that `machine_checks` sums their squares from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from castwise.optim.addresses import bits_of, pointer, wide
from castwise.optim.machine_rows import BF16, COUNT, GRADIENT, GRADIENT_FORMAT

_COMPILE: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}


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
    """Multiply every gradient by the factor, in place, the last read first.

    Args:
        table: int64 [gradients, NUM_COLUMNS], as `machine_rows` says.
        factor: fp32.
    """
    for row in table:
        if row[GRADIENT_FORMAT] == BF16:
            _scale_low(row[GRADIENT], row[COUNT], factor)
        else:
            _scale_full(row[GRADIENT], row[COUNT], factor)
