"""The back-test: would the last prediction have come true?

The cosine between the displacement of the last window of real steps and that of the
one before it. It needs no second copy of the weights, because 4096 coordinates drawn
once give the cosine of millions: its standard error is about 1/64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

NUM_COORDINATES = 4096


@final
class BackTest:
    """Cosine between what was promised for a window and what the window brought."""

    def __init__(self, num_coordinates: int = NUM_COORDINATES, seed: int = 0) -> None:
        self._num_coordinates, self._seed = num_coordinates, seed
        self._indices: dict[str, Tensor] = {}
        self._promised: Tensor | None = None
        self.cosine: float | None = None
        """The last finding; None before there was one."""

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Draw the coordinates, the same for equal names, sizes and seed."""
        sizes = {name: weight.numel() for name, weight in weights.items()}
        total = sum(sizes.values())
        drawn = torch.arange(total)
        if total > self._num_coordinates:
            generator = torch.Generator().manual_seed(self._seed)
            picked = torch.randint(total, (self._num_coordinates,), generator=generator)
            drawn = torch.unique(picked)  # sorted, so that tensors cut it into pieces
        first = 0
        for name, size in sizes.items():
            inside = drawn[(drawn >= first) & (drawn < first + size)] - first
            self._indices[name] = inside.to(weights[name].device)
            first += size

    def sketch(self, values: Mapping[str, Tensor]) -> Tensor:
        """The drawn coordinates of tensors, as one fp32 vector on the CPU."""
        parts = []
        for name, indices in self._indices.items():
            picked = values[name].reshape(-1)[indices]
            if picked.is_complex():
                picked = torch.view_as_real(picked).reshape(-1)
            parts.append(picked.float())
        return torch.cat([part.cpu() for part in parts])

    def promise(self, direction: Tensor | None) -> None:
        """Keep the sketch of a direction that the coming window is to be held to."""
        self._promised = direction

    def come(self, displacement: Tensor) -> None:
        """Compare what came with what was promised, if anything was."""
        if self._promised is None:
            return
        norms = self._promised.norm() * displacement.norm()
        cosine = float(self._promised @ displacement / norms) if norms > 0 else 0.0
        self.cosine = cosine if math.isfinite(cosine) else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the promise and the last finding; the coordinates follow the seed."""
        return {"promised": self._promised, "cosine": self.cosine}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._promised, self.cosine = state["promised"], state["cosine"]
