"""Facts about binary floating-point formats, derived from how their bits are laid out.

A format is one sign bit, `exponent_bits` and `mantissa_bits`, and what its topmost
exponent means. Everything else follows (IEEE 754-2019, section 3.3; for the 8-bit
formats: Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433, table 1):

    fp32      s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm
    tf32      s eeeeeeee mmmmmmmmmm              bias = 2^(exponent_bits - 1) - 1
    bf16      s eeeeeeee mmmmmmm                 value = (-1)^s * 2^(e - bias) * 1.m
    fp16      s eeeee mmmmmmmmmm                 e = 0: (-1)^s * 2^(1 - bias) * 0.m
    fp8_e5m2  s eeeee mm                         e all ones: infinity (m = 0) or NaN
    fp8_e4m3  s eeee mmm                         e and m all ones: NaN; no infinity

The names are spelled one way everywhere. This room knows no torch; `dtypes` is the
border to it. A complex format would be two of these, and is none of them.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from castwise.errors import FormatError
from castwise.wording import shown

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One binary floating-point format; the figures are derived from the layout."""

    name: str
    """The only spelling: `bf16`, `fp8_e4m3`."""

    exponent_bits: int
    """Width of the exponent field."""

    mantissa_bits: int
    """Width of the stored mantissa, without the implicit leading bit."""

    has_infinity: bool = True
    """Whether the topmost exponent is kept for infinities and NaNs (IEEE)."""

    storable: bool = True
    """Whether a tensor can be held in it; tf32 exists only inside matrix units."""

    has_nan: bool = True
    """Whether it can say NaN; every format in the table can."""

    def __post_init__(self) -> None:
        if self.exponent_bits < 2 or self.mantissa_bits < 1:
            raise FormatError(
                "a format needs at least 2 exponent bits and 1 mantissa bit; "
                f"{self.name} has {self.exponent_bits} and {self.mantissa_bits}"
            )

    @property
    def bits(self) -> int:
        """Bits that carry information: sign, exponent and mantissa (tf32: 19)."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def storage_bytes(self) -> int:
        """Bytes that one value occupies in memory; tf32 is held in fp32."""
        return self.bits // 8 if self.storable else 4

    @property
    def bias(self) -> int:
        """What is subtracted from the exponent field."""
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number (fp16: -14)."""
        return 1 - self.bias

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest number (fp16: 15; fp8_e4m3 uses the top one: 8)."""
        return self.bias if self.has_infinity else self.bias + 1

    @property
    def max(self) -> float:
        """The largest finite number."""
        steps_below_two = (
            1 if self.has_infinity else 2
        )  # without infinity, m=1..1 is NaN
        significand = 2.0 - steps_below_two * self.eps
        return math.ldexp(significand, self.max_exponent)

    @property
    def eps(self) -> float:
        """Distance from 1 to the next number above; half of it is the unit roundoff."""
        return math.ldexp(1.0, -self.mantissa_bits)

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number with a full mantissa."""
        return math.ldexp(1.0, self.min_exponent)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number, and the spacing of all subnormal ones."""
        return math.ldexp(1.0, self.min_exponent - self.mantissa_bits)

    def holds(self, other: Format) -> bool:
        """Whether every number of `other` is a number of this format."""
        return (
            self.mantissa_bits >= other.mantissa_bits
            and self.max >= other.max
            and self.smallest_subnormal <= other.smallest_subnormal
            and (self.has_infinity or not other.has_infinity)
        )

    def __str__(self) -> str:
        return self.name


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        fmt.name: fmt
        for fmt in (
            Format(name="fp64", exponent_bits=11, mantissa_bits=52),
            Format(name="fp32", exponent_bits=8, mantissa_bits=23),
            Format(name="tf32", exponent_bits=8, mantissa_bits=10, storable=False),
            Format(name="bf16", exponent_bits=8, mantissa_bits=7),
            Format(name="fp16", exponent_bits=5, mantissa_bits=10),
            Format(
                name="fp8_e4m3", exponent_bits=4, mantissa_bits=3, has_infinity=False
            ),
            Format(name="fp8_e5m2", exponent_bits=5, mantissa_bits=2),
        )
    }
)
"""Every format by name, from the most to the fewest digits."""

# what other libraries call them -> our spelling; used for the remedy, never accepted
_FOREIGN = {
    "float64": "fp64",
    "double": "fp64",
    "f64": "fp64",
    "float32": "fp32",
    "float": "fp32",
    "f32": "fp32",
    "single": "fp32",
    "tfloat32": "tf32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "f16": "fp16",
    "fp8": "fp8_e4m3",
    "float8": "fp8_e4m3",
    "float8_e4m3fn": "fp8_e4m3",
    "float8_e4m3": "fp8_e4m3",
    "e4m3": "fp8_e4m3",
    "float8_e5m2": "fp8_e5m2",
    "e5m2": "fp8_e5m2",
}


def parse_format(text: str | Format) -> Format:
    """Return the format of that name.

    Raises:
        FormatError: The name is not in the table; the message lists the table.
    """
    if isinstance(text, Format):
        return text
    fmt = FORMATS.get(text.strip())
    if fmt is not None:
        return fmt
    plain = text.strip().removeprefix("torch.").lower()
    meant = _FOREIGN.get(plain) or next(
        iter(difflib.get_close_matches(plain[:200], FORMATS, n=1)), None
    )
    remedy = f"; write {meant}" if meant else ""
    raise FormatError(
        f"need one of the formats {', '.join(FORMATS)}; got {shown(text)}{remedy}"
    )
