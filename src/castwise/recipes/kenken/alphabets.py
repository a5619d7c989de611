"""The three alphabets of a puzzle, and the tokens that a model reads.

A square of size n holds n symbols. Everywhere in the data they are *ranks* 0..n-1;
the mode says which *digit* a rank stands for, in ascending order:

    STANDARD   1 .. n
    ZERO       0 .. n-1
    NEGATIVE   odd n: -h .. h;  even n: -h .. -1, 1 .. h;  h = n // 2

Cages count with the digits, never with the ranks. The token vocabulary is common to
all sizes and modes: 0 is padding, 1 an empty cell, digit d >= 0 is token 2 + d and
digit d < 0 is token 35 + d, so that one model can read them all.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from castwise.errors import SettingsError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MIN_SIZE = 3
MAX_SIZE = 16

PAD = 0
EMPTY = 1
VOCABULARY_SIZE = 35


class Mode(StrEnum):
    """Which digits a puzzle is written with."""

    STANDARD = "standard"
    ZERO_INCLUSIVE = "zero"
    NEGATIVE = "negative"


def parse_mode(text: str) -> Mode:
    """Read a mode by its name, for example `zero`."""
    try:
        return Mode(text)
    except ValueError:
        names = ", ".join(mode.value for mode in Mode)
        raise SettingsError(
            f"a mode must be one of {names}; got {text!r}; use one of these names."
        ) from None


def check_size(n: int) -> int:
    """Return the size if squares of it are made here, else say which are."""
    if not MIN_SIZE <= n <= MAX_SIZE:
        raise SettingsError(
            f"a size must lie in {MIN_SIZE}..{MAX_SIZE}; got {n}; choose one of these."
        )
    return n


def digits(n: int, mode: Mode) -> NDArray[np.int64]:
    """List the digits of a mode in ascending order.

    Args:
        n: Size of the square, 3 to 16.
        mode: The alphabet.

    Returns:
        int64 [n]: the digit that each rank stands for.
    """
    check_size(n)
    if mode is Mode.STANDARD:
        return np.arange(1, n + 1, dtype=np.int64)
    if mode is Mode.ZERO_INCLUSIVE:
        return np.arange(n, dtype=np.int64)
    half = n // 2
    signed = np.arange(-half, half + 1, dtype=np.int64)
    return signed if n % 2 else signed[signed != 0]


def tokens(n: int, mode: Mode) -> NDArray[np.int64]:
    """List the token of each rank.

    Args:
        n: Size of the square, 3 to 16.
        mode: The alphabet.

    Returns:
        int64 [n]: the token that each rank is read and written as.
    """
    values = digits(n, mode)
    return np.where(values >= 0, 2 + values, VOCABULARY_SIZE + values)
