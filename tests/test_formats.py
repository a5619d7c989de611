from __future__ import annotations

import math

import pytest
import torch

from castwise.dtypes import DTYPES
from castwise.errors import FormatError
from castwise.formats import FORMATS, Format, parse_format
from tolerances import TOLERANCES

SMALL = {"bf16": torch.int16, "fp16": torch.int16, "fp8_e4m3": torch.int8} | {
    "fp8_e5m2": torch.int8
}


def every_number(name: str) -> torch.Tensor:
    """All bit patterns of a small format, as fp64."""
    width = FORMATS[name].bits
    patterns = torch.arange(-(1 << (width - 1)), 1 << (width - 1)).to(SMALL[name])
    return patterns.view(DTYPES[name]).double()


@pytest.mark.parametrize("name", DTYPES)
def test_derived_figures_are_those_of_torch(name: str) -> None:
    """Every figure that torch.finfo has, too, is equal to it, to the last bit."""
    fmt, info = FORMATS[name], torch.finfo(DTYPES[name])
    assert fmt.bits == info.bits == 8 * fmt.storage_bytes
    assert (fmt.max, -fmt.max) == (info.max, info.min)
    assert (fmt.eps, fmt.smallest_normal) == (info.eps, info.smallest_normal)


@pytest.mark.parametrize("name", SMALL)
def test_derived_figures_are_those_of_all_bit_patterns(name: str) -> None:
    """Largest, smallest and special numbers are found by looking at every pattern."""
    fmt, numbers = FORMATS[name], every_number(name)
    finite = numbers[numbers.isfinite()]
    assert fmt.max == finite.max().item()
    assert fmt.smallest_subnormal == finite[finite > 0].min().item()
    assert fmt.has_infinity == bool(numbers.isinf().any())
    assert fmt.has_nan == bool(numbers.isnan().any())
    above_one = finite[finite > 1].min().item()
    assert fmt.eps == above_one - 1


def test_tf32_is_fp32_with_the_mantissa_of_fp16_and_no_storage() -> None:
    """tf32 has the range of fp32 and the digits of fp16, and no dtype."""
    tf32 = FORMATS["tf32"]
    assert tf32.smallest_normal == FORMATS["fp32"].smallest_normal
    assert tf32.eps == FORMATS["fp16"].eps
    assert (tf32.bits, tf32.storage_bytes, tf32.storable) == (19, 4, False)
    assert set(FORMATS) - set(DTYPES) == {"tf32"}


@pytest.mark.parametrize("name", FORMATS)
def test_a_name_and_a_format_parse_to_the_format(name: str) -> None:
    """Parsing accepts the name, with outer spaces, and the format itself."""
    assert parse_format(f" {name} ") is FORMATS[name]
    assert parse_format(FORMATS[name]) is FORMATS[name]
    assert str(FORMATS[name]) == name == FORMATS[name].name


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("bfloat16", "write bf16"),
        ("torch.float16", "write fp16"),
        ("float8_e4m3fn", "write fp8_e4m3"),
        ("FP32", "write fp32"),
        ("bf61", "write bf16"),
    ],
)
def test_a_foreign_name_is_refused_with_ours(text: str, remedy: str) -> None:
    """There is one spelling; the error offers it and lists the table."""
    with pytest.raises(FormatError) as caught:
        parse_format(text)
    assert remedy in str(caught.value)
    assert all(name in str(caught.value) for name in FORMATS)


@pytest.mark.parametrize("text", ["", "int8", "\x00", "x" * 1000])
def test_a_name_near_nothing_is_refused_in_one_short_sentence(text: str) -> None:
    """Whatever came, the sentence stays readable and lists the table."""
    with pytest.raises(
        FormatError, match="need one of the formats fp64, fp32"
    ) as caught:
        parse_format(text)
    assert len(str(caught.value)) < 200


def test_an_impossible_layout_is_refused() -> None:
    """A format without mantissa or with one exponent bit has none of the figures."""
    with pytest.raises(FormatError, match="at least 2 exponent bits"):
        Format(name="e1", exponent_bits=1, mantissa_bits=3)


@pytest.mark.parametrize("outer", SMALL)
@pytest.mark.parametrize("inner", SMALL)
def test_holds_means_that_every_number_survives(outer: str, inner: str) -> None:
    """A format holds another when a cast there and back changes no number."""
    numbers = every_number(inner)
    numbers = numbers[~numbers.isnan()]
    survived = numbers.to(DTYPES[outer]).double()
    assert FORMATS[outer].holds(FORMATS[inner]) == torch.equal(survived, numbers)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_tolerance_that_one_rounding_reaches(name: str) -> None:
    """The row is right and not loose: halfway above 1 the error is the whole unit."""
    fmt, row = FORMATS[name], TOLERANCES[name]
    assert row.unit == fmt.eps / 2
    assert row.gamma(1) >= row.unit
    assert math.isclose(row.gamma(2), 2 * row.unit, rel_tol=4 * row.unit)
