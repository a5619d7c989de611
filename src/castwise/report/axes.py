"""Scales, ticks and the spelling of numbers on a page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from castwise.report.records import Spelling

_EXTREME = 1e100  # beyond lies nothing that a picture could tell from infinity
_PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
_BYTES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """A mapping of values to places, with its ticks."""

    low: float
    """Value at `begin`."""

    high: float
    """Value at `end`."""

    begin: float
    """Place of `low`, in pixels."""

    end: float
    """Place of `high`, in pixels."""

    ticks: tuple[float, ...]
    """Where the axis is labelled."""

    log: bool = False
    """Whether equal distances are equal ratios."""

    def place(self, value: float) -> float:
        """Return the place of a value."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        return self.begin + (at - low) / (high - low) * (self.end - self.begin)

    def can_show(self, value: float) -> bool:
        """Tell whether the value has a place."""
        return _can_show(value, log=self.log)


def fit_axis(
    values: Iterable[float],
    begin: float,
    end: float,
    *,
    num_ticks: int = 5,
    log: bool = False,
    tight: bool = False,
    unit: float = 1.0,
) -> Axis:
    """Choose an axis that shows all values that can be shown.

    Args:
        values: What must fit.
        begin: Place of the low end, in pixels.
        end: Place of the high end, in pixels.
        num_ticks: About how many ticks. Default: 5.
        log: Whether the axis is logarithmic. Default: no.
        tight: Whether the ends are the extreme values, not ticks. Default: no.
        unit: What ticks of a linear axis are round multiples of. Default: one.
    """
    shown = [v for v in values if _can_show(v, log=log)]
    low, high = (min(shown), max(shown)) if shown else (1.0, 2.0) if log else (0.0, 1.0)
    largest = max(abs(low), abs(high), 1 / _EXTREME)
    if high - low <= 1e-9 * largest:  # a constant stands in the middle
        pad = largest / 2 if largest > 1 / _EXTREME else 0.5
        low, high = (low / 2, low * 2) if log else (low - pad, high + pad)
    if log:
        ticks = _log_ticks(low, high)
    else:
        ticks = [t * unit for t in _ticks(low / unit, high / unit, num_ticks)]
    if not tight:
        low, high = min(low, ticks[0]), max(high, ticks[-1])
    within = tuple(t for t in ticks if low <= t <= high)
    return Axis(low=low, high=high, begin=begin, end=end, ticks=within, log=log)


def _can_show(value: float, *, log: bool) -> bool:
    if log:
        return 1 / _EXTREME <= value <= _EXTREME
    return abs(value) <= _EXTREME  # false for nan too


def _ticks(low: float, high: float, num_ticks: int) -> list[float]:
    """Choose multiples of 1, 2 or 5 times a power of ten that enclose the range."""
    raw = (high - low) / num_ticks
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Choose decades, and 2 and 5 times a decade when there are few of them."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, (last - first) // 6)
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [f * 10.0**p for p in range(first, last + 1, stride) for f in factors]
    below = max([t for t in ticks if t <= low], default=ticks[0])
    above = min([t for t in ticks if t >= high], default=ticks[-1])
    return [t for t in ticks if below <= t <= above]


def spell_tick(value: float, spelling: Spelling = "number") -> str:
    """Write the value of a tick in as few characters as it needs."""
    if spelling == "percent":
        return f"{100 * value:.4g} %"
    if spelling == "bytes":
        return spell_bytes(value)
    for size, letter in _PREFIXES:
        if abs(value) >= size and abs(value) < 1e12:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def spell_number(value: float, spelling: Spelling = "number", digits: int = 3) -> str:
    """Write a value of a table.

    Args:
        value: Any number.
        spelling: What it is.
        digits: Significant digits of a number, decimals of a percentage. Default: 3.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not math.isfinite(value):
        return {math.inf: "infinite", -math.inf: "-infinite"}.get(value, "NaN")
    if spelling == "percent":
        return f"{100 * value:.{min(digits, 1)}f} %"
    if spelling == "bytes":
        return spell_bytes(value)
    return _plain_number(value, digits)


def _plain_number(value: float, digits: int) -> str:
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return f"{value:,.0f}"
    if abs(value) >= 10**digits and abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}" if 1e-4 <= abs(value) < 1e9 else f"{value:.{digits}g}"


def byte_unit(values: Iterable[float]) -> float:
    """Choose the unit in which the largest of some numbers of bytes is spelled."""
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    return next((size for size, _ in _BYTES if largest >= size), 1)


def spell_fact(value: float) -> str:
    """Write a single value, without the zeros that align a column."""
    if isinstance(value, bool) or not math.isfinite(value):
        return spell_number(value)
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.6g}"


def spell_bytes(value: float) -> str:
    """Write a number of bytes in the largest unit that leaves a digit."""
    for size, unit in _BYTES:
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g} B"
