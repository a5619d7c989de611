"""The seam between the trainer's loop and whoever makes its steps in another way.

A plain step is an update by the gradient of one batch. A hybrid run makes some steps
without a gradient, takes others back, and decides itself which weights enter the
averages. The loop keeps what is left: rates, journal, display, checkpoints, signals.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from castwise.training.outcome import Skipped, Stepped

if TYPE_CHECKING:
    from castwise.training.trainer import BatchLoss


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened in a step and belongs into the journal."""

    name: str
    """Kind of the journal's line."""

    values: Mapping[str, Any]
    """What the line holds."""

    note: str = ""
    """What a person is told at once; empty for nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """One step that was made."""

    loss: BatchLoss
    """What the task said about the batch."""

    outcome: Stepped | Skipped | None
    """What became of the update; none where no gradient was computed."""

    events: Sequence[Event] = field(default_factory=tuple)
    """What happened beside it."""


class Stepping(ABC):
    """Makes the steps of a trainer, and keeps its averages."""

    @abstractmethod
    def step(self, batch: Any) -> Made:
        """Make one step with a batch."""

    @abstractmethod
    def values(self) -> Mapping[str, str | float]:
        """Return where it stands, for display and journal."""

    @abstractmethod
    def peak_bytes(self) -> int:
        """Return the highest memory since this was last asked; 0 if it measures none.

        Whoever measures parts of a run resets the peak that the loop reads.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold beside model, optimizer and averages."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
