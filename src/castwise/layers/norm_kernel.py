"""Norms of fp32 rows that come out in bf16, in machine code on the CPU (numba).

A row is read once and stays in the first-level cache: its moments, the normalised
numbers, the weights and the rounding to bf16 happen there. The backward does the same,
and adds up the gradients of weight and bias over rows: 64 rows in fp32, then in fp64.
Sums of a row may be taken in any order (`reassoc`), which is what lets a processor add
eight or sixteen numbers at a time; nothing else of fast-math is allowed.

    forward     h = (x - mean) / sqrt(var + eps)        y = bf16(h w + b)
    backward    u = w dy        dx = (u - mean(u) - h mean(u h)) / sqrt(var + eps)
                dw = sum dy h   db = sum dy

An RMS norm is the same with both means of x and of u left out, and without b.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from castwise.optim.addresses import bits_of, pointer, wide

ROWS_TOGETHER = 64  # rows whose gradients of the weight are added in fp32
_COMPILE: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
_SUMS: dict[str, Any] = {**_COMPILE, "fastmath": {"reassoc"}}


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _to_bf16(number: Any) -> Any:
    """Return the bits of a number in bf16: to nearest, ties to even, NaN to NaN."""
    bits = np.int32(bits_of(number))
    odd = np.int32(np.int32(bits >> np.int32(16)) & np.int32(1))
    rounded = np.int32(np.int32(bits + np.int32(0x7FFF)) + odd)
    high = np.int16(rounded >> np.int32(16))
    return high if number == number else np.int16(0x7FC0)  # noqa: PLR0124 -- of NaN


@njit(**_SUMS)  # type: ignore[untyped-decorator]
def _mean(x: Any, dim: int) -> Any:
    total = np.float32(0)
    for i in range(dim):
        total += x[i]
    return total / np.float32(dim)


@njit(**_SUMS)  # type: ignore[untyped-decorator]
def _variance(x: Any, mean: Any, dim: int) -> Any:
    total = np.float32(0)
    for i in range(dim):
        apart = x[i] - mean
        total += apart * apart
    return total / np.float32(dim)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _normalise(
    x: Any, w: Any, b: Any, y: Any, mean: Any, inverse: Any, dim: int
) -> None:
    for i in range(dim):
        y[i] = _to_bf16((x[i] - mean) * inverse * w[i] + b[i])


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def forward(
    addresses: Any, dim: int, start: int, stop: int, eps: Any, centred: bool
) -> None:
    """Normalise rows from `start` to `stop`.

    Args:
        addresses: int64 [6], of x fp32 [R, D], w and b fp32 [D], y bf16 [R, D], means
            and inverse deviations fp32 [R].
        dim: D.
        start: The first row.
        stop: The row after the last.
        eps: fp32, what is added to a variance.
        centred: Whether the mean is taken off, as in a layer norm.
    """
    w = carray(pointer(addresses[1]), (dim,), np.float32)
    b = carray(pointer(addresses[2]), (dim,), np.float32)
    means = carray(pointer(addresses[4]), (stop,), np.float32)
    inverses = carray(pointer(addresses[5]), (stop,), np.float32)
    for row in range(start, stop):
        x = carray(pointer(addresses[0] + 4 * dim * row), (dim,), np.float32)
        y = carray(pointer(addresses[3] + 2 * dim * row), (dim,), np.int16)
        mean = _mean(x, dim) if centred else np.float32(0)
        inverse = np.float32(1) / np.sqrt(_variance(x, mean, dim) + eps)
        means[row], inverses[row] = mean, inverse
        _normalise(x, w, b, y, mean, inverse, dim)


@njit(**_SUMS)  # type: ignore[untyped-decorator]
def _means_of_backward(
    x: Any, w: Any, dy: Any, mean: Any, inverse: Any, dim: int
) -> Any:
    """Return mean(u) and mean(u h)."""
    plain, along = np.float32(0), np.float32(0)
    for i in range(dim):
        u = w[i] * wide(dy[i])
        plain += u
        along += u * ((x[i] - mean) * inverse)
    return plain / np.float32(dim), along / np.float32(dim)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _gradient_of_row(
    x: Any, w: Any, dy: Any, dx: Any, numbers: Any, dim: int
) -> None:
    mean, inverse, plain, along = numbers
    for i in range(dim):
        h = (x[i] - mean) * inverse
        dx[i] = (w[i] * wide(dy[i]) - plain - h * along) * inverse


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _add_to_weights(
    x: Any, dy: Any, dw: Any, db: Any, mean: Any, inverse: Any, dim: int
) -> None:
    for i in range(dim):
        g = wide(dy[i])
        dw[i] += g * ((x[i] - mean) * inverse)
        db[i] += g


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def backward(
    addresses: Any, dim: int, start: int, stop: int, centred: bool, sums: Any
) -> None:
    """Differentiate rows from `start` to `stop`.

    Args:
        addresses: int64 [6], of x, w, dy bf16 [R, D], dx fp32 [R, D], means and inverse
            deviations.
        dim: D.
        start: The first row.
        stop: The row after the last.
        centred: As in `forward`.
        sums: fp64 [2, D], to which dw and db of these rows are added.
    """
    w = carray(pointer(addresses[1]), (dim,), np.float32)
    means = carray(pointer(addresses[4]), (stop,), np.float32)
    inverses = carray(pointer(addresses[5]), (stop,), np.float32)
    near = np.zeros((2, dim), np.float32)
    for row in range(start, stop):
        x = carray(pointer(addresses[0] + 4 * dim * row), (dim,), np.float32)
        dy = carray(pointer(addresses[2] + 2 * dim * row), (dim,), np.int16)
        dx = carray(pointer(addresses[3] + 4 * dim * row), (dim,), np.float32)
        mean, inverse = means[row], inverses[row]
        plain, along = _means_of_backward(x, w, dy, mean, inverse, dim)
        if not centred:
            plain = np.float32(0)
        _gradient_of_row(x, w, dy, dx, (mean, inverse, plain, along), dim)
        _add_to_weights(x, dy, near[0], near[1], mean, inverse, dim)
        if (row - start) % ROWS_TOGETHER == ROWS_TOGETHER - 1 or row == stop - 1:
            sums += near
            near[:] = 0
