"""Is the loss lower at the landing point? Two forwards on one fresh batch decide.

Both forwards see the same samples, in eval mode and from the same random states, so
that the difference of each pair is the effect of the prediction alone:

    accepted if  mean(d) + z * se(d) < 0,  d_i = loss_i(after) - loss_i(before)

A loss of one number has no spread that could be known, so its se is 0. In a low format
the mean of d is wrong by up to 1e-3 (measured on a small transformer: 9e-4 at most), so
a smaller one is settled by two more forwards in the precision of full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from castwise.hybrid.agreement import Agreement, Alone

LossFunction: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""Model and batch to a loss: one number, or one for each sample."""

LOW_FORMAT_ERROR = 1e-3
"""A mean difference below this may be rounding, in bf16 or fp16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a pair of forwards says about a prediction."""

    accepted: bool
    """Whether the weights stay where they were predicted."""

    before: float
    """Mean loss at the weights that were left."""

    after: float
    """Mean loss at the landing point."""

    error: float
    """Standard error of the difference; 0 where it cannot be known."""

    format: str
    """What the forwards computed in."""

    @property
    def because(self) -> str:
        """The reason, one clause."""
        if not math.isfinite(self.after):
            return f"the loss at the landing point was {self.after}"
        word = "fell" if self.after < self.before else "did not fall"
        noise = f" +- {self.error:.1g}" if self.error else ""
        return (
            f"the loss of a fresh batch {word}: {self.before:.6g} to "
            f"{self.after:.6g}{noise}"
        )

    def is_within_rounding(self) -> bool:
        """Whether a low format could have turned the decision."""
        return abs(self.after - self.before) <= LOW_FORMAT_ERROR


def judge(
    before: Tensor,
    after: Tensor,
    *,
    z: float,
    fmt: str,
    agreement: Agreement | None = None,
) -> Verdict:
    """Compare paired losses.

    Args:
        before: fp64 [N], losses at the weights that were left.
        after: fp64 [N], losses of the same samples at the landing point.
        z: How many standard errors the loss has to fall by.
        fmt: The format of the forwards, for the record.
        agreement: Other processes, whose samples count too. Default: none.
    """
    difference = after - before
    told = (before.sum(), after.sum(), difference.sum(), difference.square().sum())
    num, *sums = (agreement or Alone()).sums(
        [float(difference.numel()), *(float(each) for each in told)]
    )
    mean, error = sums[2] / num, 0.0
    if num > 1:
        variance = max(0.0, sums[3] - num * mean * mean) / (num - 1)
        error = math.sqrt(variance / num)
    return Verdict(
        accepted=math.isfinite(mean) and mean + z * error < 0,
        before=sums[0] / num,
        after=sums[1] / num,
        error=error if math.isfinite(error) else 0.0,
        format=fmt,
    )


def losses_of(loss: LossFunction, model: nn.Module, batches: Sequence[Any]) -> Tensor:
    """Return the losses of batches as fp64 [N] on the CPU, in eval mode."""
    with evaluation_mode(model):
        parts = [loss(model, batch).detach().reshape(-1) for batch in batches]
    return torch.cat([part.double().cpu() for part in parts])


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and each back into the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
