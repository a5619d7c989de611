"""One prediction from its proposal to the point where it can no longer be taken back.

It begins with a snapshot and a proposal, and moves the weights along it. While
corrective steps run at the landing point, the snapshot waits for a late rollback and
the promise for its residual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from castwise.hybrid.exact_weights import Deltas, ExactWeights, Snapshot


@dataclass(kw_only=True, slots=True)
class Prediction:
    """A proposal under way, or landed and still on trial."""

    horizon: int
    """Steps that the proposal claims to be worth."""

    start: dict[str, Tensor]
    """Exact weights that were left, in fp32."""

    promise: Deltas
    """What the predictor proposed, before gains."""

    delta: Deltas
    """What is added to the weights in all."""

    snapshot: Snapshot
    """What brings the run back."""

    num_done: int = 0
    """Batches of a stepwise prediction so far."""

    num_corrected: int = 0
    """Corrective steps that were real updates so far."""

    confidence: float | None = None
    """What the predictor said when it was asked."""

    paid: float = 0.0
    """What verification has cost so far, in real steps."""

    @torch.no_grad()
    def move(self, weights: ExactWeights, share: float) -> None:
        """Put the weights at a share of the way: 0 where they were, 1 at its end."""
        if share == 0:
            weights.write(self.start)
            return
        weights.write(
            {
                name: torch.add(start, self.delta[name], alpha=share)
                for name, start in self.start.items()
            }
        )

    @torch.no_grad()
    def real_step(self, name: str, value: Tensor) -> Tensor:
        """Return the mean update of a weight in the corrective steps so far."""
        return (value - (self.start[name] + self.delta[name])) / self.num_corrected

    def promised_step(self, name: str) -> Tensor:
        """Return what was promised of a weight for each step."""
        return self.promise[name] / self.horizon

    def state_dict(self, weights: ExactWeights) -> dict[str, Any]:
        """Return all of it, as plain data and tensors."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**fields, "snapshot": weights.portable(self.snapshot)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Prediction:
        """Build what `state_dict` returned."""
        return cls(**state)
