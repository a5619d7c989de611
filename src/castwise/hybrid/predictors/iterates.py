"""What predictors share that combine several iterates of a window.

They keep `num_iterates + 1` copies of the weights, spaced evenly, and need of them only
the Gram matrix of the steps between: in fp64, where it is ill-conditioned enough.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from castwise.errors import SettingsError
from castwise.hybrid.exact_weights import Deltas
from castwise.hybrid.predictors.windowed import WindowedPredictor


class IteratesPredictor(WindowedPredictor):
    """Combines the steps between the iterates of a window.

    Args:
        window: Steps of a window, a multiple of `num_iterates`.
        num_iterates: How many steps are combined, 2 or more.
    """

    keeps_start = True

    def __init__(self, *, window: int, num_iterates: int) -> None:
        super().__init__(window=window)
        if num_iterates < 2 or window % num_iterates:
            raise SettingsError(
                f"{self.name} needs num_iterates of 2 or more that divide the window; "
                f"got window={window}, num_iterates={num_iterates}"
            )
        self.bytes_per_parameter = 4.0 * (num_iterates + 1)
        self._spacing = window // num_iterates
        self._iterates: list[dict[str, Tensor]] = []

    def propose(self, horizon: int) -> Deltas:
        """Return the combination of the steps, as a way from where the weights are."""
        gram = self._gram()
        weights: Sequence[float] = [0.0] * len(gram)
        if bool(gram.isfinite().all()):  # else there is no course to go on along
            weights = self._combination(gram, horizon / self._spacing)
        deltas = {}
        for name, value in self._iterates[-1].items():
            delta = torch.zeros_like(value)
            pairs = zip(self._iterates[1:], self._iterates[:-1], strict=True)
            for weight, (after, before) in zip(weights, pairs, strict=True):
                delta.add_(after[name] - before[name], alpha=weight)
            deltas[name] = delta
        return deltas

    def start_of_window(self) -> Mapping[str, Tensor]:
        """Return the first iterate."""
        return self._iterates[0]

    @abstractmethod
    def _combination(self, gram: Tensor, num_steps: float) -> Sequence[float]:
        """Return the multiple of each step that is to be added to the weights.

        Args:
            gram: fp64 [k, k] of the steps, on the CPU, with a trace of 1.
            num_steps: Steps of the window's spacing to go.
        """

    def _gram(self) -> Tensor:
        pairs = zip(self._iterates[1:], self._iterates[:-1], strict=True)
        rows = torch.stack(
            [
                torch.cat([_real(after[name] - before[name]) for name in after])
                for after, before in pairs
            ]
        ).double()
        gram = (rows @ rows.mT).cpu()
        return gram / gram.trace().clamp_min(torch.finfo(torch.float64).tiny)

    def _look(self) -> None:
        if self._age % self._spacing == 0:
            self._iterates.append(_copy(self._weights.values()))

    def _keep(self, values: Mapping[str, Tensor]) -> None:
        self._iterates = [_copy(values)]

    def _kept(self) -> Any:
        return self._iterates

    def _load_kept(self, kept: Any) -> None:
        self._iterates = [_copy(each) for each in kept]


def _copy(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in values.items()}


def _real(value: Tensor) -> Tensor:
    flat = value.reshape(-1)
    return torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
