"""SGD: the gradient, or a running sum of gradients, times the learning rate.

    g <- g + wd w
    m <- mu m + (1 - dampening) g            m = g at the first step
    w <- w - lr m                            or g + mu m with Nesterov's look ahead

In the order of operations of torch's own. `sgd_` is the update to read; `sweep` says
how it is run.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch

from castwise.errors import SettingsError
from castwise.optim.sweep import SweepOptimizer, SweepSettings, check_range


def sgd_(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    states: list[torch.Tensor],
    numbers: torch.Tensor,
) -> None:
    """Update weight and momentum in place.

    Args:
        weight: fp32 [N].
        gradient: fp32 [N], unscaled and clipped.
        states: The momentum, fp32 [N]; none without momentum.
        numbers: fp32 [8], the row of `SGD.numbers`; the first is spent already.
    """
    _, decay, keep, rise, lr, look, reach, _ = numbers.unbind()
    direction = gradient + weight * decay
    if states:
        (momentum,) = states
        momentum.mul_(keep).add_(direction * rise)
        direction = direction * look + momentum * reach
    weight.sub_(direction * lr)


@final
class SGD(SweepOptimizer):
    """SGD in one sweep, with the momentum in fp32 or 8 bits.

    Args:
        params: Parameters or groups, as for any optimizer of torch.
        lr: Step size (default: 1e-3).
        momentum: What is kept of former gradients (default: 0).
        dampening: What the momentum does not take of a gradient (default: 0).
        weight_decay: Added to the gradient, times the weight (default: 0).
        nesterov: Look ahead (default: False).
        maximize: Go uphill (default: False).
        settings: What the sweep does besides (default: fp32 states, check, no clip).
    """

    update = staticmethod(sgd_)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
        maximize: bool = False,
        settings: SweepSettings | None = None,
    ) -> None:
        check_range("lr", lr, 0.0, math.inf)
        check_range("momentum", momentum, 0.0, math.inf)
        check_range("weight_decay", weight_decay, 0.0, math.inf)
        if nesterov and (momentum == 0 or dampening != 0):
            raise SettingsError(
                "nesterov needs momentum above 0 and no dampening; got "
                f"momentum={momentum}, dampening={dampening}"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults, settings or SweepSettings())

    def codes(self, group: dict[str, Any]) -> dict[str, str]:
        """Return torch's name of the momentum, and how 8 bits code it."""
        return {"momentum_buffer": "signed_quadratic"} if group["momentum"] else {}

    def numbers(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """Return decay, keep and rise of the momentum, lr, look and reach."""
        momentum = group["momentum"]
        taken = 1.0 if step == 1 else 1 - group["dampening"]
        if not momentum:
            taken = 0.0
        look = 1.0 if group["nesterov"] or not momentum else 0.0
        reach = momentum if group["nesterov"] else float(momentum != 0)
        lr = float(group["lr"])
        return group["weight_decay"], momentum, taken, lr, look, reach, 0.0
