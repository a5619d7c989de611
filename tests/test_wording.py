from __future__ import annotations

import pytest

from castwise.wording import did_you_mean, shown


@pytest.mark.parametrize("text", ["", "a", "x" * 60, "y" * 1000, "\x1f" * 40, "'\""])
def test_a_quoted_text_is_short_and_on_one_line(text: str) -> None:
    """Whatever came in, the sentence around it stays readable."""
    quoted = shown(text)
    assert len(quoted) <= 62
    assert quoted.isprintable()
    assert quoted == repr(text) or quoted.endswith(("...'", '..."'))


def test_the_nearest_word_is_offered_and_a_far_one_is_not() -> None:
    """A wrong suggestion is worse than none."""
    assert did_you_mean("rulse", ["name", "rules", ""]) == " (did you mean rules?)"
    assert did_you_mean("zzz", ["name", "rules"]) == ""
    assert did_you_mean("x" * 10_000, ["name"]) == ""
