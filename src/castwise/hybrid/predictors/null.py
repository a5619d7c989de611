"""Predicts that nothing happens: the control that has to lose every benchmark.

A phase that predicts a loss and moves no weight is exactly this. It is always sure, and
every step that it takes the place of is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch

from castwise.hybrid.exact_weights import Deltas, ExactWeights
from castwise.hybrid.predictor import Predictor, Settlement


@final
class NullPredictor(Predictor):
    """Proposes no change, with full confidence.

    Args:
        window: Ignored; it can be asked after any step.
    """

    name = "null"

    def __init__(self, *, window: int = 1) -> None:
        del window
        self._weights: ExactWeights | None = None

    def begin(self, weights: ExactWeights) -> None:
        """Remember the shapes."""
        self._weights = weights

    def observe(self) -> None:
        """Learn nothing."""

    @property
    def window_ended(self) -> bool:
        """Always."""
        return True

    def confidence(self) -> float:
        """Be sure."""
        return 1.0

    def propose(self, horizon: int) -> Deltas:
        """Return zeros."""
        del horizon
        assert self._weights is not None, "begin comes first"
        values = self._weights.values()
        return {name: torch.zeros_like(value) for name, value in values.items()}

    def settle(self, outcome: Settlement) -> None:
        """Take no notice."""
        del outcome

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accept nothing."""
        del state
