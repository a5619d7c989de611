"""Norms of fp32 rows that come out in bf16, in machine code on the CPU (numba).

A row is read once and stays in the first-level cache: its moments, the normalised
numbers, the weights and the rounding to bf16 happen there. The backward does the same,
and adds up the gradients of weight and bias over rows: 64 rows in fp32, then in fp64.
Sums of a row may be taken in any order (`reassoc`), which is what lets a processor add
eight or sixteen numbers at a time; nothing else of fast-math is allowed.

    forward     h = (x - mean) / sqrt(var + eps)        y = bf16(h w + b)
    backward    u = w dy        dx = (u - mean(u) - h mean(u h)) / sqrt(var + eps)
                dw = sum dy h   db = sum dy

An RMS norm is the same with both means, of x and of u, left out, and without b. Numbers
in bf16 come and go as their bits: the upper half of those in fp32.

Shapes: R rows of D numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

ROWS_TOGETHER = 64  # rows whose gradients of the weight are added in fp32
_COMPILE: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
_SUMS: dict[str, Any] = {**_COMPILE, "fastmath": {"reassoc"}}


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _widen(low: Any, bits: Any) -> None:
    """Write numbers in bf16 as those of fp32."""
    for i in range(len(bits)):
        bits[i] = np.int32(low[i]) << np.int32(16)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _round(bits: Any, low: Any) -> None:
    """Round to nearest, ties to even; a NaN stays one, whatever its lower half."""
    for i in range(len(bits)):
        odd = np.int32(bits[i] >> np.int32(16)) & np.int32(1)
        rounded = np.int32(bits[i] + np.int32(0x7FFF)) + np.int32(odd)
        size = bits[i] & np.int32(0x7FFFFFFF)
        is_nan = size > np.int32(0x7F800000)
        low[i] = np.int16(0x7FC0) if is_nan else np.int16(rounded >> np.int32(16))


@njit(**_SUMS)  # type: ignore[untyped-decorator]
def _mean(x: Any) -> Any:
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i]
    return total / np.float32(len(x))


@njit(**_SUMS)  # type: ignore[untyped-decorator]
def _variance(x: Any, mean: Any) -> Any:
    total = np.float32(0)
    for i in range(len(x)):
        apart = x[i] - mean
        total += apart * apart
    return total / np.float32(len(x))


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _normalise(x: Any, w: Any, b: Any, y: Any, mean: Any, inverse: Any) -> None:
    for i in range(len(y)):
        y[i] = (x[i] - mean) * inverse * w[i] + b[i]


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def forward(
    x: Any, w: Any, b: Any, y: Any, means: Any, inverses: Any, eps: Any, centred: bool
) -> None:
    """Normalise rows.

    Args:
        x: fp32 [R, D].
        w: fp32 [D].
        b: fp32 [D].
        y: bits of bf16, int16 [R, D], written.
        means: fp32 [R], written.
        inverses: fp32 [R], of the deviations, written.
        eps: fp32, what is added to a variance.
        centred: Whether the mean is taken off, as in a layer norm.
    """
    room = np.empty(x.shape[1], np.float32)
    for row in range(len(x)):
        mean = _mean(x[row]) if centred else np.float32(0)
        inverse = np.float32(1) / np.sqrt(_variance(x[row], mean) + eps)
        means[row], inverses[row] = mean, inverse
        _normalise(x[row], w, b, room, mean, inverse)
        _round(room.view(np.int32), y[row])


@njit(**_SUMS)  # type: ignore[untyped-decorator]
def _means_of_backward(x: Any, w: Any, dy: Any, mean: Any, inverse: Any) -> Any:
    """Return mean(u) and mean(u h)."""
    plain, along = np.float32(0), np.float32(0)
    for i in range(len(dy)):
        u = w[i] * dy[i]
        plain += u
        along += u * ((x[i] - mean) * inverse)
    num = np.float32(len(dy))
    return plain / num, along / num


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _gradient_of_row(x: Any, w: Any, dy: Any, dx: Any, numbers: Any) -> None:
    mean, inverse, plain, along = numbers
    for i in range(len(dy)):
        h = (x[i] - mean) * inverse
        dx[i] = (w[i] * dy[i] - plain - h * along) * inverse


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _add_to_weights(x: Any, dy: Any, dw: Any, db: Any, mean: Any, inverse: Any) -> None:
    for i in range(len(dy)):
        dw[i] += dy[i] * ((x[i] - mean) * inverse)
        db[i] += dy[i]


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def backward(
    x: Any,
    w: Any,
    dy: Any,
    dx: Any,
    means: Any,
    inverses: Any,
    centred: bool,
    sums: Any,
) -> None:
    """Differentiate rows.

    Args:
        x: fp32 [R, D].
        w: fp32 [D].
        dy: bits of bf16, int16 [R, D].
        dx: fp32 [R, D], written.
        means: fp32 [R].
        inverses: fp32 [R].
        centred: As in `forward`.
        sums: fp64 [2, D], to which dw and db of these rows are added.
    """
    dim = x.shape[1]
    near = np.zeros((2, dim), np.float32)
    bits = np.empty(dim, np.int32)
    given = bits.view(np.float32)
    for row in range(len(x)):
        mean, inverse = means[row], inverses[row]
        _widen(dy[row], bits)
        plain, along = _means_of_backward(x[row], w, given, mean, inverse)
        if not centred:
            plain = np.float32(0)
        _gradient_of_row(x[row], w, given, dx[row], (mean, inverse, plain, along))
        _add_to_weights(x[row], given, near[0], near[1], mean, inverse)
        if row % ROWS_TOGETHER == ROWS_TOGETHER - 1 or row == len(x) - 1:
            sums += near
            near[:] = 0
