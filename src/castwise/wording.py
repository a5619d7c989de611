"""Two phrases that error messages share: a text quoted short, and the nearest word."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_LONGEST = 60


def shown(text: str) -> str:
    """Quote a text in at most 62 characters, whatever is in it."""
    quoted = repr(text)
    if len(quoted) <= _LONGEST + 2:
        return quoted
    return f"{quoted[: _LONGEST - 2]}...{quoted[-1]}"


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return ` (did you mean ...?)` with the nearest known word, or nothing."""
    words = [each for each in known if each]
    close = difflib.get_close_matches(word[:200], words, n=1, cutoff=cutoff)
    return f" (did you mean {close[0]}?)" if close else ""
