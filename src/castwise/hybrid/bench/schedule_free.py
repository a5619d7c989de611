"""Schedule-free AdamW and SGD (Defazio et al. 2024, arXiv 2405.15682): a rival.

    y = (1 - beta) z + beta x              gradients are taken here
    z <- z - rate * step(gradient at y)    with Adam's second moment, or plain
    x <- (1 - c) x + c z                   c = rate^2 / sum of rate^2
    loss is told at x

It needs neither a schedule nor an average of its own. The parameters hold y; x is
worked out from y and z when it is asked for, so that z is all that is kept beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor


@final
class ScheduleFree(torch.optim.Optimizer):
    """Averages while it steps.

    Args:
        parameters: What it steps.
        lr: The rate, in `param_groups` like any other.
        beta: Weight of the average in the point of the gradients. Default: 0.9.
        second: Decay of the second moment, or None for SGD. Default: 0.99.
        num_warmup: Steps in which the rate rises. Default: 20.
    """

    def __init__(
        self,
        parameters: Any,
        *,
        lr: float,
        beta: float = 0.9,
        second: float | None = 0.99,
        num_warmup: int = 20,
    ) -> None:
        super().__init__(parameters, {"lr": lr})
        self._beta, self._second, self._num_warmup = beta, second, num_warmup
        self._num_steps, self._sum = 0, 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move z by the gradient, x towards z, and y between them."""
        del closure
        self._num_steps += 1
        for group in self.param_groups:
            rate = group["lr"] * min(1.0, self._num_steps / self._num_warmup)
            if self._second is not None:
                rate *= (1.0 - self._second**self._num_steps) ** 0.5
            self._sum += rate * rate
            share = rate * rate / self._sum
            for y in group["params"]:
                if y.grad is not None:
                    self._move(y, rate, share)

    def _move(self, y: Tensor, rate: float, share: float) -> None:
        state, beta = self.state[y], self._beta
        if "z" not in state:
            state["z"] = y.detach().clone()
            state["second"] = torch.zeros_like(y)
        z, step = state["z"], y.grad
        assert step is not None, "asked before"
        if self._second is not None:
            state["second"].lerp_(step * step, 1.0 - self._second)
            step = step / (state["second"].sqrt() + 1e-8)
        # With x = (y - (1 - beta) z) / beta, moving x by c and z by the step gives y:
        y.lerp_(z, share)
        y.add_(step, alpha=-rate * (1.0 - beta * (1.0 - share)))
        z.add_(step, alpha=-rate)

    @contextmanager
    def at_average(self) -> Iterator[None]:
        """Hold x in the parameters for the length of a with-block."""
        kept = {y: y.detach().clone() for y in self.state}
        with torch.no_grad():
            for y, state in self.state.items():
                y.copy_(torch.lerp(state["z"], y, 1.0 / self._beta))
        try:
            yield
        finally:
            with torch.no_grad():
                for y, value in kept.items():
                    y.copy_(value)
