"""The seam of all predictors: watch real steps, say how sure, propose where to go.

    predictor.begin(weights)         once, before the first step
    predictor.observe()              after each update by a gradient
    predictor.window_ended           it has seen enough to be asked
    predictor.confidence()           in [0, 1]: the back-test; None before there was one
    predictor.propose(horizon)       name -> fp32 delta, worth `horizon` steps
    predictor.settle(outcome)        what became of it; the next window begins

A proposal may be written into the predictor's own memory, and is then good until the
next settlement. A predictor that keeps the weights at which a window began
(`keeps_start`) lends them to whoever asks what came of a landing.

A skipped step is no update and is not observed. A window that ends without being asked
is settled as `not_asked`. Every trained parameter has to be in a proposal, under its
name in `named_parameters()`: a name too many or too few is an error.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from castwise.errors import PredictionError
from castwise.hybrid.exact_weights import Deltas, ExactWeights
from castwise.wording import did_you_mean

Settlement = Literal["not_asked", "refused", "landed", "moved"]
"""`refused`: the weights are back; `moved`: they were changed by something else."""


class Predictor(ABC):
    """Predicts where the weights go."""

    name: ClassVar[str]
    """What settings and reports call it."""

    bytes_per_parameter: float = 0.0
    """What it keeps between steps, per trained number."""

    proposal_bytes_per_parameter: float = 4.0
    """What a proposal takes beside that, per trained number."""

    keeps_start: ClassVar[bool] = False
    """Whether `start_of_window` has something to return."""

    def start_of_window(self) -> Mapping[str, Tensor]:
        """Return the weights that this window began at, in fp32; only to read.

        Nothing where none are kept.
        """
        return {}

    @abstractmethod
    def begin(self, weights: ExactWeights) -> None:
        """Take hold of the weights that it is to watch."""

    @abstractmethod
    def observe(self) -> None:
        """Note that the weights were updated by a gradient."""

    @property
    @abstractmethod
    def window_ended(self) -> bool:
        """Whether it can be asked now."""

    @abstractmethod
    def confidence(self) -> float | None:
        """How well the last window was foreseen, in [0, 1]; None if there was none."""

    @abstractmethod
    def propose(self, horizon: int) -> Deltas:
        """Return what `horizon` further steps would add to each weight."""

    @abstractmethod
    def settle(self, outcome: Settlement) -> None:
        """Begin the next window from where the weights are now."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return all that a checkpoint must hold."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""


def check_proposal(
    proposal: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, predictor: str
) -> None:
    """Refuse a proposal that does not fit the weights it is made for.

    Raises:
        PredictionError: A name is unknown or missing, or a shape differs.
    """
    for name in proposal:
        if name not in weights:
            raise PredictionError(
                f"{predictor} proposed a delta for {name!r}, which is no trained "
                f"parameter of the model{did_you_mean(name, weights)}; take names "
                "from named_parameters()"
            )
    for name, weight in weights.items():
        if name not in proposal:
            raise PredictionError(
                f"{predictor} proposed nothing for {name!r}; give every trained "
                "parameter a delta, of zeros if it is to stay"
            )
        if proposal[name].shape != weight.shape:
            raise PredictionError(
                f"{predictor} proposed a delta of shape {tuple(proposal[name].shape)} "
                f"for {name!r}, which has {tuple(weight.shape)}"
            )
