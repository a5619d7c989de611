"""Averaged weights for evaluation: an exponential moving average in fp32.

    average <- average + (1 - decay_t) * (weight - average)

with decay_t = min(decay, (1 + t) / (10 + t)), so that the first steps are forgotten
quickly (the warm-up of TensorFlow's ExponentialMovingAverage). Buffers are copied, not
averaged: a mean of integer counters or of running variances means nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from castwise.errors import SettingsError


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


@final
class ExponentialAverage(Averages):
    """An exponential moving average of every floating parameter, held in fp32.

    Args:
        model: Its parameters are averaged; tied parameters once.
        decay: Weight of the past, in [0, 1). Default: 0.999.

    Raises:
        SettingsError: If `decay` lies outside [0, 1).
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise SettingsError(
                f"An average needs a decay in [0, 1), got {decay}; 0.999 looks back "
                "about a thousand updates."
            )
        self._decay = decay
        self._num_updates = 0
        self._weights = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point() or parameter.is_complex()
        }
        self._averages = {
            name: _at_least_fp32(weight.detach()).clone()
            for name, weight in self._weights.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after one update."""
        past = min(self._decay, (1 + self._num_updates) / (10 + self._num_updates))
        self._num_updates += 1
        averages = list(self._averages.values())
        weights = [_at_least_fp32(weight.detach()) for weight in self._weights.values()]
        torch._foreach_lerp_(averages, weights, 1.0 - past)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Hold the averages in the model; the weights come back bit by bit."""
        kept = {name: weight.detach().clone() for name, weight in self._weights.items()}
        weights = tuple(self._weights.values())
        # They are what they were, so whoever watches their versions, such as a weight
        # storage that keeps the digits below 16 bits, has nothing to notice.
        with _unsafe_preserve_version_counter(weights):
            try:
                self._write(self._averages)
                yield
            finally:
                self._write(kept)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and the count that sets their decay."""
        return {"num_updates": self._num_updates, "averages": dict(self._averages)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned, into the same storage."""
        self._num_updates = state["num_updates"]
        for name, average in self._averages.items():
            average.copy_(state["averages"][name])


def _at_least_fp32(value: Tensor) -> Tensor:
    """Widen 16-bit values; fp32, fp64 and complex stay as they are."""
    return value.float() if value.dtype in {torch.bfloat16, torch.float16} else value
