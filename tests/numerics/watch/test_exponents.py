"""One histogram of exponents answers for every format and every power of two."""

from __future__ import annotations

import math

import pytest
import torch

from castwise.dtypes import DTYPES
from castwise.formats import FORMATS
from castwise.numerics.watch.exponents import ExponentHistogram
from castwise.rounding import round_nearest

WIDE = torch.float32, torch.float64


@pytest.mark.parametrize("fmt", ["fp16", "bf16", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("scale", [1.0, 2.0**10, 2.0**-6])
def test_the_shares_are_those_of_real_rounding(fmt: str, scale: float) -> None:
    """Numbers over 60 powers of two, rounded one by one, at several loss scales."""
    chance = torch.Generator().manual_seed(3)
    values = torch.randn(5003, generator=chance)
    values *= torch.exp2(torch.randint(-30, 30, (5003,), generator=chance).float())
    shares = ExponentHistogram.of(values).shares(fmt, scale)
    rounded = round_nearest(values * scale, fmt)
    form = FORMATS[fmt]
    gone = (rounded == 0) & (values != 0)
    small = (values * scale).abs() < form.smallest_normal
    beyond = (values * scale).abs() >= 2.0 ** (form.max_exponent + 1)
    assert shares.underflow == pytest.approx(float(gone.float().mean()))
    assert shares.subnormal == pytest.approx(float((small & ~gone).float().mean()))
    assert shares.overflow == pytest.approx(float(beyond.float().mean()))
    assert shares.zero == 0


def test_zeros_and_what_is_not_finite_are_counted_apart() -> None:
    """Zero is no underflow, and an infinity that was there is no overflow."""
    values = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -3.0, 1e-40])
    histogram = ExponentHistogram.of(values)
    assert (histogram.zeros, histogram.infinities, histogram.nans) == (2, 2, 1)
    assert histogram.total == 8
    shares = histogram.shares("fp16")
    assert shares.nonfinite == 3 / 8
    assert shares.zero == 2 / 8
    assert shares.underflow == 1 / 8
    assert shares.overflow == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *WIDE])
def test_every_dtype_counts_the_same_numbers_alike(dtype: torch.dtype) -> None:
    """Subnormals of fp16 are ordinary numbers, counted by their own exponents."""
    values = torch.exp2(torch.arange(-24, 16).double()).to(dtype)
    histogram = ExponentHistogram.of(values)
    assert histogram.lowest == -24
    assert histogram.counts == (1,) * 40


@pytest.mark.parametrize("fmt", sorted(DTYPES.keys() - {"fp64"}))
def test_the_largest_scale_is_the_last_that_overflows_nothing(fmt: str) -> None:
    """Twice that overflows."""
    values = torch.tensor([1e-3, 0.3, -0.7])
    histogram = ExponentHistogram.of(values)
    scale = histogram.largest_scale(fmt)
    assert scale is not None
    assert histogram.shares(fmt, scale).overflow == 0
    assert histogram.shares(fmt, 2 * scale).overflow > 0
    assert ExponentHistogram.of(torch.zeros(3)).largest_scale(fmt) is None


def test_a_histogram_is_plain_data() -> None:
    """It comes back from its record, and shifts by powers of two."""
    histogram = ExponentHistogram.of(torch.randn(1001))
    assert ExponentHistogram.from_record(histogram.record()) == histogram
    assert histogram.shifted(3).shifted(-3) == histogram
    half = ExponentHistogram.of(torch.full((3,), 0.5))
    assert half.shifted(-2) == ExponentHistogram.of(torch.full((3,), 0.125))
