"""What a run refuses before it does anything, each with one sentence."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch

from castwise.errors import SettingsError, StepError

if TYPE_CHECKING:
    from torch import nn

    from castwise.optim.clipping import ByGroup, ByRow
    from castwise.optim.holding import HeldWeights


def refuse_loss(loss: object) -> None:
    """Refuse what `backward` cannot start from."""
    if not isinstance(loss, torch.Tensor):
        raise StepError(
            f"backward needs the loss as a tensor, got {type(loss).__name__}; do not "
            "call item() or float() on it before"
        )
    if loss.numel() != 1:
        raise StepError(
            f"backward needs a loss of one number, got shape {tuple(loss.shape)}; take "
            "its mean or sum"
        )
    if not loss.requires_grad:
        raise StepError(
            "the loss has no gradient; it was detached, or computed under no_grad or "
            "run.inference(), or no parameter requires a gradient"
        )


def refuse_settings(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    clip_norm: float | ByGroup | ByRow | None,
) -> None:
    """Refuse an optimizer that a run cannot step, and a clip that is none."""
    if isinstance(clip_norm, int | float) and not clip_norm > 0:
        raise SettingsError(f"clip_norm needs to be above 0; got {clip_norm}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise SettingsError(
            f"{type(optimizer).__name__} needs a closure that it calls several times "
            "in a step, which cannot be checked once at its end; use another optimizer"
        )
    ours = {id(weight) for weight in model.parameters()}
    held = [weight for group in optimizer.param_groups for weight in group["params"]]
    if ours and not any(id(weight) in ours for weight in held):
        raise SettingsError(
            "the optimizer holds none of the model's parameters; build it from "
            "model.parameters() of this very model"
        )


def refuse_stale_state(
    optimizer: torch.optim.Optimizer, held: HeldWeights | None = None
) -> None:
    """Refuse moments in another format than the weight that was just changed.

    Codes of 8 bits are no such format, and held weights are fp32 during a step.
    """
    for weight, state in optimizer.state.items():
        if held is not None and held.storage_of(weight) is not None:
            continue
        for name, value in state.items():
            if (
                isinstance(value, torch.Tensor)
                and value.is_floating_point()
                and value.shape == weight.shape
                and value.dim() > 0
                and value.dtype is not weight.dtype
            ):
                raise StepError(
                    f"the optimizer already holds {name!r} in {value.dtype} for a "
                    f"weight that the policy holds in {weight.dtype}; call prepare "
                    "before the first step, or load the optimizer's state after it"
                )
