"""How fast the loss falls, so that a fall can be told in real steps.

The mean of the older half of the last losses less that of the newer half, over the
steps between their middles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final


@final
class Pace:
    """Losses of the last real steps.

    Args:
        window: The pace is that of twice so many steps.
    """

    def __init__(self, window: int) -> None:
        self._num_kept = 2 * window
        self._losses: list[float] = []

    def observe(self, loss: float) -> None:
        """Take in the loss of a real step."""
        self._losses.append(loss)
        del self._losses[: -self._num_kept]

    def reset(self) -> None:
        """Forget the losses: the weights were moved."""
        self._losses = []

    def worth(self, fall: float) -> float:
        """Return how many real steps a fall of the loss is worth; 0 if unknown."""
        half = len(self._losses) // 2
        if half == 0:
            return 0.0
        older, newer = self._losses[:half], self._losses[-half:]
        between = len(self._losses) - half
        per_step = (sum(older) - sum(newer)) / half / between
        return fall / per_step if per_step > 0 else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the losses."""
        return {"losses": list(self._losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._losses = [float(loss) for loss in state["losses"]]
