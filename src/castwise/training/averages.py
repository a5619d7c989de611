"""Averaged weights for evaluation, in fp32: an exponential average, or the latest ones.

    EMA     average <- average + (1 - decay_t) * (weight - average)
    LAWA    the mean of the last `count` weights, taken every `every` updates
            (Kaddour 2022, arXiv 2209.14981)

with decay_t = min(decay, (1 + t) / (10 + t)), so that the first steps are forgotten
quickly (the warm-up of TensorFlow's ExponentialMovingAverage). Buffers are copied, not
averaged: a mean of integer counters or of running variances means nothing.

Where a weight storage keeps the digits that 16-bit weights lack, the exact weight is
averaged, and not the 16 bits that the model sees of it. A tied parameter counts once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from castwise.errors import SettingsError
from castwise.optim.holding import HeldWeights

Weights: TypeAlias = dict[str, Tensor]
"""Name of a parameter -> a tensor of its shape."""

AverageKind = Literal["ema", "lawa", "none"]
"""The averages by their names in settings."""


class Averages(ABC):
    """The seam: what the trainer asks of averaged weights."""

    @abstractmethod
    def update(self) -> None:
        """Take in the weights after one update."""

    @abstractmethod
    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Hold the averages in the model for the length of a with-block."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return all that a checkpoint must hold."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""


@final
class NoAverages(Averages):
    """The null object: evaluation sees the weights themselves."""

    def update(self) -> None:
        """Do nothing."""

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Leave the weights in place."""
        yield

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept nothing."""
        del state


class AveragedWeights(Averages):
    """What averages of a model's weights share.

    Args:
        model: Its floating parameters are averaged.
        held: The weight storage in force under its optimizer. Default: none.
    """

    def __init__(self, model: nn.Module, held: HeldWeights | None = None) -> None:
        self._model, self._held = model, held
        self._weights = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point() or parameter.is_complex()
        }

    def _exact(self) -> Weights:
        """Return the weights in fp32 or wider; they may alias the parameters."""
        joined = {} if self._held is None else self._held.fp32_weights(self._model)
        return {
            name: _at_least_fp32(joined.get(name, weight).detach())
            for name, weight in self._weights.items()
        }

    @abstractmethod
    def _average(self) -> Mapping[str, Tensor]:
        """Return the averages as they are now."""

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Hold the averages in the model; the weights come back bit by bit."""
        kept = {name: weight.detach().clone() for name, weight in self._weights.items()}
        weights = tuple(self._weights.values())
        # They are what they were, so whoever watches their versions, such as a weight
        # storage that keeps the digits below 16 bits, has nothing to notice.
        with _unsafe_preserve_version_counter(weights):
            try:
                self._write(self._average())
                yield
            finally:
                self._write(kept)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(values[name])


@final
class ExponentialAverage(AveragedWeights):
    """An exponential moving average of every floating parameter, held in fp32.

    Args:
        model: Its parameters are averaged.
        decay: Weight of the past, in [0, 1). Default: 0.999.
        held: The weight storage in force under its optimizer. Default: none.

    Raises:
        SettingsError: If `decay` lies outside [0, 1).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        decay: float = 0.999,
        held: HeldWeights | None = None,
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise SettingsError(
                f"An average needs a decay in [0, 1), got {decay}; 0.999 looks back "
                "about a thousand updates."
            )
        super().__init__(model, held)
        self._decay = decay
        self._num_updates = 0
        self._averages = _copies(self._exact())

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after one update."""
        past = min(self._decay, (1 + self._num_updates) / (10 + self._num_updates))
        self._num_updates += 1
        averages, weights = list(self._averages.values()), list(self._exact().values())
        torch._foreach_lerp_(averages, weights, 1.0 - past)

    def _average(self) -> Weights:
        return self._averages

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and the count that sets their decay."""
        return {"num_updates": self._num_updates, "averages": dict(self._averages)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned, into the same storage."""
        self._num_updates = state["num_updates"]
        for name, average in self._averages.items():
            average.copy_(state["averages"][name])


@final
class LatestAverage(AveragedWeights):
    """The mean of the latest weights, each held in fp32.

    It forgets completely what is older than `count * every` updates, where an
    exponential average remembers its beginnings for ever, and costs 4 bytes per
    parameter for each of the weights that it keeps.

    Args:
        model: Its parameters are averaged.
        every: Updates from one weight that is kept to the next. Default: 10.
        count: How many are kept. Default: 8.
        held: The weight storage in force under its optimizer. Default: none.

    Raises:
        SettingsError: If a count is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 10,
        count: int = 8,
        held: HeldWeights | None = None,
    ) -> None:
        for name, value in (("every", every), ("count", count)):
            if value < 1:
                raise SettingsError(
                    f"An average of the latest weights needs {name} >= 1, got {value}; "
                    "8 weights, 10 updates apart, look back 80 updates."
                )
        super().__init__(model, held)
        self._every, self._num_updates = every, 0
        self._latest: deque[Weights] = deque(maxlen=count)

    def update(self) -> None:
        """Take in the weights, if it is their turn."""
        self._num_updates += 1
        if self._num_updates % self._every == 0:
            self._latest.append(_copies(self._exact()))

    @torch.no_grad()
    def _average(self) -> Weights:
        """Sum up in the order in which they came; before the first, the weights."""
        if not self._latest:
            return self._exact()
        total = _copies(self._latest[0])
        for weights in list(self._latest)[1:]:
            torch._foreach_add_(list(total.values()), list(weights.values()))
        torch._foreach_div_(list(total.values()), float(len(self._latest)))
        return total

    def state_dict(self) -> dict[str, Any]:
        """Return every weight that is kept, and the mean, which is what is for use."""
        return {
            "num_updates": self._num_updates,
            "latest": list(self._latest),
            "averages": self._average(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self._num_updates = state["num_updates"]
        self._latest.clear()
        for weights in state["latest"]:
            self._latest.append(
                {
                    name: weights[name].detach().clone().to(weight.device)
                    for name, weight in self._weights.items()
                }
            )


def _copies(weights: Mapping[str, Tensor]) -> Weights:
    return {name: weight.detach().clone() for name, weight in weights.items()}


def _at_least_fp32(value: Tensor) -> Tensor:
    """Widen 16-bit values; fp32, fp64 and complex stay as they are."""
    return value.float() if value.dtype in {torch.bfloat16, torch.float16} else value
