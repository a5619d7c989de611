"""Holds the direction of the optimizer's own momentum for a while.

    Adam, AdamW     - lr * m / (sqrt(v) + eps), bias corrected, times the horizon
    SGD             - lr * (momentum buffer), times the horizon
    decoupled decay - lr * weight_decay * weight, times the horizon

It needs no memory of its own beyond two sketches, and overshoots early: the direction
of Adam is half noise after ten steps of a minibatch. For short horizons and low noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from castwise.errors import PredictionError
from castwise.hybrid.exact_weights import Deltas
from castwise.hybrid.predictors.windowed import WindowedPredictor


@final
class AdamHold(WindowedPredictor):
    """The optimizer's next step, many times over."""

    name = "adam_hold"
    bytes_per_parameter = 0.0

    def propose(self, horizon: int) -> Deltas:
        """Return the held step times the horizon.

        Raises:
            PredictionError: The optimizer keeps no momentum that we know.
        """
        return {name: step.mul_(horizon) for name, step in self._steps().items()}

    def _promise(self) -> Tensor | None:
        return self._backtest.sketch(self._steps())

    @torch.no_grad()
    def _steps(self) -> Deltas:
        """What the optimizer would do if every gradient were its momentum."""
        values, steps = self._weights.values(), {}
        names = {weight: name for name, weight in self._weights.parameters().items()}
        for group in self._weights.optimizer.param_groups:
            for weight in group["params"]:
                if weight in names:
                    state = self._weights.optimizer.state.get(weight, {})
                    name = names[weight]
                    steps[name] = _held_step(name, values[name], state, group)
        return steps

    def _keep(self, values: Mapping[str, Tensor]) -> None:
        del values

    def _kept(self) -> Any:
        return None

    def _load_kept(self, kept: Any) -> None:
        del kept


def _held_step(
    name: str, value: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]
) -> Tensor:
    """One held step of one weight, in fp32."""
    rate = float(group["lr"])
    if state.get("momentum_buffer") is not None:
        momentum: Tensor = state["momentum_buffer"]
        return momentum.to(value.dtype) * -rate
    if not {"exp_avg", "exp_avg_sq", "step"} <= state.keys():
        raise PredictionError(
            f"adam_hold needs an optimizer with momentum (Adam, AdamW, SGD), but it "
            f"keeps {', '.join(state) or 'nothing'} for {name!r}; take window_line"
        )
    if not state["exp_avg"].is_floating_point():
        raise PredictionError(
            f"adam_hold reads moments as numbers, and those of {name!r} are codes of 8 "
            "bits; take window_line, or an optimizer with fp32 states"
        )
    count, (beta_1, beta_2) = float(state["step"]), group["betas"]
    mean: Tensor = state["exp_avg"].to(value.dtype) / (1.0 - beta_1**count)
    spread = (state["exp_avg_sq"].to(value.dtype) / (1.0 - beta_2**count)).sqrt_()
    step: Tensor = mean.div_(spread.add_(group["eps"])).mul_(-rate)
    if group.get("decoupled_weight_decay", False) and group["weight_decay"]:
        step.add_(value, alpha=-rate * group["weight_decay"])
    return step
