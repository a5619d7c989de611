"""Goes on along the last window, as far as the back-test allows.

    delta = confidence * horizon * (weights now - weights a window ago) / window

The displacement of a window averages the noise of its steps, and contains weight decay
and whatever else the optimizer does. Shrunk by its cosine with the window before, it is
the best multiple of itself in least squares if the next window is to it as it was to
the last. A proposal needs no memory: it is written over the anchors, which the next
settlement sets anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from castwise.errors import PredictionError
from castwise.hybrid.exact_weights import Deltas
from castwise.hybrid.predictors.windowed import WindowedPredictor


@final
class WindowLine(WindowedPredictor):
    """A straight line through the ends of the window; the default."""

    name = "window_line"
    bytes_per_parameter = 4.0
    proposal_bytes_per_parameter = 0.0
    keeps_start = True

    def __init__(self, *, window: int = 20) -> None:
        super().__init__(window=window)
        self._anchor: dict[str, Tensor] = {}
        self._reach: float | None = (
            None  # of the line that stands in the anchors' place
        )

    def propose(self, horizon: int) -> Deltas:
        """Return the line, shrunk by the back-test, in the place of the anchors."""
        reach = (self.confidence() or 0.0) * horizon / self._age
        if self._reach is None:
            for name, value in self._weights.values().items():
                anchor = self._anchor[name]
                torch.sub(value, anchor, out=anchor).mul_(reach)
            self._reach = reach
        elif reach != self._reach:
            raise PredictionError(
                "window_line has proposed already, in the place of its anchors; settle "
                f"that proposal before {horizon} steps are asked for"
            )
        return dict(self._anchor)

    def start_of_window(self) -> Mapping[str, Tensor]:
        """Return the anchors."""
        return self._anchor

    def _keep(self, values: Mapping[str, Tensor]) -> None:
        self._reach = None
        for name, value in values.items():
            if name in self._anchor:
                self._anchor[name].copy_(value)
            else:
                self._anchor[name] = value.clone()

    def _kept(self) -> Any:
        return {"anchor": self._anchor, "reach": self._reach}

    def _load_kept(self, kept: Any) -> None:
        self._reach = kept["reach"]
        for name, anchor in self._anchor.items():
            anchor.copy_(kept["anchor"][name])
