"""Sums behind the measures of an error in machine code: one pass on the CPU (numba).

Operators of torch need some twenty-five passes and temporaries for the same. Where a
number is not finite, or a sum leaves the range of float64, the kernel gives up and the
operators decide.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from numba.np.numpy_support import carray
from numpy.typing import NDArray

from castwise.formats import Format
from castwise.numerics.half_table import halves
from castwise.optim.addresses import pointer

FP64, FP32, BF16, FP16 = 0, 1, 2, 3
_CODES = {
    torch.float64: FP64,
    torch.float32: FP32,
    torch.bfloat16: BF16,
    torch.float16: FP16,
}
_SMALLEST, _LARGEST = 1e-280, 1e280  # of a sum of squares: beyond them it lost digits
_COMPILE: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}

(
    ERROR_SQUARES,
    WANTED_SQUARES,
    GOT_SQUARES,
    PRODUCT,
    LARGEST_ERROR,
    LARGEST_WANTED,
    LARGEST_ULPS,
    ZEROS,
    WANTED_ZEROS,
    FLUSHED,
    NUM_SUMS,
) = range(11)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _add_pair(
    got: Any, wanted: Any, wanted_bits: Any, inverse_ulps: Any, n: int, sums: Any
) -> None:
    errors = wanteds = gots = product = 0.0
    largest = largest_wanted = largest_ulps = 0.0
    zeros = wanted_zeros = flushed = 0
    for i in range(n):
        w, g = wanted[i], np.float64(got[i])
        error = abs(g - w)
        errors += error * error
        wanteds += w * w
        gots += g * g
        product += g * w
        largest = max(largest, error)
        largest_wanted = max(largest_wanted, abs(w))
        ulps = error * inverse_ulps[(wanted_bits[i] >> 52) & 0x7FF]
        largest_ulps = max(largest_ulps, ulps)
        zeros += g == 0
        wanted_zeros += w == 0
        flushed += g == 0 and w != 0
    sums[ERROR_SQUARES] += errors
    sums[WANTED_SQUARES] += wanteds
    sums[GOT_SQUARES] += gots
    sums[PRODUCT] += product
    sums[LARGEST_ERROR] = max(sums[LARGEST_ERROR], largest)
    sums[LARGEST_WANTED] = max(sums[LARGEST_WANTED], largest_wanted)
    sums[LARGEST_ULPS] = max(sums[LARGEST_ULPS], largest_ulps)
    sums[ZEROS] += zeros
    sums[WANTED_ZEROS] += wanted_zeros
    sums[FLUSHED] += flushed


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _sum_pairs(table: Any, inverse_ulps: Any, halves: Any, sums: Any) -> None:
    """Add up over pairs; columns: format, address, address of the fp64, count."""
    for at in range(len(table)):
        fmt, address, n = table[at, 0], table[at, 1], table[at, 3]
        wanted = carray(pointer(table[at, 2]), (n,), np.float64)
        bits = carray(pointer(table[at, 2]), (n,), np.int64)
        if fmt == FP64:
            got = carray(pointer(address), (n,), np.float64)
            _add_pair(got, wanted, bits, inverse_ulps, n, sums)
            continue
        if fmt == FP32:
            narrow = carray(pointer(address), (n,), np.float32)
            _add_pair(narrow, wanted, bits, inverse_ulps, n, sums)
            continue
        half = carray(pointer(address), (n,), np.uint16)
        wide = np.empty(n, np.float32)
        wide_bits = wide.view(np.int32)
        if fmt == BF16:
            for i in range(n):
                wide_bits[i] = np.int32(half[i]) << 16
        else:
            for i in range(n):
                wide_bits[i] = halves[half[i]]
        _add_pair(wide, wanted, bits, inverse_ulps, n, sums)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sums:
    """What the measures of an error are made of."""

    error: float
    """Euclidean norm of the error."""

    wanted: float
    """Euclidean norm of the reference."""

    cosine: float
    """Cosine of the angle between both."""

    largest_error: float
    """Of an element."""

    largest_wanted: float
    """Of an element of the reference."""

    ulps: float
    """Largest error of an element in units of the last place of a format."""

    zero: float
    """Share of exact zeros in the candidate."""

    wanted_zero: float
    """Share of exact zeros in the reference."""

    flushed: float
    """Share of elements that became zero and should not be."""


def sums_of(
    candidate: list[torch.Tensor], reference: list[torch.Tensor], fmt: Format
) -> Sums | None:
    """Sum over pairs of tensors of equal shapes.

    None where operators have to: for other devices and formats, for complex numbers,
    and where something is not finite.
    """
    rows = []
    for one, other in zip(candidate, reference, strict=True):
        if not (_is_read(one) and _is_read(other) and other.dtype is torch.float64):
            return None
        if one.numel():
            rows.append((one.contiguous(), other.contiguous()))
    total = sum(one.numel() for one, _ in rows)
    if not total:
        return None
    table = np.array(
        [
            (_CODES[one.dtype], one.data_ptr(), other.data_ptr(), one.numel())
            for one, other in rows
        ],
        np.int64,
    )
    sums = np.zeros(NUM_SUMS)
    _sum_pairs(table, _inverse_ulps(fmt), halves(), sums)
    return _told(sums.tolist(), total)


def _told(sums: list[float], total: int) -> Sums | None:
    """Name the sums, if none of them lost its digits."""
    sizes = (sums[LARGEST_ERROR], sums[LARGEST_WANTED], total - sums[ZEROS])
    squares = (sums[ERROR_SQUARES], sums[WANTED_SQUARES], sums[GOT_SQUARES])
    for size, square in zip(sizes, squares, strict=True):
        if size != 0 and not _SMALLEST < square < _LARGEST:  # NaN is not
            return None
    error, wanted, got = map(math.sqrt, squares)
    if wanted and got:
        cosine = sums[PRODUCT] / (wanted * got)
    else:
        cosine = 1.0 if wanted == got else math.nan
    return Sums(
        error=error,
        wanted=wanted,
        cosine=cosine,
        largest_error=sums[LARGEST_ERROR],
        largest_wanted=sums[LARGEST_WANTED],
        ulps=sums[LARGEST_ULPS],
        zero=sums[ZEROS] / total,
        wanted_zero=sums[WANTED_ZEROS] / total,
        flushed=sums[FLUSHED] / total,
    )


def _is_read(tensor: torch.Tensor) -> bool:
    return (
        tensor.dtype in _CODES
        and tensor.device.type == "cpu"
        and type(tensor) in {torch.Tensor, torch.nn.Parameter}
    )


@functools.cache
def _inverse_ulps(fmt: Format) -> NDArray[np.float64]:
    """One over the spacing of a format's numbers, by exponent field of float64."""
    exponents = np.clip(np.arange(2048) - 1023, fmt.min_exponent, fmt.max_exponent)
    # what is closer to zero than 2^-971 is measured in the units of that, in fp64 alone
    powers = np.minimum(fmt.mantissa_bits - exponents, 1023)
    found: NDArray[np.float64] = np.ldexp(1.0, powers)
    return found
