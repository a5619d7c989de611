"""Who listens to the steps of an optimizer, and may change gradients before one.

Hooks expect one call a step, on all parameters, and what they do is not ours to know:
all but those that say of themselves that they only look.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

_Hook = TypeVar("_Hook", bound=Callable[..., Any])
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_GLOBAL_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")


def only_looks(hook: _Hook) -> _Hook:
    """Mark a hook that changes nothing, and may be called more than once a step."""
    vars(hook)["castwise_only_looks"] = True
    return hook


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Return whether anybody who may act listens to the steps of the optimizer."""
    heard = [optimizer.__dict__.get(name) or {} for name in _HOOKS]
    heard += [vars(torch_optimizer).get(name) or {} for name in _GLOBAL_HOOKS]
    return any(
        not getattr(hook, "castwise_only_looks", False)
        for hooks in heard
        for hook in hooks.values()
    )
