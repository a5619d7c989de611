"""A predictor that tests tell what to propose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from castwise.hybrid.exact_weights import Deltas, ExactWeights
from castwise.hybrid.predictor import Predictor, Settlement


class Planted(Predictor):
    """Always sure; proposes what a function of the weights says."""

    name = "planted"

    def __init__(self, propose: Callable[[dict[str, Tensor], int], Deltas]) -> None:
        self._propose = propose
        self.settled: list[Settlement] = []
        self.num_observed = 0

    def begin(self, weights: ExactWeights) -> None:
        """Keep the weights."""
        self._weights = weights

    def observe(self) -> None:
        """Count."""
        self.num_observed += 1

    @property
    def window_ended(self) -> bool:
        """Always."""
        return True

    def confidence(self) -> float:
        """Be sure."""
        return 0.99

    def propose(self, horizon: int) -> Deltas:
        """Ask the function."""
        return self._propose(self._weights.values(), horizon)

    def settle(self, outcome: Settlement) -> None:
        """Keep the outcome."""
        if outcome != "not_asked":
            self.settled.append(outcome)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accept nothing."""
        del state


def away(values: dict[str, Tensor], horizon: int) -> Deltas:
    """To places where the loss is much higher."""
    del horizon
    return {name: torch.full_like(value, 3.0) for name, value in values.items()}


def far_away(values: dict[str, Tensor], horizon: int) -> Deltas:
    """To places that a few corrective steps cannot repair."""
    deltas = away(values, horizon)
    generator = torch.Generator().manual_seed(3)
    deltas["4.weight"] = 30 * torch.randn(values["4.weight"].shape, generator=generator)
    return deltas
