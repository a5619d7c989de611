"""Regularised nonlinear acceleration (Scieur, d'Aspremont and Bach 2016, 1606.04133).

Of the last iterates x_0 ... x_k, spaced evenly over a window, take the combination
whose residual is smallest:

    r_i = x_{i+1} - x_i;   minimise |sum_i c_i r_i|^2 + l |R|^2 |c|^2,   sum_i c_i = 1
    proposal = sum_i c_i x_{i+1}

On a quadratic, gradient descent's iterates combine to what a Krylov method finds. Noise
in the gradients ruins it: for deterministic problems and small models, since k + 1
copies of the weights are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from castwise.errors import SettingsError
from castwise.hybrid.exact_weights import Deltas
from castwise.hybrid.predictors.windowed import WindowedPredictor


@final
class ResidualMinimum(WindowedPredictor):
    """RNA over the iterates of a window.

    Args:
        window: Steps of a window, a multiple of `num_iterates`. Default: 20.
        num_iterates: How many residuals are combined, 2 or more. Default: 5.
        regularisation: Of the coefficients, relative. Default: 1e-8.
    """

    name = "rna"

    def __init__(
        self, *, window: int = 20, num_iterates: int = 5, regularisation: float = 1e-8
    ) -> None:
        super().__init__(window=window)
        if num_iterates < 2 or window % num_iterates or not regularisation >= 0:
            raise SettingsError(
                "rna needs num_iterates of 2 or more that divide the window, and a "
                f"regularisation of 0 or more; got window={window}, "
                f"num_iterates={num_iterates}, regularisation={regularisation}"
            )
        self.bytes_per_parameter = 4.0 * (num_iterates + 1)
        self._spacing = window // num_iterates
        self._regularisation = regularisation
        self._iterates: list[dict[str, Tensor]] = []

    def propose(self, horizon: int) -> Deltas:
        """Return the way to the best combination; the horizon plays no part."""
        del horizon
        weights = self._coefficients()
        now, deltas = self._iterates[-1], {}
        for name, value in now.items():
            delta = torch.zeros_like(value)
            for weight, iterate in zip(weights, self._iterates[1:], strict=True):
                delta.add_(iterate[name] - value, alpha=weight)
            deltas[name] = delta
        return deltas

    def _coefficients(self) -> list[float]:
        """Solve for the coefficients in fp64, where the Gram matrix is ill enough."""
        pairs = zip(self._iterates[1:], self._iterates[:-1], strict=True)
        rows = torch.stack(
            [
                torch.cat([_real(after[name] - before[name]) for name in after])
                for after, before in pairs
            ]
        ).double()
        gram = rows @ rows.mT
        gram /= gram.diagonal().sum().clamp_min(torch.finfo(torch.float64).tiny)
        gram.diagonal().add_(self._regularisation)
        ones = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
        solved = torch.linalg.lstsq(gram.cpu(), ones.cpu().unsqueeze(1)).solution
        return [float(each) for each in (solved / solved.sum()).squeeze(1)]

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
