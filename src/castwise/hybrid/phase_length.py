"""The seam of what decides how far to predict, and whether at all.

    reason = lengths.decline()          asked when the gate would open; "" to go on
    lengths.length                      steps that the proposal is to be worth
    lengths.accepted(credited, paid)    it landed: what it brought and cost, in steps
    lengths.refused(paid)               it was rolled back, at once or later

`horizon.py` is a rule of thumb, `arms.py` a bandit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any


class PhaseLength(ABC):
    """How far the next prediction goes."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Steps of the next proposal."""

    @property
    @abstractmethod
    def cooling(self) -> int:
        """Real steps for which nothing is to be predicted."""

    @abstractmethod
    def decline(self) -> str:
        """Choose, and say why nothing is to be predicted now; empty to predict."""

    @abstractmethod
    def count_real_step(self) -> None:
        """Note a step by a gradient."""

    @abstractmethod
    def accepted(self, *, credited: float, paid: float) -> None:
        """Learn from a landing; both in real steps."""

    @abstractmethod
    def refused(self, *, paid: float) -> None:
        """Learn from a rollback; in real steps, lost corrective ones included."""

    @abstractmethod
    def shorten(self) -> None:
        """Go less far: the loss is leaving its course."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return all of it, as plain values."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
