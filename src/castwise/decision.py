"""A choice made for the user, kept with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Decision(Generic[T]):
    """A chosen value and why it was chosen; reports print the reason."""

    value: T
    """What was chosen."""

    because: str
    """One clause that a person can check."""

    def __str__(self) -> str:
        return f"{self.value} ({self.because})"
