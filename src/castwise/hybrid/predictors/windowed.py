"""What predictors share that compare one window of real steps with the next.

They differ in what they promise for the coming window (`_promise`), in what they keep
of this one (`_keep`), and in what they propose at its end.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from castwise.errors import SettingsError
from castwise.hybrid.exact_weights import ExactWeights
from castwise.hybrid.predictor import Predictor, Settlement
from castwise.hybrid.predictors.backtest import BackTest


class WindowedPredictor(Predictor):
    """Counts the steps of a window and back-tests it at its end.

    Args:
        window: Real steps in a window.
    """

    def __init__(self, *, window: int) -> None:
        if window < 1:
            raise SettingsError(
                f"a predictor needs a window of 1 step or more, got {window}"
            )
        self._window = window
        self._age = 0
        self._backtest = BackTest()
        self._start: Tensor | None = None  # sketch of the weights at the window's start
        self._bound: ExactWeights | None = None

    @property
    def _weights(self) -> ExactWeights:
        assert self._bound is not None, "begin comes first"
        return self._bound

    def begin(self, weights: ExactWeights) -> None:
        """Draw the coordinates of the back-test and begin the first window."""
        self._bound = weights
        self._backtest.begin(weights.values())
        self.settle("moved")

    def observe(self) -> None:
        """Count the step; at the end of the window, see what came of the promise."""
        self._age += 1
        self._look()
        if self.window_ended:
            self._backtest.come(self._displacement())

    @property
    def window_ended(self) -> bool:
        """Whether the window is full."""
        return self._age >= self._window

    def confidence(self) -> float | None:
        """The back-test's cosine, not below 0; none in the first window of all."""
        cosine = self._backtest.cosine
        return None if cosine is None else max(0.0, cosine)

    def settle(self, outcome: Settlement) -> None:
        """Begin the next window, with a promise if this one can make one."""
        ended = self.window_ended and outcome in {"not_asked", "refused"}
        self._backtest.promise(self._promise() if ended else None)
        if not ended:
            self._backtest.cosine = None
        values = self._weights.values()
        self._age, self._start = 0, self._backtest.sketch(values)
        self._keep(values)

    def state_dict(self) -> dict[str, Any]:
        """Return the age of the window, its start and the back-test."""
        return {
            "window": self._window,
            "age": self._age,
            "start": self._start,
            "backtest": self._backtest.state_dict(),
            "kept": self._kept(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._age, self._start = int(state["age"]), state["start"]
        self._backtest.load_state_dict(state["backtest"])
        self._load_kept(state["kept"])

    def _displacement(self) -> Tensor:
        """Sketch of how far the weights have come in this window."""
        assert self._start is not None, "a window has a start"
        return self._backtest.sketch(self._weights.values()) - self._start

    def _promise(self) -> Tensor | None:
        """Sketch of the direction that the next window is held to."""
        return self._displacement()

    def _look(self) -> None:
        """Look at the weights after a step of the window."""

    @abstractmethod
    def _keep(self, values: Mapping[str, Tensor]) -> None:
        """Keep what the proposal will need of the weights at the window's start."""

    @abstractmethod
    def _kept(self) -> Any:
        """Return what is kept, for a checkpoint."""

    @abstractmethod
    def _load_kept(self, kept: Any) -> None:
        """Put back what `_kept` returned."""
