"""Who listens to the steps of an optimizer, and may change gradients before one.

Hooks expect one call a step, on all parameters, and what they do is not ours to know.
"""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Return whether anybody listens to the steps of the optimizer; torch asks so."""
    own = optimizer.__dict__
    return any(
        (
            own.get("_optimizer_step_pre_hooks"),
            own.get("_optimizer_step_post_hooks"),
            vars(torch_optimizer).get("_global_optimizer_pre_hooks"),
            vars(torch_optimizer).get("_global_optimizer_post_hooks"),
        )
    )
