"""A loss scale in a loop that calls backward, clip and step by itself.

    loop = LoopScale(DynamicScale(), model.named_parameters)
    loop.scaled(loss).backward()           # any number of times
    loop.unscale(optimizer)                # before clipping; a second call does nothing
    if loop.end_step(optimizer) is None:
        optimizer.step()

Several optimizers may step after one backward, and each must divide by the scale that
this backward used. So the scale learns from all steps at once, when the next backward
begins; with one optimizer the numbers are those of `torch.amp.GradScaler`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from castwise.distributed.gradients import unscale
from castwise.loss_scale import LossScale, NonFinite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping


class LoopScale:
    """A loss scale, and what the steps since the last backward found.

    Args:
        loss_scale: What is driven.
        named_parameters: Asked for the names of weights that are new to it.
    """

    def __init__(
        self,
        loss_scale: LossScale,
        named_parameters: Callable[[], Iterable[tuple[str, torch.Tensor]]],
    ) -> None:
        self.loss_scale = loss_scale
        self.num_skipped = 0
        self.last_finding: NonFinite | None = None
        self.because = ""
        self._named_parameters = named_parameters
        self._names: dict[torch.Tensor, str] = {}
        self._unscaled: dict[int, NonFinite | None] = {}  # optimizers before their step
        self._steps: list[NonFinite | None] = []  # since the last backward

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss to call backward on, after learning from the last steps."""
        self.settle()
        return self.loss_scale.scaled(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide an optimizer's gradients by the scale, once before each step."""
        if id(optimizer) not in self._unscaled:
            gradients = self._gradients(optimizer)
            self._unscaled[id(optimizer)] = unscale(self.loss_scale, gradients)

    def end_step(self, optimizer: torch.optim.Optimizer) -> NonFinite | None:
        """Return why an optimizer must not step, or None where it may."""
        self.unscale(optimizer)
        finding = self._unscaled.pop(id(optimizer))
        self._steps.append(finding)
        self.last_finding = finding
        if finding is not None:
            self.num_skipped += 1
            scale = self.loss_scale.scale
            self.because = str(finding) + (
                f" at loss scale {scale:g}" if scale != 1 else ""
            )
        return finding

    def settle(self) -> None:
        """Let the scale learn from the steps since the last backward.

        Raises:
            LossScaleError: Steps were skipped and no other scale can help.
        """
        if self._steps:
            steps, self._steps = self._steps, []
            found = (finding for finding in steps if finding is not None)
            self.loss_scale.adjust(next(found, None))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a loss scale of the same kind."""
        self.loss_scale.load_state_dict(state)
        self._steps.clear()

    def _gradients(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        return {
            self._name_of(weight, f"param_groups[{at}]['params'][{place}]"): weight.grad
            for at, group in enumerate(optimizer.param_groups)
            for place, weight in enumerate(group["params"])
            if weight.grad is not None
        }

    def _name_of(self, weight: torch.Tensor, place: str) -> str:
        if weight not in self._names:
            self._names = {each: name for name, each in self._named_parameters()}
            self._names.setdefault(weight, place)
        return self._names[weight]
