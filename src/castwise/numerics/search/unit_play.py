"""One unit alone: a call of it run again, forward and backward, on what it once saw."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from castwise.numerics.search.bench import Bench
from castwise.numerics.search.reference_step import Call
from castwise.numerics.search.structure import EachTensor, flat, floating_in
from castwise.region import Region


@dataclass(frozen=True, kw_only=True, slots=True)
class Formats:
    """What the floating inputs of a call are brought in."""

    known: tuple[torch.dtype, ...] = ()
    """For the first inputs, one by one."""

    otherwise: torch.dtype = torch.float32
    """For all others."""

    widened: bool = False
    """Whether they are only rounded to `known`, and then brought in `otherwise`."""

    def bring(self, place: int, tensor: torch.Tensor) -> torch.Tensor:
        """Bring one input; a complex one stays complex."""
        known = self.known[place] if place < len(self.known) else self.otherwise
        brought = tensor.to(_like(tensor, known))
        if self.widened:
            brought = brought.to(_like(tensor, self.otherwise))
        return brought


def _like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    if not tensor.is_complex() or dtype.is_complex:
        return dtype
    return torch.complex128 if dtype is torch.float64 else torch.complex64


@dataclass(frozen=True, kw_only=True, slots=True)
class Played:
    """What one call of a unit gave, everything flat and in float64."""

    outputs: tuple[torch.Tensor, ...]
    """Floating outputs."""

    inputs: tuple[torch.Tensor | None, ...]
    """Gradients of floating inputs; none where no gradient flows back."""

    weights: tuple[torch.Tensor | None, ...]
    """Gradients of the weights of the unit and of what is in it."""

    def is_finite(self) -> bool:
        """Whether it holds no infinity and no NaN."""
        tensors = (*self.outputs, *self.inputs, *self.weights)
        return all(t is None or bool(torch.isfinite(t).all()) for t in tensors)


def weights_of(module: nn.Module) -> list[nn.Parameter]:
    """The weights of a module and of what is in it that are trained."""
    return [weight for weight in module.parameters() if weight.requires_grad]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """One forward and backward of a unit, as it came out."""

    outputs: list[torch.Tensor]
    gradients: list[torch.Tensor | None]
    num_inputs: int
    scale: float
    seconds: float


def play(
    bench: Bench, region: Region, module: nn.Module, call: Call, formats: Formats
) -> Played:
    """Run one call of a module again, forward and backward.

    Args:
        bench: Where the model stands.
        region: Of the policy that is on it.
        module: The unit.
        call: What it saw.
        formats: What its floating inputs are brought in.
    """
    run = _run(bench, region, module, call, formats)
    given = [None if g is None else flat(g) / run.scale for g in run.gradients]
    backwards = zip(given, call.wants, strict=False)
    return Played(
        outputs=tuple(map(flat, run.outputs)),
        inputs=tuple(g if wanted else None for g, wanted in backwards),
        weights=tuple(given[run.num_inputs :]),
    )


def seconds_of(
    bench: Bench, region: Region, module: nn.Module, call: Call, formats: Formats
) -> float:
    """Time one call of a module, forward and backward; see `play`."""
    return _run(bench, region, module, call, formats).seconds


def _run(
    bench: Bench, region: Region, module: nn.Module, call: Call, formats: Formats
) -> _Run:
    leaves: list[torch.Tensor] = []

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        inside = formats.bring(len(leaves), tensor)
        leaves.append(inside.detach().requires_grad_())
        return leaves[-1].clone()  # a module may change its input in place

    args, kwargs = map(EachTensor(leaf).values, call.inputs)
    torch.set_rng_state(call.random_state)
    scale = bench.scale_now
    with region.entered(bench.device.type):
        begin = _now(bench.device)
        outputs = floating_in(module(*args, **kwargs))
        seconds = _now(bench.device) - begin
        pairs = [
            (output, gradient.reshape(output.shape).to(output.dtype) * scale)
            for output, gradient in zip(outputs, call.gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        with torch.autocast(bench.device.type, enabled=False):
            begin = _now(bench.device)
            gradients = _gradients(pairs, [*leaves, *weights_of(module)])
            seconds += _now(bench.device) - begin
    return _Run(
        outputs=outputs,
        gradients=list(gradients),
        num_inputs=len(leaves),
        scale=scale,
        seconds=seconds,
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _gradients(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], sources: list[torch.Tensor]
) -> Sequence[torch.Tensor | None]:
    if not pairs or not sources:
        return [None] * len(sources)
    return torch.autograd.grad(
        [output for output, _ in pairs],
        sources,
        [gradient for _, gradient in pairs],
        allow_unused=True,
    )
