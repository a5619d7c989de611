"""AdamW: adaptive moments with the decay of the weight kept apart.

    m <- m + (1 - beta1) (g - m)
    v <- beta2 v + (1 - beta2) g^2
    w <- (1 - lr wd) w - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

Loshchilov and Hutter 2019 (arXiv 1711.05101), in the order of operations of torch's
own. `adamw_` is the update to read; what runs on a CPU is the same in machine code and
equal to it bit by bit. `sweep` says how, and adds unscaling, check, clip and storage.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch

from castwise.optim.roots import square_root
from castwise.optim.sweep import SweepOptimizer, SweepSettings, check_range


def adamw_(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    states: list[torch.Tensor],
    numbers: torch.Tensor,
) -> None:
    """Update weight, moment and variance in place.

    Args:
        weight: fp32 [N].
        gradient: fp32 [N], unscaled and clipped.
        states: moment and variance, fp32 [N] each.
        numbers: fp32 [8], the row of `AdamW.numbers`; the first is spent already.
    """
    moment, variance = states
    _, decay, rise_m, keep_v, rise_v, step, unbias, eps = numbers.unbind()
    moment.add_((gradient - moment) * rise_m)
    variance.mul_(keep_v).add_((gradient * gradient) * rise_v)
    update = (moment * step) / (square_root(variance) * unbias + eps)
    weight.mul_(decay).sub_(update)


@final
class AdamW(SweepOptimizer):
    """AdamW in one sweep, with states in fp32 or 8 bits.

    Args:
        params: Parameters or groups, as for any optimizer of torch.
        lr: Step size (default: 1e-3).
        betas: Decay of the moments (default: 0.9, 0.999).
        eps: Least divisor (default: 1e-8).
        weight_decay: Decay of the weights (default: 1e-2).
        maximize: Go uphill (default: False).
        settings: What the sweep does besides (default: fp32 states, check, no clip).
    """

    update = staticmethod(adamw_)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        settings: SweepSettings | None = None,
    ) -> None:
        check_range("lr", lr, 0.0, math.inf)
        check_range("betas[0]", betas[0], 0.0, 1.0)
        check_range("betas[1]", betas[1], 0.0, 1.0)
        check_range("eps", eps, 0.0, math.inf)
        check_range("weight_decay", weight_decay, 0.0, math.inf)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults, settings or SweepSettings())

    def codes(self, group: dict[str, Any]) -> dict[str, str]:
        """Return torch's names of the moments, and how 8 bits code them."""
        del group
        return {"exp_avg": "signed_quadratic", "exp_avg_sq": "quartic"}

    def numbers(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """Return decay, rises and keeps of the moments, step, unbias and eps."""
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        return (
            1 - lr * group["weight_decay"],
            1 - beta1,
            beta2,
            1 - beta2,
            lr / (1 - beta1**step),
            1 / math.sqrt(1 - beta2**step),
            group["eps"],
        )
