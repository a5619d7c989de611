from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from castwise.dtypes import DTYPES, dtype_of
from castwise.errors import FormatError, UnsupportedFormatError
from castwise.formats import FORMATS, Format
from castwise.rounding import (
    cast_nearest,
    cast_stochastic,
    round_nearest,
    round_stochastic,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    Rounding = Callable[..., torch.Tensor]

SMALL = {"bf16": torch.int16, "fp16": torch.int16, "fp8_e4m3": torch.int8} | {
    "fp8_e5m2": torch.int8
}
NARROWER = [name for name in FORMATS if name != "fp64"]
SOURCES = [torch.float32, torch.float64]
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def finite_numbers(name: str) -> torch.Tensor:
    """Every finite number of a small format, ascending, as fp64."""
    width = FORMATS[name].bits
    patterns = torch.arange(-(1 << (width - 1)), 1 << (width - 1)).to(SMALL[name])
    numbers = patterns.view(DTYPES[name]).double()
    return numbers[numbers.isfinite()].unique()


def neighbourhoods(name: str, dtype: torch.dtype) -> torch.Tensor:
    """Each number of a format and each midpoint, with one ulp to either side.

    Past the largest number: the next one if there were one, its midpoint, and on.
    """
    numbers = finite_numbers(name)
    beyond = numbers[-1] + (numbers[-1] - numbers[-2]) * torch.tensor([1.0, 2.0, 99.0])
    numbers = torch.cat((-beyond.flip(0), numbers, beyond))
    midpoints = (numbers[1:] + numbers[:-1]) / 2
    centres = torch.cat((numbers, midpoints)).to(dtype)
    up = torch.full_like(centres, math.inf)
    near = (centres, centres.nextafter(up), centres.nextafter(-up))
    return torch.cat(near)


def every_kind_of_number(dtype: torch.dtype, num: int, seed: int = 0) -> torch.Tensor:
    """Random bit patterns: NaNs, infinities, subnormals and all exponents alike."""
    generator = torch.Generator().manual_seed(seed)
    width = dtype.itemsize * 8
    bits = torch.randint(
        -(2 ** (width - 1)),
        2 ** (width - 1) - 1,
        (num,),
        dtype=INTEGERS[dtype],
        generator=generator,
    )
    return bits.view(dtype)


def spacing(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Distance of the numbers of a format around each finite `x`, in fp64."""
    exponent = (x.double().frexp().exponent - 1).clamp(min=fmt.min_exponent)
    one = torch.ones_like(x, dtype=torch.float64)
    return one.ldexp(exponent - fmt.mantissa_bits)


def naive_nearest(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The slow original: count in spacings, round the count half to even, in fp64."""
    step = spacing(x, fmt)
    rounded = (x.double() / step).round() * step
    largest = torch.full_like(rounded, math.inf if fmt.has_infinity else math.nan)
    rounded = torch.where(rounded.abs() > fmt.max, largest, rounded)
    infinite = x.isinf() if fmt.has_infinity else torch.zeros_like(x, dtype=torch.bool)
    return torch.where(infinite, x.double(), rounded.copysign(x.double()))


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit by bit, signs of zero included; a NaN equals any NaN."""
    expected = expected.to(got.dtype)
    same = got.view(INTEGERS[got.dtype]) == expected.view(INTEGERS[got.dtype])
    same |= got.isnan() & expected.isnan()
    assert same.all(), (got[~same][:5], expected[~same][:5])


@pytest.mark.parametrize("name", SMALL)
def test_nearest_is_the_cast_of_torch_around_every_number(name: str) -> None:
    """Numbers, ties, one ulp to either side, subnormals and overflow, bit by bit."""
    x = neighbourhoods(name, torch.float32)
    assert x.numel() > 3 * 2 ** FORMATS[name].bits * 0.9
    got = round_nearest(x, name, saturate=name == "fp8_e4m3")
    assert_same_bits(got, x.to(DTYPES[name]).float())


@pytest.mark.parametrize("name", SMALL)
def test_nearest_is_the_cast_of_torch_on_a_million_bit_patterns(name: str) -> None:
    """Random fp32 patterns: the emulation and the cast never differ."""
    x = every_kind_of_number(torch.float32, 1_000_003)
    got = round_nearest(x, name, saturate=name == "fp8_e4m3")
    assert_same_bits(got, x.to(DTYPES[name]).float())


def test_nearest_from_fp64_to_fp32_is_the_cast_of_torch() -> None:
    """Random fp64 patterns, and fp64 numbers around the subnormals of fp32."""
    x = every_kind_of_number(torch.float64, 500_009)
    around = every_kind_of_number(torch.float32, 500_009, seed=1).double()
    generator = torch.Generator().manual_seed(11)
    noise = torch.randn(500_009, generator=generator, dtype=torch.float64)
    near = around * (1 + 2.0**-24 + 2.0**-50 * noise)
    x = torch.cat((x, near, near * 2.0**-100))
    assert_same_bits(round_nearest(x, "fp32"), x.float().double())


@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("name", FORMATS)
def test_nearest_agrees_with_counting_in_fp64(name: str, dtype: torch.dtype) -> None:
    """Every format, tf32 too, against an original that never looks at a bit."""
    fmt = FORMATS[name]
    x = every_kind_of_number(dtype, 200_003, seed=2)
    if dtype is torch.float64:  # most fp64 exponents are far outside the small formats
        generator = torch.Generator().manual_seed(3)
        exponents = torch.randint(-160, 135, x.shape, generator=generator)
        x = torch.cat((x, x.frexp().mantissa.ldexp(exponents)))
    expected = x if name == "fp64" else naive_nearest(x, fmt)
    assert_same_bits(round_nearest(x, name), expected)


@pytest.mark.parametrize("name", SMALL)
def test_nearest_from_fp64_rounds_once(name: str) -> None:
    """An fp64 ulp beside a midpoint decides; going through fp32 would lose it."""
    x = neighbourhoods(name, torch.float64)
    assert_same_bits(round_nearest(x, name), naive_nearest(x, FORMATS[name]))
    numbers = finite_numbers(name)
    midpoints = (numbers[1:] + numbers[:-1]) / 2
    above = midpoints.nextafter(torch.tensor(math.inf, dtype=torch.float64))
    assert torch.equal(round_nearest(above, name), numbers[1:])
    assert torch.equal(cast_nearest(above, name).double(), numbers[1:])


@pytest.mark.parametrize("name", NARROWER)
def test_the_overflow_threshold_is_half_a_step_past_the_largest(name: str) -> None:
    """Below it the largest number comes out; above it infinity, or NaN in fp8_e4m3."""
    fmt = FORMATS[name]
    step = math.ldexp(1.0, fmt.max_exponent - fmt.mantissa_bits)
    threshold = torch.tensor(fmt.max + step / 2, dtype=torch.float64)
    below = threshold.nextafter(torch.zeros_like(threshold))
    above = threshold.nextafter(2 * threshold)
    x = torch.stack((below, -below, above, -above))
    got = round_nearest(x, name)
    assert got[:2].tolist() == [fmt.max, -fmt.max]
    if fmt.has_infinity:
        assert got[2:].tolist() == [math.inf, -math.inf]
        assert round_nearest(threshold, name).item() == math.inf  # the tie to even
    else:
        assert got[2:].isnan().all()
        assert round_nearest(threshold, name).item() == fmt.max  # 448 is the even one
    assert round_nearest(x, name, saturate=True).abs().eq(fmt.max).all()


@pytest.mark.parametrize("name", NARROWER)
@pytest.mark.parametrize("rounding", [round_nearest, round_stochastic])
def test_infinities_stay_where_the_format_has_them(
    rounding: Rounding, name: str
) -> None:
    """An infinity is no overflow of this rounding; fp8_e4m3 has none to say it with."""
    x = torch.tensor([math.inf, -math.inf])
    plain, saturated = rounding(x, name), rounding(x, name, saturate=True)
    if FORMATS[name].has_infinity:
        assert torch.equal(plain, x)
        assert torch.equal(saturated, x)
    else:
        assert plain.isnan().all()
        assert saturated.tolist() == [448.0, -448.0]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("rounding", [round_nearest, round_stochastic])
def test_nans_keep_every_bit(rounding: Rounding, dtype: torch.dtype, name: str) -> None:
    """Sign and payload of a NaN pass through, signalling or quiet."""
    x = every_kind_of_number(dtype, 300_000)
    payloads = INTEGERS[dtype]
    infinity = torch.tensor(math.inf, dtype=dtype).view(payloads)
    sign = torch.iinfo(payloads).min
    bits = torch.tensor([1, 2, 5, 1 << 20, 1 << 22]).to(payloads) | infinity
    nans = torch.cat((bits, bits | sign)).view(dtype)
    assert nans.isnan().all()
    assert x.isnan().any()
    for each in (nans, x[x.isnan()]):
        got = rounding(each, name, saturate=True)
        assert torch.equal(got.view(payloads), each.view(payloads))


@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("rounding", [round_nearest, round_stochastic])
def test_numbers_of_the_format_stay(
    rounding: Rounding, name: str, dtype: torch.dtype
) -> None:
    """Each finite number comes out as it is, the sign of zero included."""
    x = torch.cat((finite_numbers(name), torch.tensor([-0.0]))).to(dtype)
    assert_same_bits(rounding(x, name), x)


@pytest.mark.parametrize("name", NARROWER)
def test_stochastic_never_leaves_the_two_neighbours(name: str) -> None:
    """Whatever the draw, the result is the number just below or just above."""
    fmt = FORMATS[name]
    generator = torch.Generator().manual_seed(4)
    mantissas = torch.rand(100_003, generator=generator, dtype=torch.float64) - 0.5
    low = fmt.min_exponent - fmt.mantissa_bits - 30
    exponents = torch.randint(
        low, fmt.max_exponent, mantissas.shape, generator=generator
    )
    x = mantissas.ldexp(exponents)
    step = spacing(x, fmt)
    got = round_stochastic(x, name, generator=generator)
    below, above = (x / step).floor() * step, (x / step).ceil() * step
    assert ((got == below) | (got == above)).all()
    assert (got == below).any()
    assert (got == above).any()


@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("name", ["tf32", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("at", ["normal", "subnormal", "below every number"])
@pytest.mark.parametrize("share", [1 / 2, 1 / 3, 0.9, 2.0**-10])
def test_stochastic_goes_up_as_often_as_the_distance_says(
    name: str, dtype: torch.dtype, at: str, share: float
) -> None:
    """The count of ups is binomial; five deviations bound it (one false in 10^6)."""
    fmt = FORMATS[name]
    lower = {
        "normal": 1.0,
        "subnormal": fmt.smallest_subnormal,
        "below every number": 0.0,
    }[at]
    step = fmt.eps if at == "normal" else fmt.smallest_subnormal
    x = torch.tensor(lower + share * step, dtype=dtype)
    odds = (x.item() - lower) / step  # what is left of the share in this dtype
    num = 100_000
    generator = torch.Generator().manual_seed(5)
    got = round_stochastic(x.expand(num), name, generator=generator)
    assert ((got == lower) | (got == lower + step)).all()
    ups = int((got != lower).sum())
    deviation = math.sqrt(num * odds * (1 - odds))
    assert abs(ups - num * odds) <= 5 * deviation


def test_stochastic_keeps_odds_far_below_the_smallest_number() -> None:
    """2^-34 in fp16, where the smallest number is 2^-24, rises once in 1024 times."""
    num = 1_000_000
    generator = torch.Generator().manual_seed(6)
    x = torch.full((num,), 2.0**-34 * (1 - 2.0**-53), dtype=torch.float64)
    ups = int((round_stochastic(x, "fp16", generator=generator) > 0).sum())
    assert abs(ups - num / 1024) <= 5 * math.sqrt(num / 1024)


@pytest.mark.parametrize("name", ["tf32", "bf16", "fp16", "fp8_e5m2"])
def test_stochastic_is_unbiased_over_many_numbers(name: str) -> None:
    """The mean error of a million is zero within five deviations of its own."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(1_000_003, generator=generator)
    error = round_stochastic(x, name, generator=generator).double() - x.double()
    assert error.abs().max() > 0
    assert error.mean().abs() <= 5 * error.std() / math.sqrt(error.numel())
    biased = round_nearest(x, name).double() - x.double()
    assert error.std() > biased.std()  # the price: twice the variance, and no bias


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_stochastic_is_decided_by_its_generator(name: str) -> None:
    """Equal seeds give equal bits, others do not; torch's own state is left alone."""
    x = torch.linspace(-3, 3, 1000)
    before = torch.get_rng_state()

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return round_stochastic(x, name, generator=generator)

    assert torch.equal(draw(8), draw(8))
    assert not torch.equal(draw(8), draw(9))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rounding", [round_nearest, round_stochastic])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (63,), (7, 1, 9), (1000,)])
def test_any_shape_and_stride_is_rounded(
    rounding: Rounding, shape: tuple[int, ...]
) -> None:
    """Scalars, empty tensors, odd sizes and transposed views keep their shape."""
    x = torch.full((*shape, 3), 1 + 2.0**-12).transpose(0, -1)
    got = rounding(x, "fp8_e4m3")
    assert got.shape == x.shape
    assert ((got == 1) | (got == 1.125)).all()


@pytest.mark.parametrize("rounding", [round_nearest, round_stochastic])
@pytest.mark.parametrize("name", ["fp64", "fp32", "bf16"])
def test_the_result_is_new_and_carries_no_gradient(
    rounding: Rounding, name: str
) -> None:
    """Writing to the result leaves the input alone, even where nothing is rounded."""
    x = torch.ones(5, requires_grad=True)
    got = rounding(x, name)
    assert not got.requires_grad
    got.zero_()
    assert x.eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.complex64])
