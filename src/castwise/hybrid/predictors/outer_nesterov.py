"""Nesterov momentum on whole windows (SNOO, Kallusky et al. 2025, arXiv 2510.15830).

    d     = weights now - slow            the step of a window, taken as a gradient
    b     = momentum * b + d
    slow  = slow + rate * (d + momentum * b)
    weights = slow

With momentum 0 it is Lookahead (Zhang et al. 2019). As published, it lands after every
window, unasked: give the trainer `verification="none"` and `correct_steps=0`. Asked
for its confidence it is therefore sure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from castwise.errors import SettingsError
from castwise.hybrid.exact_weights import Deltas
from castwise.hybrid.predictor import Settlement
from castwise.hybrid.predictors.windowed import WindowedPredictor


@final
class OuterNesterov(WindowedPredictor):
    """An outer optimizer over windows.

    Args:
        window: Steps between two outer steps. Default: 20.
        momentum: In [0, 1). Default: 0.5.
        rate: Outer learning rate, above 0. Default: 0.7.
    """

    name = "outer_nesterov"
    bytes_per_parameter = 8.0
    proposal_bytes_per_parameter = 8.0
    keeps_start = True

    def __init__(
        self, *, window: int = 20, momentum: float = 0.5, rate: float = 0.7
    ) -> None:
        super().__init__(window=window)
        if not (0.0 <= momentum < 1.0 and rate > 0.0):
            raise SettingsError(
                "outer_nesterov needs momentum in [0, 1) and rate above 0, got "
                f"momentum={momentum}, rate={rate}"
            )
        self._momentum, self._rate = momentum, rate
        self._slow: dict[str, Tensor] = {}
        self._buffer: dict[str, Tensor] = {}
        self._ahead: dict[str, Tensor] = {}  # the buffer, should the proposal land

    def confidence(self) -> float:
        """Be sure: what it does is an optimizer's step, no forecast."""
        return 1.0

    def propose(self, horizon: int) -> Deltas:
        """Return the way to the next slow weights; the horizon plays no part."""
        del horizon
        deltas = {}
        for name, value in self._weights.values().items():
            step = value - self._slow[name]
            self._ahead[name] = self._momentum * self._buffer[name] + step
            goal = (step + self._momentum * self._ahead[name]) * self._rate
            deltas[name] = goal - step
        return deltas

    def start_of_window(self) -> Mapping[str, Tensor]:
        """Return the slow weights."""
        return self._slow

    def settle(self, outcome: Settlement) -> None:
        """Take over the momentum of a landing; a refused one never was."""
        if outcome == "landed":
            self._buffer.update(self._ahead)
        self._ahead = {}
        super().settle(outcome)

    def _keep(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            if name in self._slow:
                self._slow[name].copy_(value)
            else:
                self._slow[name] = value.clone()
            self._buffer.setdefault(name, torch.zeros_like(value))

    def _kept(self) -> Any:
        return {"slow": self._slow, "buffer": self._buffer, "ahead": self._ahead}

    def _load_kept(self, kept: Any) -> None:
        self._slow, self._buffer, self._ahead = (
            {name: value.clone() for name, value in kept[part].items()}
            for part in ("slow", "buffer", "ahead")
        )
