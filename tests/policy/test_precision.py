from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castwise.errors import CastwiseError, FormatError, PrecisionTextError
from castwise.formats import FORMATS
from castwise.policy.precision import FP32, SURROUNDINGS, Precision

STORABLE = [name for name, fmt in FORMATS.items() if fmt.storable]


def test_every_precision_prints_as_it_parses() -> None:
    """All 2744 of them: any of four fields open, and every format that fits."""
    some = [None, *STORABLE]
    seen = set()
    for p, c, o, r in itertools.product(some, [None, *FORMATS], some, some):
        precision = Precision(param=p, compute=c, output=o, reduce=r)
        assert Precision.parse(str(precision)) == precision
        seen.add(str(precision))
    assert len(seen) == 7 * 8 * 7 * 7


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("p=fp32,c=bf16,o=bf16,r=fp32", "p=fp32,c=bf16,o=bf16,r=fp32"),
        ("c=bf16", "c=bf16"),
        (" r = fp32 , c=fp16 ", "c=fp16,r=fp32"),
        ("param=fp32,compute=tf32", "p=fp32,c=tf32"),
        ("fp64", "fp64"),
        ("p=bf16,c=bf16,o=bf16,r=bf16", "bf16"),
        ("as_is", "as_is"),
    ],
)
def test_a_precision_is_read_in_any_order_and_printed_in_one(
    text: str, printed: str
) -> None:
    """Short and long keys, spaces and order are the writer's choice."""
    assert str(Precision.parse(text)) == printed


def test_open_fields_are_none_and_one_format_means_all_four() -> None:
    """Left out is as in the surroundings; it is never a silent fp32."""
    assert Precision.parse("c=bf16") == Precision(compute="bf16")
    assert Precision.parse("fp32") == FP32
    assert FP32.is_full
    assert FP32.is_uniform
    assert not Precision.parse("c=bf16").is_full
    assert Precision.parse("as_is") == SURROUNDINGS == Precision()
    assert not SURROUNDINGS.is_uniform


def test_over_fills_what_is_open_and_nothing_else() -> None:
    """The precision's own fields stay, the surroundings give the rest."""
    own = Precision.parse("c=bf16,o=fp16")
    assert str(own.over(FP32)) == "p=fp32,c=bf16,o=fp16,r=fp32"
    assert FP32.over(own) == FP32
    assert own.over(SURROUNDINGS) == own


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "got ''"),
        ("float32", "write fp32"),
        ("c=bfloat16", "write bf16"),
        ("c=", "got ''"),
        ("x=fp32", "keys p (param), c (compute), o (output), r (reduce)"),
        ("c=bf16,fp32", "keys p (param)"),
        ("c=bf16,c=fp32", "compute twice"),
        ("c=bf16,compute=fp32", "compute twice"),
        ("p=fp32,,c=bf16", "keys p (param)"),
        ("tf32", "p=fp32,c=tf32,o=fp32,r=fp32"),
        ("p=tf32", "only inside matrix units"),
    ],
)
def test_a_wrong_text_is_refused_with_the_remedy(text: str, says: str) -> None:
    """The message names what came and what to write instead."""
    with pytest.raises(PrecisionTextError) as caught:
        Precision.parse(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_field_is_refused_in_python_too() -> None:
    """The constructor checks what the text form checks."""
    with pytest.raises(FormatError, match="write bf16"):
        Precision(compute="bfloat16")


PIECES = st.sampled_from(
    [*FORMATS, *"pcor", "param", "=", ",", " ", "as_is", "\n", "é"]
)
TEXTS = st.text(max_size=40) | st.lists(PIECES, max_size=12).map("".join)


@settings(max_examples=3000, deadline=None)
@given(text=TEXTS)
def test_no_text_breaks_the_parser(text: str) -> None:
    """Thousands of texts: each is a precision that prints as it parses, or refused."""
    try:
        precision = Precision.parse(text)
    except CastwiseError as error:
        assert len(str(error)) < 400  # noqa: PT017 -- both outcomes are checked
    else:
        assert Precision.parse(str(precision)) == precision
