"""How far to predict next, and when to leave it alone.

    accepted    1.5 times as far, up to `max_predict_steps`
    refused     half as far, down to `min_predict_steps`; after three in a row nothing
                is predicted for `full_steps` real steps, then for twice that, and so on

A task that cannot be predicted is asked ever more rarely, so that "do not predict" is
what the rule tends to there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from castwise.hybrid.phase_length import PhaseLength

_PATIENCE = 3
_LONGEST_COOLING = 1 << 20


@dataclass(kw_only=True, slots=True)
class _State:
    length: float
    refused_in_a_row: int = 0
    cooling: int = 0
    next_cooling: int


@final
class Horizon(PhaseLength):
    """The number of steps that the next proposal is worth.

    Args:
        least: Never fewer.
        most: Never more.
        full_steps: The first proposal is worth half of this; the first cooling, all.
    """

    def __init__(self, *, least: int, most: int, full_steps: int) -> None:
        self._least, self._most, self._full_steps = least, most, full_steps
        first = min(float(most), max(float(least), full_steps / 2))
        self._state = _State(length=first, next_cooling=full_steps)

    @property
    def length(self) -> int:
        """Steps of the next proposal."""
        return int(self._state.length)

    @property
    def cooling(self) -> int:
        """Real steps for which nothing is to be predicted."""
        return self._state.cooling

    def count_real_step(self) -> None:
        """Cool down by one step."""
        self._state.cooling = max(0, self._state.cooling - 1)

    def decline(self) -> str:
        """Decline nothing: refusals cool it down."""
        return ""

    def accepted(self, *, credited: float, paid: float) -> None:
        """Go further next time, and forget what was refused."""
        del credited, paid
        self._state.length = min(float(self._most), 1.5 * self._state.length)
        self._state.refused_in_a_row = 0
        self._state.next_cooling = self._full_steps

    def refused(self, *, paid: float) -> None:
        """Go less far, and after three in a row pause."""
        del paid
        self.shorten()
        self._state.refused_in_a_row += 1
        if self._state.refused_in_a_row >= _PATIENCE:
            self._state.cooling = self._state.next_cooling
            longer = 2 * self._state.next_cooling
            self._state.next_cooling = min(longer, _LONGEST_COOLING)

    def shorten(self) -> None:
        """Go half as far."""
        self._state.length = max(float(self._least), self._state.length / 2)

    def state_dict(self) -> dict[str, Any]:
        """Return length and cooling, as plain values."""
        state = self._state
        return {
            "length": state.length,
            "refused_in_a_row": state.refused_in_a_row,
            "cooling": state.cooling,
            "next_cooling": state.next_cooling,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._state = _State(**state)
