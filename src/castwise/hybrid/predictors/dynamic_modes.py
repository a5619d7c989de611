"""Dynamic mode decomposition of the weights' course (Dogra, Redman 2020, 2006.02361).

Of the steps d_0 ... d_{k-1} between evenly spaced iterates, fit the linear map that
takes each to the next, on the few directions that carry them, and let it run on:

    d_{i+1} ~ A d_i,   A = U T U^+,   proposal = sum_{j=1..n} A^j d_{k-1}

Eigenvalues of T outside of the unit circle are put on it: a step that grows would leave
every region where it was seen. On noise T is small, and so is the proposal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from castwise.errors import SettingsError
from castwise.hybrid.predictors.iterates import IteratesPredictor

_LEAST_SHARE = 1e-10  # of the largest eigenvalue: below it a direction is rounding


@final
class DynamicModes(IteratesPredictor):
    """The linear map of the window's steps, run on.

    Args:
        window: Steps of a window, a multiple of `num_iterates`. Default: 20.
        num_iterates: Steps that are compared, 3 or more. Default: 5.
        rank: Directions of the map, at least 1. Default: 3.
    """

    name = "dmd"

    def __init__(
        self, *, window: int = 20, num_iterates: int = 5, rank: int = 3
    ) -> None:
        super().__init__(window=window, num_iterates=num_iterates)
        if num_iterates < 3 or not 1 <= rank < num_iterates:
            raise SettingsError(
                "dmd needs num_iterates of 3 or more and a rank from 1 to one less, "
                f"got num_iterates={num_iterates}, rank={rank}"
            )
        self._rank = rank

    def _combination(self, gram: Tensor, num_steps: float) -> Sequence[float]:
        """Work in the coordinates of the steps: weights are never multiplied."""
        squares, vectors = torch.linalg.eigh(gram[:-1, :-1])
        kept = squares > _LEAST_SHARE * squares[-1].clamp_min(0)
        squares, vectors = squares[kept][-self._rank :], vectors[:, kept]
        if not len(squares):  # nothing moved
            return [0.0] * len(gram)
        into = vectors[:, -self._rank :] / squares.sqrt()  # steps -> coordinates
        step = into.mT @ gram[:-1, 1:] @ into
        start = into.mT @ gram[:-1, -1]
        weights = into @ _run_on(step, start, num_steps)
        return [*map(float, weights), 0.0]


def _run_on(step: Tensor, start: Tensor, num_steps: float) -> Tensor:
    """Return sum_{j=1..n} step^j start, with a part of the last one where n has one."""
    values, vectors = torch.linalg.eig(step)
    values = values / values.abs().clamp_min(1.0)
    modes = torch.linalg.lstsq(vectors, start.to(vectors.dtype).unsqueeze(1)).solution
    whole = int(num_steps)
    powers = torch.cumprod(values.expand(whole + 1, -1), 0)
    total = powers[:whole].sum(0) + (num_steps - whole) * powers[whole]
    reached: Tensor = (vectors @ (total.unsqueeze(1) * modes)).squeeze(1).real
    return reached
