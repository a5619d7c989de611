"""What predictions got wrong, tensor by tensor, learnt from the steps after a landing.

At a landing point real gradients are computed again. For each tensor, the update that
they make is compared with the update that was promised, both per step:

    gain = <real, promised> / <promised, promised>

the best multiple of the promise in least squares. Its moving average, held in [0, 1],
scales the next proposal for that tensor. The promise is the predictor's own, before any
gain, so that a gain does not learn from itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from torch import Tensor

LEAST_GAIN = 0.05
"""A tensor that is not moved at all could never show that it is predictable again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Residual:
    """Promise and truth of one tensor."""

    gain: float
    """The multiple of the promise that would have been right."""

    cosine: float
    """Between the real and the promised direction."""

    norm_ratio: float
    """Length of the real update over that of the promised one."""


@final
class Residuals:
    """Gains by tensor, and the last residual of each.

    Args:
        memory: Weight of the past in the moving average, in [0, 1). Default: 0.5.
    """

    def __init__(self, *, memory: float = 0.5) -> None:
        self._memory = memory
        self._gains: dict[str, float] = {}
        self.last: dict[str, Residual] = {}

    def gain(self, name: str) -> float:
        """What the next proposal for a tensor is multiplied by."""
        return max(LEAST_GAIN, self._gains.get(name, 1.0))

    @torch.no_grad()
    def learn(self, promised: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> None:
        """Compare the updates of one step: what was proposed, and what came."""
        for name, promise in promised.items():
            residual = _residual(promise, real[name])
            if residual is not None:
                before = self._gains.get(name, 1.0)
                after = self._memory * before + (1 - self._memory) * residual.gain
                self._gains[name] = min(1.0, max(0.0, after))
                self.last[name] = residual

    def state_dict(self) -> dict[str, Any]:
        """Return gains and last residuals, as plain values."""
        last = {name: asdict(residual) for name, residual in self.last.items()}
        return {"gains": dict(self._gains), "last": last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._gains = dict(state["gains"])
        self.last = {name: Residual(**each) for name, each in state["last"].items()}


def _residual(promised: Tensor, real: Tensor) -> Residual | None:
    """Return none where nothing was promised, or a sum is not finite."""
    promise, came = _flat(promised), _flat(real)
    dot, square = float(promise @ came), float(promise @ promise)
    length = float(came.norm())
    if not (0 < square < float("inf") and 0 < length < float("inf")):
        return None
    return Residual(
        gain=dot / square,
        cosine=dot / (square**0.5 * length),
        norm_ratio=length / square**0.5,
    )


def _flat(value: Tensor) -> Tensor:
    """One vector of fp64: a sum of millions of squares needs it."""
    if value.is_complex():
        value = torch.view_as_real(value)
    return value.double().reshape(-1)
