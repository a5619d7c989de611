"""Lion: the sign of a blend of momentum and gradient, every weight by the same amount.

    w <- (1 - lr wd) w - lr sign(beta1 m + (1 - beta1) g)
    m <- beta2 m + (1 - beta2) g

Chen et al. 2023 (arXiv 2302.06675). `lion_` is the update to read; `sweep` says how it
is run.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch

from castwise.optim.sweep import SweepOptimizer, SweepSettings, check_range


def lion_(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    states: list[torch.Tensor],
    numbers: torch.Tensor,
) -> None:
    """Update weight and momentum in place.

    Args:
        weight: fp32 [N].
        gradient: fp32 [N], unscaled and clipped.
        states: The momentum, fp32 [N].
        numbers: fp32 [8], the row of `Lion.numbers`; the first is spent already.
    """
    (momentum,) = states
    _, decay, keep, rise, keep_m, rise_m, lr, _ = numbers.unbind()
    blend = momentum * keep + gradient * rise
    momentum.mul_(keep_m).add_(gradient * rise_m)
    weight.mul_(decay).sub_(torch.sign(blend) * lr)


@final
class Lion(SweepOptimizer):
    """Lion in one sweep, with the momentum in fp32 or 8 bits.

    Args:
        params: Parameters or groups, as for any optimizer of torch.
        lr: Step size (default: 1e-4).
        betas: What of the momentum is blended, and kept (default: 0.9, 0.99).
        weight_decay: Decay of the weights (default: 0).
        maximize: Go uphill (default: False).
        settings: What the sweep does besides (default: fp32 states, check, no clip).
    """

    update = staticmethod(lion_)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        settings: SweepSettings | None = None,
    ) -> None:
        check_range("lr", lr, 0.0, math.inf)
        check_range("betas[0]", betas[0], 0.0, 1.0)
        check_range("betas[1]", betas[1], 0.0, 1.0)
        check_range("weight_decay", weight_decay, 0.0, math.inf)
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults, settings or SweepSettings())

    def codes(self, group: dict[str, Any]) -> dict[str, str]:
        """Return the name of the momentum, and how 8 bits code it."""
        del group
        return {"exp_avg": "signed_quadratic"}

    def numbers(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """Return decay, blend, keep and rise of the momentum, and lr."""
        del step
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        decay = 1 - lr * group["weight_decay"]
        return decay, beta1, 1 - beta1, beta2, 1 - beta2, lr, 0.0
