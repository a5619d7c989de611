"""How much of an optimizer is stepped at a time: a bite of its parameters, or all.

The fp32 form of a weight lives as long as the call of the optimizer's step that updates
it. An optimizer that treats each parameter by itself may be called several times a
step, each time with some parameters, so that few fp32 weights stand in memory together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from castwise.decision import Decision
from castwise.optim.step_hooks import has_step_hooks
from castwise.optim.sweep import SweepOptimizer

PARAMETER_WISE: frozenset[type[Optimizer]] = frozenset(
    getattr(torch.optim, name)
    for name in (
        "ASGD",
        "Adadelta",
        "Adafactor",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "Muon",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
        "SparseAdam",
    )
)
"""Optimizers whose update of one parameter depends on no other parameter."""

_BITE = 1 << 22  # elements in fp32 at a time: 16 MiB of weights, 16 MiB of gradients


def is_parameter_wise(optimizer: Optimizer) -> Decision[bool]:
    """Return whether parameters may be stepped a few at a time, and why."""
    name = type(optimizer).__name__
    apart = type(optimizer) in PARAMETER_WISE
    if isinstance(optimizer, SweepOptimizer):
        apart = optimizer.parameter_wise
    if not apart:
        return Decision(value=False, because=f"{name} may treat parameters together")
    if has_step_hooks(optimizer):
        return Decision(value=False, because="step hooks expect one call a step")
    return Decision(value=True, because=f"{name} treats each parameter by itself")


def bites(
    optimizer: Optimizer,
) -> Iterator[tuple[dict[str, Any], list[torch.nn.Parameter]]]:
    """Yield parameters with gradients: a group and some `_BITE` elements of it."""
    for group in optimizer.param_groups:
        bite: list[torch.nn.Parameter] = []
        size = 0
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            if bite and size + parameter.numel() > _BITE:
                yield group, bite
                bite, size = [], 0
            bite.append(parameter)
            size += parameter.numel()
        if bite:
            yield group, bite
