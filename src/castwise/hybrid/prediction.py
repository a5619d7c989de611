"""One prediction from its proposal to the point where it can no longer be taken back.

It begins with a snapshot and a proposal, and moves the weights along it, one tensor at
a time. While corrective steps run at the landing point, the snapshot waits for a late
rollback, and what was promised for its residual.

No copy of the weights is made beside the snapshot: the weights that were left are read
from it. A predictor that keeps the landing as the start of its next window has the
promise, too, which is then the way between the two.
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

    promise: Deltas | None
    """What the predictor proposed; none once the landing tells it."""

    gains: Mapping[str, float]
    """What is made of the promise, by tensor."""

    snapshot: Snapshot
    """What brings the run back."""

    place: float = 0.0
    """Where the weights are: 0 where they were left, 1 at the end of the way."""

    landing: dict[str, Tensor] | None = None
    """A copy of the landing, where neither promise nor predictor has it any more."""

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
        if share == self.place:
            return
        assert self.promise is not None, "a landing does not move"
        left, self.place = self.place == 0, share
        for name, promise in self.promise.items():
            if share == 0:
                weights.put_back(self.snapshot, name)
                continue
            start = weights.value(name) if left else weights.left(self.snapshot, name)
            delta = self._scaled(name, promise)
            weights.write(name, torch.add(start, delta, alpha=share))

    def begin_again(self) -> None:
        """Take note that the weights were put back where they were left."""
        self.place, self.num_done = 0.0, 0

    def land(self, *, told: bool) -> None:
        """Let go of what is not needed at the landing point.

        Args:
            told: Whether the predictor keeps the landing from now on.
        """
        if told:
            self.promise = None

    def keep_landing(self, start_of_window: Mapping[str, Tensor]) -> None:
        """Copy the landing before the predictor goes on to another window."""
        if self.promise is None and self.landing is None:
            self.landing = {name: at.clone() for name, at in start_of_window.items()}

    @torch.no_grad()
    def steps(
        self, weights: ExactWeights, name: str, told: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the promised step of a weight, and the mean real one since landing.

        Args:
            weights: Where they are now.
            name: Of the weight.
            told: The landing as the predictor keeps it.
        """
        left = weights.left(self.snapshot, name)
        if self.promise is not None:
            promise = self.promise[name]
            landing = left + self._scaled(name, promise)
        else:
            landing = (self.landing or told)[name]
            promise = (landing - left) / self.gains[name]
        real = (weights.value(name) - landing) / self.num_corrected
        return promise / self.horizon, real

    def _scaled(self, name: str, promise: Tensor) -> Tensor:
        gain = self.gains[name]
        return promise if gain == 1.0 else promise * gain

    def state_dict(self, weights: ExactWeights) -> dict[str, Any]:
        """Return all of it, as plain data and tensors."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**fields, "snapshot": weights.portable(self.snapshot)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Prediction:
        """Build what `state_dict` returned."""
        return cls(**state)
