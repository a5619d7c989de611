"""Settings of a run that differ from those of the checkpoint it resumes from.

A resumed run continues the run that was; with other settings it would be a third run
that nobody asked for (fp16 resumed as bf16 loses its loss scale in silence). So the
difference is an error, and the error names every setting at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from castwise.errors import ContradictionError

if TYPE_CHECKING:
    from collections.abc import Mapping


class _Absent:
    def __repr__(self) -> str:
        return "(nothing)"


ABSENT: Final = _Absent()
"""Stands for a nested setting that only the other side has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contradiction:
    """One setting that two runs do not share."""

    name: str
    """Dotted path of the setting."""

    asked: Any
    """Its value in the run that wants to resume."""

    stored: Any
    """Its value in the checkpoint."""

    def __str__(self) -> str:
        return f"{self.name} is {self.stored!r} there but {self.asked!r} here"


def contradictions(
    asked: Mapping[str, Any], stored: Mapping[str, Any]
) -> list[Contradiction]:
    """Find every setting that both sides name and on which they differ.

    A setting that only one side names is no contradiction: a setting may be younger
    than the checkpoint. Within a nested setting, though, absence is a difference.
    Tuples equal lists and NaN equals NaN, as settings pass through JSON and YAML.

    Args:
        asked: Settings of the run that wants to resume.
        stored: Settings of the run that wrote the checkpoint.

    Returns:
        The differences in the order of `asked`.
    """
    return [
        difference
        for name, value in asked.items()
        if name in stored
        for difference in _compare(name, value, stored[name])
    ]


def refuse_contradictions(
    asked: Mapping[str, Any], stored: Mapping[str, Any], *, where: object
) -> None:
    """Raise one error that names every setting that differs, if any does.

    Args:
        asked: Settings of the run that wants to resume.
        stored: Settings of the run that wrote the checkpoint.
        where: The checkpoint, for the message.

    Raises:
        ContradictionError: With both values of each setting, and the remedy.
    """
    found = contradictions(asked, stored)
    if found:
        names = ", ".join(each.name for each in found)
        raise ContradictionError(
            f"cannot resume from {where}: {'; '.join(map(str, found))}; drop {names} "
            "to continue that run, or start a new run in another folder"
        )


def _compare(name: str, asked: Any, stored: Any) -> list[Contradiction]:
    if isinstance(asked, dict) and isinstance(stored, dict):
        keys = dict.fromkeys([*asked, *stored])
        return [
            difference
            for key in keys
            for difference in _compare(
                f"{name}.{key}", asked.get(key, ABSENT), stored.get(key, ABSENT)
            )
        ]
    if _same(asked, stored):
        return []
    return [Contradiction(name=name, asked=asked, stored=stored)]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b  # else True would equal 1
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return bool(a == b)
