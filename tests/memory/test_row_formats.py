from __future__ import annotations

import math

import pytest
import torch

from castwise.errors import SettingsError
from castwise.memory.row_formats import ROW_FORMATS, row_dims, row_format

LIMITS = {"fp16": 2.0**-11, "bf16": 2.0**-8, "int8": 1 / 254}
"""Largest error: of each number in fp16 and bf16, of a block's largest in int8."""

SHAPES = [(3, 5, 256), (2, 7, 100), (4, 6, 5, 5), (1025,), (3, 320), ()]


def there_and_back(fmt: str, x: torch.Tensor) -> torch.Tensor:
    """What comes back of a tensor."""
    narrow, widen = row_format(fmt, x)
    return widen(*narrow(x))


@pytest.mark.parametrize("magnitude", [1.0, 3e38, 1e-30, 7e4, 1e-7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", ROW_FORMATS)
def test_numbers_of_any_size_come_back_within_the_error_of_their_format(
    fmt: str, shape: tuple[int, ...], magnitude: float
) -> None:
    """A row brings its own scale, so neither large nor small ones are lost."""
    generator = torch.Generator().manual_seed(3)
    x = (torch.rand(shape, generator=generator) * 2 - 1) * magnitude
    back = there_and_back(fmt, x)
    assert back.shape == x.shape
    assert back.dtype == x.dtype
    off = (back.double() - x.double()).abs()
    allowed = x.double().abs() if fmt != "int8" else x.double().abs().amax()
    # bf16 has no subnormals of its own below 1e-38, fp16 none below its scale's
    assert bool((off <= 1.001 * LIMITS[fmt] * allowed + magnitude * 2.0**-37).all())


@pytest.mark.parametrize("fmt", ["fp16", "bf16"])
def test_infinities_and_nan_stay_what_they_are(fmt: str) -> None:
    """What a loss scale looks for, and what a mask holds, is not lost."""
    x = torch.randn(4, 300)
    x[0, 3], x[0, 5], x[1, 0] = math.inf, -math.inf, math.nan
    back = there_and_back(fmt, x)
    assert torch.equal(back.isfinite(), x.isfinite())
    assert back[0, 3] == math.inf
    assert back[0, 5] == -math.inf
    assert back[1, 0].isnan()
    finite = x.isfinite()
    assert torch.allclose(back[finite], x[finite], rtol=2.0**-8)


def test_in_8_bits_a_mask_stays_and_an_overflow_is_seen() -> None:
    """-inf has a code; +inf and NaN make their block NaN, and no finite number."""
    x = torch.randn(3, 256)
    x[0, 3], x[1, 70], x[2, 200] = -math.inf, math.inf, math.nan
    back = there_and_back("int8", x)
    assert back[0, 3] == -math.inf
    assert back[0].isfinite().sum() == 255
    assert back[1, 64:128].isnan().all()
    assert back[1, :64].isfinite().all()
    assert back[2, 192:].isnan().all()


@pytest.mark.parametrize("fmt", ROW_FORMATS)
def test_zeros_come_back_as_zeros(fmt: str) -> None:
    """A row without a largest number has no scale to divide by."""
    assert torch.equal(there_and_back(fmt, torch.zeros(3, 300)), torch.zeros(3, 300))


def test_low_formats_come_back_in_their_own() -> None:
    """8 bits are taken from bf16 and fp16 too."""
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(5, 192).to(dtype)
        back = there_and_back("int8", x)
        assert back.dtype is dtype
        assert (back - x).abs().max() <= x.abs().max() / 120


def test_a_row_is_what_lies_together_in_memory() -> None:
    """Dimensions are taken from the innermost outwards until a scale is worth it."""
    assert row_dims(torch.empty(8, 9, 256), 256) == (2,)
    assert row_dims(torch.empty(8, 9, 64), 256) == (1, 2)
    assert row_dims(torch.empty(8, 128, 4, 64).transpose(1, 2), 256) == (1, 3)
    last = torch.empty(2, 96, 7, 7, memory_format=torch.channels_last)
    assert row_dims(last, 64) == (1,)
    assert row_dims(torch.empty(()), 64) == ()


def test_an_unknown_format_is_refused() -> None:
    """The message says which there are."""
    with pytest.raises(SettingsError, match="fp16, bf16, int8, got 'fp8'"):
        row_format("fp8", torch.empty(3))
