"""Counting in machine code, on the CPU: one pass over what was sampled (numba).

Operators of torch need a pass and a temporary for each comparison, ten of them in all.
This is the same counting in one loop; other devices keep the operators, and both give
the same counts.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from castwise.numerics.watch.exponents import INFINITE, LOWEST, NAN, ZERO

_FIRST = -127 - LOWEST  # the bin of exponent field 0, were it a normal number
_TOP = 255


@numba.njit(cache=True, nogil=True)
def tally(
    bits: NDArray[np.int32],
    rows: NDArray[np.int64],
    sizes: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> None:
    """Count numbers of fp32 by their bits; `rows` and `sizes` say whose they are."""
    place = 0
    for at in range(len(rows)):
        count = counts[rows[at]]
        for i in range(place, place + sizes[at]):
            magnitude = bits[i] & 0x7FFFFFFF
            field = magnitude >> 23
            if magnitude == 0:
                count[ZERO] += 1
            elif field == 0:
                count[0] += 1
            elif field < _TOP:
                count[field + _FIRST] += 1
            elif magnitude == _TOP << 23:
                count[INFINITE] += 1
            else:
                count[NAN] += 1
        place += sizes[at]


@numba.njit(cache=True, nogil=True)
def tally_lost(
    old: NDArray[np.float32],
    old_bits: NDArray[np.int32],
    new: NDArray[np.float32],
    gradient: NDArray[np.float32],
    rows: NDArray[np.int64],
    sizes: NDArray[np.int64],
    formats: NDArray[np.int64],
    halves: NDArray[np.float32],
    counts: NDArray[np.int64],
) -> None:
    """Count updates, those that moved nothing, and those that other formats would lose.

    Args:
        old: Weights before.
        old_bits: The same as bits.
        new: Weights after.
        gradient: Their gradients; where it is zero there was no update.
        rows: Whose numbers follow, one for each run of them.
        sizes: How many.
        formats: Lowest exponent field of each format.
        halves: [format, exponent field] -> half an ulp.
        counts: [columns, rows]: updates, lost as it runs, lost in each format.
    """
    place = 0
    for at in range(len(rows)):
        row = rows[at]
        for i in range(place, place + sizes[at]):
            if gradient[i] == 0:
                continue
            change = abs(new[i] - old[i])
            counts[0, row] += 1
            counts[1, row] += change == 0
            field = (old_bits[i] >> 23) & _TOP
            for f in range(len(formats)):
                half = halves[f, max(field, formats[f])]
                counts[2 + f, row] += change < half
        place += sizes[at]
