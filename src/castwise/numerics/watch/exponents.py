"""Histograms of exponents: one answers for every format and every loss scale.

A number in [2^e, 2^(e+1)) counts at e. A loss scale of 2^k moves everything by k, and
a format ends at two exponents, so what would underflow or overflow is read off:

    fp16      2^-25 ... 2^-15 subnormal    2^-14 ... 2^15 normal    2^16 ... infinite

Counted are the bits: the exponent field of an fp32 number is `bits >> 23 & 255`. Within
one exponent a histogram cannot see, so two shares are of whole exponents: a number of
half the smallest subnormal exactly rounds to zero and counts as kept, and one between
the largest number and the next power of two overflows and counts as inside (in
fp8_e4m3 that is from 464 to 512).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from castwise.formats import Format, parse_format

LOWEST, HIGHEST = -150, 128
"""Exponents with a bin of their own; beyond them, the outermost bins count."""

NUM_EXPONENTS = HIGHEST - LOWEST + 1
ZERO, INFINITE, NAN = NUM_EXPONENTS, NUM_EXPONENTS + 1, NUM_EXPONENTS + 2
NUM_BINS = NUM_EXPONENTS + 3


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeShares:
    """What becomes of numbers in a format; shares of all of them."""

    zero: float
    """Were zero already."""

    underflow: float
    """Round to zero."""

    subnormal: float
    """Keep some of their digits."""

    overflow: float
    """Become infinite, or NaN where there is no infinity."""

    nonfinite: float
    """Were infinite or NaN already."""

    @property
    def kept(self) -> float:
        """Keep every digit that the format has, or are zero."""
        return 1 - self.underflow - self.subnormal - self.overflow - self.nonfinite


@dataclass(frozen=True, kw_only=True, slots=True)
class ExponentHistogram:
    """How many numbers have which exponent."""

    lowest: int
    """Exponent of the first count."""

    counts: tuple[int, ...]
    """One for each exponent from `lowest` on; none are zero at the ends."""

    zeros: int = 0
    """Numbers that are zero."""

    infinities: int = 0
    """Numbers that are infinite."""

    nans: int = 0
    """Numbers that are NaN."""

    @property
    def total(self) -> int:
        """All numbers."""
        return sum(self.counts) + self.zeros + self.infinities + self.nans

    @property
    def highest(self) -> int | None:
        """The largest exponent; none if every number is zero or not finite."""
        return self.lowest + len(self.counts) - 1 if self.counts else None

    def shares(self, fmt: str | Format, scale: float = 1.0) -> RangeShares:
        """What becomes of the numbers, times a scale, in a format."""
        form = parse_format(fmt)
        shift = math.floor(math.log2(scale))
        smallest = form.min_exponent - form.mantissa_bits
        below = under = over = 0
        for at, count in enumerate(self.counts, self.lowest + shift):
            if at < smallest - 1:
                under += count
            elif at < form.min_exponent:
                below += count
            elif at > form.max_exponent:
                over += count
        total = max(1, self.total)
        return RangeShares(
            zero=self.zeros / total,
            underflow=under / total,
            subnormal=below / total,
            overflow=over / total,
            nonfinite=(self.infinities + self.nans) / total,
        )

    def largest_scale(self, fmt: str | Format) -> float | None:
        """The largest power of two by which nothing overflows in a format."""
        if self.highest is None:
            return None
        return 2.0 ** (parse_format(fmt).max_exponent - self.highest)

    def shifted(self, exponents: int) -> ExponentHistogram:
        """The histogram of the same numbers times a power of two."""
        return replace(self, lowest=self.lowest + exponents)

    def record(self) -> dict[str, Any]:
        """Plain values for JSON; `from_record` reads them."""
        return {**asdict(self), "counts": list(self.counts)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ExponentHistogram:
        """Build a histogram from what `record` gave."""
        return cls(**{**record, "counts": tuple(record["counts"])})

    @classmethod
    def of(cls, values: torch.Tensor) -> ExponentHistogram:
        """Count a whole tensor."""
        bins = exponent_bins(values.detach().reshape(-1))
        counts = torch.bincount(bins, minlength=NUM_BINS)
        return cls.from_bins(counts[None])[0]

    @classmethod
    def from_bins(cls, bins: torch.Tensor) -> list[ExponentHistogram]:
        """Build a histogram from each row of a table of `NUM_BINS` counts."""
        rows = bins.numpy()
        used = rows[:, :NUM_EXPONENTS] != 0
        firsts = used.argmax(1).tolist()
        lasts = (NUM_EXPONENTS - used[:, ::-1].argmax(1)).tolist()
        others = rows[:, NUM_EXPONENTS:].tolist()
        return [
            cls(
                lowest=LOWEST + first if has else 0,
                counts=tuple(row[first:last].tolist()) if has else (),
                zeros=zeros,
                infinities=infinities,
                nans=nans,
            )
            for row, first, last, has, (zeros, infinities, nans) in zip(
                rows, firsts, lasts, used.any(1).tolist(), others, strict=True
            )
        ]


def exponent_bins(values: torch.Tensor) -> torch.Tensor:
    """Return for each number of a vector the bin that it counts in, as int64."""
    if values.dtype is torch.float64:
        return _bins(values, torch.int64, 52, 11)
    return _bins(values.float(), torch.int32, 23, 8)


def _bins(
    values: torch.Tensor, integers: torch.dtype, mantissa_bits: int, exponent_bits: int
) -> torch.Tensor:
    """Bins by the bits: s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm."""
    top = (1 << exponent_bits) - 1
    bias = top >> 1
    magnitude = values.view(integers) & ((1 << (mantissa_bits + exponent_bits)) - 1)
    field = magnitude >> mantissa_bits
    # subnormals of fp32 share the lowest bin, far below what any 16-bit format holds
    bins = (field + (-bias - LOWEST)).clamp_(0, NUM_EXPONENTS - 1)
    bins = bins.masked_fill_(field == 0, 0).masked_fill_(magnitude == 0, ZERO)
    infinite = magnitude == top << mantissa_bits
    bins = bins.masked_fill_(field == top, NAN).masked_fill_(infinite, INFINITE)
    return bins.long()
