"""Round a tensor to a format: nearest or stochastic, and past the largest number.

The result stays in the input's dtype, fp32 or fp64: it emulates the format, so that
tf32 and whatever the hardware lacks can be had everywhere. The work is done on the bits
of the input. For fp32 to bf16, which keeps 7 of 23 mantissa bits:

    input      s eeeeeeee mmmmmmmKxxxxxxxxxxxxxxx     the last bit kept is left of K
    nearest    + half of the last bit kept, less one bit if that bit is even;
               then clear K and x. A carry runs through the mantissa into the exponent,
               which is what rounding 1.11..1 up to 10.0 means.
    stochastic + a random number of the width of K and x; then clear K and x. It carries
               exactly as often as K and x are large: the result is unbiased.

Where the target becomes subnormal before the input does (fp16 below 2^-14), the spacing
stays constant while the exponent falls; there the significand is shifted right and
rounded as an integer, and the result is that many times the smallest subnormal number.

The exponent is let run on past the largest number, and what then lies above it
overflows: to infinity, or to NaN in fp8_e4m3, which has no infinity. With `saturate` it
becomes the largest number instead. NaNs keep their bits. An infinity stays one, except
in fp8_e4m3, where it becomes the largest number with `saturate` and NaN without.
(`Tensor.to(torch.float8_e4m3fn)` of torch 2.13 saturates always, infinities included,
so an overflow must be looked for before the cast.)

Integers are views of the input, so no gradient passes; cast where one should.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch

from castwise.dtypes import dtype_of, format_of
from castwise.errors import FormatError
from castwise.formats import FORMATS, Format, parse_format

_Drop: TypeAlias = Callable[[torch.Tensor, torch.Tensor | int], torch.Tensor]

_RANDOM_BITS = 62  # of the numbers that decide a stochastic rounding
_INTEGERS = {"fp32": torch.int32, "fp64": torch.int64}


def round_nearest(
    x: torch.Tensor, fmt: str | Format, *, saturate: bool = False
) -> torch.Tensor:
    """Round to the nearest number of a format, ties to the even one.

    Args:
        x: Tensor in fp32 or fp64, any shape.
        fmt: The target.
        saturate: Whether what overflows becomes the largest number (default: False).

    Returns:
        A new tensor of the dtype of `x`, without gradient.

    Raises:
        FormatError: `x` is held in something else; cast it to fp32, which is exact.
    """
    return _round(x, parse_format(fmt), _drop_nearest, saturate=saturate)


def round_stochastic(
    x: torch.Tensor,
    fmt: str | Format,
    *,
    generator: torch.Generator | None = None,
    saturate: bool = False,
) -> torch.Tensor:
    """Round to one of the two neighbours in a format, to each the likelier the nearer.

    The probability of the upper one is the distance from the lower one over their
    spacing, to within 2^-62. A number of the format stays as it is.

    Args:
        x: Tensor in fp32 or fp64, any shape.
        fmt: The target.
        generator: Source of random bits, on the device of `x` (default: torch's own).
        saturate: Whether what overflows becomes the largest number (default: False).

    Returns:
        A new tensor of the dtype of `x`, without gradient.

    Raises:
        FormatError: `x` is held in something else; cast it to fp32, which is exact.
    """

    def drop(integers: torch.Tensor, shift: torch.Tensor | int) -> torch.Tensor:
        return _drop_stochastic(integers, shift, generator)

    return _round(x, parse_format(fmt), drop, saturate=saturate)


def cast_nearest(
    x: torch.Tensor, fmt: str | Format, *, saturate: bool = False
) -> torch.Tensor:
    """Round to nearest, and hold the result in the format's own dtype.

    It rounds once. `Tensor.to` from fp64 may round twice, to fp32 and then on, and give
    the wrong neighbour: 1 + 2^-11 + 2^-40 becomes 1 in fp16 and should be 1 + 2^-10.
    """
    return round_nearest(x, fmt, saturate=saturate).to(dtype_of(fmt))


def cast_stochastic(
    x: torch.Tensor,
    fmt: str | Format,
    *,
    generator: torch.Generator | None = None,
    saturate: bool = False,
) -> torch.Tensor:
    """Round stochastically, and hold the result in the format's own dtype."""
    rounded = round_stochastic(x, fmt, generator=generator, saturate=saturate)
    return rounded.to(dtype_of(fmt))


def _round(
    x: torch.Tensor, fmt: Format, drop: _Drop, *, saturate: bool
) -> torch.Tensor:
    """Round the magnitudes of `x` by `drop`, which drops low bits of integers."""
    source = _source_format(x)
    x = x.detach()
    if fmt.holds(source):
        return x.clone()
    bits = x.view(_INTEGERS[source.name])
    magnitude = bits & _below(source.storage_bytes * 8 - 1)  # the sign bit cleared
    infinity = _below(source.exponent_bits) << source.mantissa_bits  # NaNs lie above it
    special = magnitude >= infinity
    magnitude = magnitude.masked_fill(special, 0)

    shift = source.mantissa_bits - fmt.mantissa_bits
    value = (drop(magnitude, shift) << shift).view(x.dtype)
    if fmt.min_exponent > source.min_exponent:
        # the exponent field that the target's smallest normal number has in the source
        field = fmt.min_exponent + source.bias
        small = _round_small(magnitude, source, fmt, drop)
        value = torch.where(magnitude < field << source.mantissa_bits, small, value)

    largest = fmt.max if saturate else math.inf if fmt.has_infinity else math.nan
    value = value.masked_fill(value > fmt.max, largest)
    if not fmt.has_infinity:
        value = value.masked_fill(special, largest)
        special = x.isnan()
    return torch.where(special, x, value.copysign(x))


def _round_small(
    magnitude: torch.Tensor, source: Format, fmt: Format, drop: _Drop
) -> torch.Tensor:
    """Round what lies below the target's smallest normal number.

    In the source   0 00eeeeee mmmm...m   is   1mmmm...m * 2^(e - bias - mantissa_bits);
    the result is an integer times the target's smallest subnormal number. Where e is 0,
    the leading 1 is missing and the exponent is that of e = 1.
    """
    mantissa_bits = source.mantissa_bits
    exponent = magnitude >> mantissa_bits
    leading_one = exponent.clamp(max=1) << mantissa_bits
    significand = magnitude & _below(mantissa_bits) | leading_one
    below_normal = fmt.min_exponent + source.bias - exponent.clamp(min=1)
    shift = mantissa_bits - fmt.mantissa_bits + below_normal.clamp(min=0)
    steps = drop(significand, shift)
    return steps.to(dtype_of(source)) * fmt.smallest_subnormal


def _drop_nearest(integers: torch.Tensor, shift: torch.Tensor | int) -> torch.Tensor:
    """Divide by 2^shift, ties to even.

    ...L Kxxx     L the last bit kept
    +  0 0111     half of L, less one: a tie (1000) carries only together with
    +  0 000L     the last bit kept, which makes an odd L even
    """
    if isinstance(shift, torch.Tensor):
        # far enough to leave nothing of a significand, and no overflow of the sum
        shift = shift.clamp(max=torch.iinfo(integers.dtype).bits - 2)
    one = integers.new_tensor(1)
    half_less_one = (one << (shift - 1)) - 1
    last_kept = (integers >> shift) & 1
    return (integers + half_less_one + last_kept) >> shift


def _drop_stochastic(
    integers: torch.Tensor,
    shift: torch.Tensor | int,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Divide by 2^shift, up with the probability that the dropped bits are of 2^shift.

    ...L xxxx
    +  0 rrrr     r random: carries into L in xxxx of 10000 cases
    """
    if isinstance(shift, int):
        return (integers + _random_below(1 << shift, integers, generator)) >> shift
    # each element has its own shift: stretch the dropped bits to the random number's
    integers, shift = integers.long(), shift.long()
    within = shift.clamp(max=_RANDOM_BITS)
    beyond = (shift - _RANDOM_BITS).clamp(0, _RANDOM_BITS)
    dropped = integers & ((torch.ones_like(integers) << within) - 1)
    odds = (dropped << (_RANDOM_BITS - within)) >> beyond
    carries = _random_below(1 << _RANDOM_BITS, integers, generator) < odds
    return (integers >> within) + carries


def _random_below(
    limit: int, like: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    return torch.randint(
        limit, like.shape, dtype=like.dtype, device=like.device, generator=generator
    )


def _source_format(x: torch.Tensor) -> Format:
    name = format_of(x.dtype) if x.dtype.is_floating_point else str(x.dtype)
    if name not in _INTEGERS:
        raise FormatError(
            f"need a tensor in fp32 or fp64 to round; got {name}; cast it to fp32 first"
        )
    return FORMATS[name]


def _below(width: int) -> int:
    """Return `width` ones."""
    return (1 << width) - 1
