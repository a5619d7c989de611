"""Conditions on the measures of an epoch, with their one-line text form.

    solved >= 0.95 for 2                    two epochs in a row
    loss < 0.3 and epoch >= 2               epochs spent in the stage
    (solved > 0.9 and loss < 0.5) or epoch >= 10

`epoch` is how many epochs a stage has lasted; every other name is a measure of the
evaluation. `or` binds weaker than `and`. A measure that is missing or NaN says
nothing: its comparison is not met, and its streak stays as it was.
"""

from __future__ import annotations

import math
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import final

from castwise.errors import SettingsError
from castwise.wording import shown

EPOCH = "epoch"

Streaks = dict[str, int]

_HOLDS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_TOKEN = re.compile(
    r"\s*(?:(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<sign>[<>]=?)"
    r"|(?P<paren>[()])|(?P<word>[A-Za-z_][\w./]*))"
)
_RESERVED = {"and", "or", "for"}


class Condition(ABC):
    """Whether a stage is over, asked once at the end of every epoch."""

    @abstractmethod
    def is_met(
        self, measures: Mapping[str, float], streaks: Streaks, band: float
    ) -> bool:
        """Say whether the condition is met now.

        Args:
            measures: Smoothed measures of this epoch; `epoch` is among them.
            streaks: Epochs in a row that each comparison was met; updated.
            band: Hysteresis: a streak that has begun ends only when the measure is
                worse than the threshold by more than this.
        """

    @abstractmethod
    def measures(self) -> Iterator[str]:
        """Names of the measures that the condition looks at, `epoch` aside."""


@final
@dataclass(frozen=True, slots=True)
class Comparison(Condition):
    """One measure against one number, for some epochs in a row."""

    measure: str
    sign: str
    threshold: float
    patience: int = 1

    def is_met(
        self, measures: Mapping[str, float], streaks: Streaks, band: float
    ) -> bool:
        """Count the streak; it is long enough when it reaches the patience."""
        value = measures.get(self.measure, math.nan)
        key = str(self)
        if math.isnan(value):
            return False
        slack = 0.0 if self.measure == EPOCH or not streaks.get(key) else band
        threshold = self.threshold + (slack if "<" in self.sign else -slack)
        met = _HOLDS[self.sign](value, threshold)
        streaks[key] = streaks.get(key, 0) + 1 if met else 0
        return streaks[key] >= self.patience

    def measures(self) -> Iterator[str]:
        """Yield the one measure."""
        if self.measure != EPOCH:
            yield self.measure

    def __str__(self) -> str:
        tail = f" for {self.patience}" if self.patience > 1 else ""
        return f"{self.measure} {self.sign} {self.threshold:g}{tail}"


@final
@dataclass(frozen=True, slots=True)
class Joined(Condition):
    """Several conditions, of which all (`and`) or one (`or`) must be met."""

    word: str
    parts: tuple[Condition, ...]

    def is_met(
        self, measures: Mapping[str, float], streaks: Streaks, band: float
    ) -> bool:
        """Ask every part, so that no streak is left uncounted."""
        met = [part.is_met(measures, streaks, band) for part in self.parts]
        return all(met) if self.word == "and" else any(met)

    def measures(self) -> Iterator[str]:
        """Yield the measures of the parts."""
        for part in self.parts:
            yield from part.measures()

    def __str__(self) -> str:
        inner = (
            f"({part})"
            if isinstance(part, Joined) and self.word == "and"
            else str(part)
            for part in self.parts
        )
        return f" {self.word} ".join(inner)


def parse_condition(text: str) -> Condition:
    """Read a condition.

    Raises:
        SettingsError: Naming what stands where something else is needed.
    """
    return _Parser(text).whole()


class _Parser:
    """Recursive descent over: or-list of and-lists of comparisons and parentheses."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = [*self._split(text)]
        self._next = 0
        self._depth = 0

    def whole(self) -> Condition:
        found = self._joined("or")
        if self._next < len(self._tokens):
            raise self._error("the end, `and` or `or`")
        return found

    def _split(self, text: str) -> Iterator[str]:
        place = 0
        end = len(text.rstrip())
        while place < end:
            match = _TOKEN.match(text, place)
            if match is None:
                raise SettingsError(
                    f"a condition cannot hold {shown(text[place:].strip())}; write for "
                    "example solved >= 0.95 for 2 and epoch >= 3"
                )
            yield match.group().strip()
            place = match.end()

    def _joined(self, word: str) -> Condition:
        parts = [self._part(word)]
        while self._peek() == word:
            self._next += 1
            parts.append(self._part(word))
        return parts[0] if len(parts) == 1 else Joined(word, tuple(parts))

    def _part(self, word: str) -> Condition:
        if word == "or":
            return self._joined("and")
        if self._peek() != "(":
            return self._comparison()
        self._depth += 1
        if self._depth > 20:  # deeper than a person reads
            raise self._error("fewer parentheses")
        self._next += 1
        inner = self._joined("or")
        self._take(")", "a closing parenthesis")
        self._depth -= 1
        return inner

    def _comparison(self) -> Comparison:
        measure = self._peek() or ""
        if not re.match(r"[A-Za-z_]", measure) or measure in _RESERVED:
            raise self._error("a measure")
        self._next += 1
        sign = self._peek() or ""
        if sign not in _HOLDS:
            raise self._error("one of >= <= > <")
        self._next += 1
        threshold = self._number("a number")
        patience = 1
        if self._peek() == "for":
            self._next += 1
            number = self._number("a number of epochs")
            if number != int(number) or number < 1:
                raise SettingsError(
                    f"`for` needs a whole number of epochs, got {number:g} in "
                    f"{shown(self._text)}"
                )
            patience = int(number)
        return Comparison(measure, sign, threshold, patience)

    def _number(self, what: str) -> float:
        token = self._peek() or ""
        try:
            value = float(token)
        except ValueError:
            raise self._error(what) from None
        if not math.isfinite(value):
            raise self._error(what)
        self._next += 1
        return value

    def _take(self, token: str, what: str) -> None:
        if self._peek() != token:
            raise self._error(what)
        self._next += 1

    def _peek(self) -> str | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def _error(self, needed: str) -> SettingsError:
        came = shown(self._peek() or "") if self._peek() else "the end"
        return SettingsError(
            f"a condition needs {needed} where {came} stands in {shown(self._text)}; "
            "write for example solved >= 0.95 for 2 and epoch >= 3"
        )
