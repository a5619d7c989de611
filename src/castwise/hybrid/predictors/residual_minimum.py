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

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from castwise.errors import SettingsError
from castwise.hybrid.predictors.iterates import IteratesPredictor


@final
class ResidualMinimum(IteratesPredictor):
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
        super().__init__(window=window, num_iterates=num_iterates)
        if not regularisation >= 0:
            raise SettingsError(
                f"rna needs a regularisation of 0 or more, got {regularisation}"
            )
        self._regularisation = regularisation

    def _combination(self, gram: Tensor, num_steps: float) -> Sequence[float]:
        """Solve for c; as steps back from the last iterate they are sums of c."""
        del num_steps  # it goes to the minimum, wherever that is
        gram = gram + self._regularisation * torch.eye(len(gram), dtype=gram.dtype)
        ones = torch.ones(len(gram), 1, dtype=gram.dtype)
        solved = torch.linalg.lstsq(gram, ones).solution.squeeze(1)
        weights = solved / solved.sum()
        # x_{i+1} lies before x_k by r_{i+1} ... r_{k-1}, so r_j is taken back by every
        # c_i with i < j.
        before = weights.cumsum(0) - weights
        return [-float(each) for each in before]
