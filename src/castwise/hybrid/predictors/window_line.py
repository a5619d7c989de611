"""Goes on along the last window, as far as the back-test allows.

    delta = confidence * horizon * (weights now - weights a window ago) / window

The displacement of a window averages the noise of its steps, and contains weight decay
and whatever else the optimizer does. Shrunk by its cosine with the window before, it is
the best multiple of itself in least squares if the next window is to it as it was to
the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor

from castwise.hybrid.exact_weights import Deltas
from castwise.hybrid.predictors.windowed import WindowedPredictor


@final
class WindowLine(WindowedPredictor):
    """A straight line through the ends of the window; the default."""

    name = "window_line"
    bytes_per_parameter = 4.0

    def __init__(self, *, window: int = 20) -> None:
        super().__init__(window=window)
        self._anchor: dict[str, Tensor] = {}

    def propose(self, horizon: int) -> Deltas:
        """Return the line, shrunk by the back-test."""
        reach = (self.confidence() or 0.0) * horizon / self._age
        return {
            name: (value - self._anchor[name]).mul_(reach)
            for name, value in self._weights.values().items()
        }

    def _keep(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            if name in self._anchor:
                self._anchor[name].copy_(value)
            else:
                self._anchor[name] = value.clone()

    def _kept(self) -> Any:
        return self._anchor

    def _load_kept(self, kept: Any) -> None:
        for name, anchor in self._anchor.items():
            anchor.copy_(kept[name])
