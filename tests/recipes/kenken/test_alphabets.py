from __future__ import annotations

import pytest

from castwise.errors import SettingsError
from castwise.recipes.kenken.alphabets import (
    EMPTY,
    PAD,
    VOCABULARY_SIZE,
    Mode,
    digits,
    parse_mode,
    tokens,
)


@pytest.mark.parametrize(
    ("n", "mode", "expected"),
    [
        (3, Mode.STANDARD, [1, 2, 3]),
        (3, Mode.ZERO_INCLUSIVE, [0, 1, 2]),
        (3, Mode.NEGATIVE, [-1, 0, 1]),
        (4, Mode.NEGATIVE, [-2, -1, 1, 2]),
        (5, Mode.NEGATIVE, [-2, -1, 0, 1, 2]),
        (16, Mode.NEGATIVE, [*range(-8, 0), *range(1, 9)]),
    ],
)
def test_digits_are_those_of_the_mode(n: int, mode: Mode, expected: list[int]) -> None:
    """Standard, zero and negative alphabets as defined, in ascending order."""
    assert digits(n, mode).tolist() == expected


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("n", range(3, 17))
def test_tokens_name_digits_and_nothing_else(n: int, mode: Mode) -> None:
    """Each digit has the one token that the vocabulary gives it, in every size."""
    names = {d: 2 + d if d >= 0 else 35 + d for d in range(-16, 17)}
    assert len(digits(n, mode)) == n
    assert tokens(n, mode).tolist() == [names[d] for d in digits(n, mode).tolist()]
    assert not {PAD, EMPTY} & set(tokens(n, mode).tolist())
    assert tokens(n, mode).max() < VOCABULARY_SIZE


@pytest.mark.parametrize("n", [-1, 2, 17])
def test_other_sizes_are_refused(n: int) -> None:
    """The message names the range and what came."""
    with pytest.raises(SettingsError, match=rf"3\.\.16; got {n};"):
        digits(n, Mode.STANDARD)


def test_unknown_mode_lists_the_names() -> None:
    """The message lists what may be asked for."""
    assert parse_mode("zero") is Mode.ZERO_INCLUSIVE
    with pytest.raises(SettingsError, match="standard, zero, negative; got 'hex'"):
        parse_mode("hex")
