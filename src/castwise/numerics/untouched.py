"""A model that a proof may run, and that is afterwards bit for bit what it was.

Weights and buffers go back to the memory that they stood in, which costs no copy of the
weights: a change of format makes new memory, and a forward and backward do not write to
the old. Buffers that a forward updates in place are copied. Gradients, random states
and modes come back as well.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


@contextlib.contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Give back weights, buffers, gradients and random states as they were."""
    weights = [(weight, weight.data, weight.grad) for weight in model.parameters()]
    buffers = [
        (module._buffers, dict(module._buffers))  # noqa: SLF001 -- by name, with those that are None
        for module in model.modules()
    ]
    contents = [
        (buffer, buffer.data, buffer.detach().clone()) for buffer in model.buffers()
    ]
    modes = [(module, module.training) for module in model.modules()]
    for weight, _, _ in weights:
        weight.grad = None
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(
            devices, device_type=device.type if devices else "cuda"
        ):
            yield
    finally:
        for weight, data, gradient in weights:
            weight.grad = None
            weight.data = data
            weight.grad = gradient
        for slots, originals in buffers:
            slots.clear()
            slots.update(originals)
        for buffer, data, kept in contents:
            buffer.data = data
            data.copy_(kept)
        for module, training in modes:
            module.training = training