def test_other_inputs_are_refused_with_the_cast_to_write(dtype: torch.dtype) -> None:
    """fp16 cannot hold what rounding to bf16 gives: 65504 becomes 65536."""
    with pytest.raises(FormatError, match="need a tensor in fp32 or fp64"):
        round_nearest(torch.ones(3, dtype=dtype), "bf16")


@pytest.mark.parametrize("name", DTYPES)
def test_casts_hold_the_rounded_number_exactly(name: str) -> None:
    """The dtype of the format holds what the emulation found."""
    x = torch.linspace(-3, 3, 999, dtype=torch.float64)
    held = cast_nearest(x, name)
    assert held.dtype is dtype_of(name)
    assert torch.equal(held.double(), round_nearest(x, name))
    generators = [torch.Generator().manual_seed(10) for _ in range(2)]
    held = cast_stochastic(x, name, generator=generators[0])
    rounded = round_stochastic(x, name, generator=generators[1])
    assert torch.equal(held.double(), rounded)


def test_a_cast_overflows_to_nan_where_torch_saturates() -> None:
    """fp8_e4m3 says NaN for 1e6, so that an overflow is seen after the cast."""
    assert cast_nearest(torch.tensor(1e6), "fp8_e4m3").isnan()
    assert cast_nearest(torch.tensor(1e6), "fp8_e4m3", saturate=True).float() == 448


def test_nothing_can_be_cast_to_tf32() -> None:
    """tf32 is emulated in fp32 and held in nothing."""
    with pytest.raises(UnsupportedFormatError):
        cast_nearest(torch.ones(2), "tf32")
