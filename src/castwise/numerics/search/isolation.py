"""Replays: each unit alone, in one format, on what it saw in the reference step.

What rounding inside of a unit does, forward and backward, are three differences from
the reference replay:

    delta   of its outputs
    eps     of the gradients of its inputs
    omega   of the gradients of its weights

Modules inside of the unit run in the reference format meanwhile, so that each operator
is blamed on one unit. All units of one depth contain none of each other, so one policy
serves to replay them.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from castwise.dtypes import dtype_of
from castwise.numerics.search.bench import Bench
from castwise.numerics.search.candidates import Candidate
from castwise.numerics.search.reference_step import Call
from castwise.numerics.search.structure import EachTensor, flat, floating_in
from castwise.numerics.search.units import Unit
from castwise.policy.keys import REGEX_MARK
from castwise.policy.precision import Precision
from castwise.policy.rules import Policy
from castwise.region import Region


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """What one candidate changes in one unit, call by call."""

    deltas: tuple[tuple[torch.Tensor, ...], ...]
    """Of outputs, for each call."""

    epsilons: tuple[tuple[torch.Tensor | None, ...], ...]
    """Of the gradients of inputs, for each call."""

    omegas: tuple[torch.Tensor | None, ...]
    """Of the gradients of weights, over all calls."""


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
    bench: Bench, region: Region, module: nn.Module, call: Call, dtype: torch.dtype
) -> Played:
    """Run one call of a module again, forward and backward.

    Args:
        bench: Where the model stands.
        region: Of the policy that is on it.
        module: The unit.
        call: What it saw.
        dtype: What floating inputs are brought in.
    """
    run = _run(bench, region, module, call, dtype)
    given = [None if g is None else flat(g) / run.scale for g in run.gradients]
    backwards = zip(given, call.wants, strict=False)
    return Played(
        outputs=tuple(map(flat, run.outputs)),
        inputs=tuple(g if wanted else None for g, wanted in backwards),
        weights=tuple(given[run.num_inputs :]),
    )


def seconds_of(
    bench: Bench, region: Region, module: nn.Module, call: Call, dtype: torch.dtype
) -> float:
    """Time one call of a module, forward and backward; see `play`."""
    return _run(bench, region, module, call, dtype).seconds


def _run(
    bench: Bench, region: Region, module: nn.Module, call: Call, dtype: torch.dtype
) -> _Run:
    leaves: list[torch.Tensor] = []

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        wide = tensor.is_complex()
        inside = tensor.to(_complex(dtype) if wide else dtype)
        leaves.append(inside.detach().requires_grad_())
        return leaves[-1].clone()  # a module may change its input in place

    args, kwargs = map(EachTensor(leaf).values, call.inputs)
    torch.set_rng_state(call.random_state)
    scale = 1.0 if region.low is None else bench.loss_scale
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


def play_all(
    bench: Bench,
    units: Sequence[Unit],
    calls: dict[str, list[Call]],
    candidate: Candidate | None,
    default: Candidate,
) -> Iterator[tuple[Unit, list[Played]]]:
    """Replay every unit alone, in one candidate or, with None, in the reference.

    Args:
        bench: Where the model stands.
        units: What to replay.
        calls: What each saw.
        candidate: What it runs in.
        default: What the policy's default will be.
    """
    bench.num_steps += 1
    for depth in sorted({unit.depth for unit in units}):
        level = [unit for unit in units if unit.depth == depth]
        policy = isolating_policy(bench, level, candidate, default)
        dtype = _brought_in(bench, candidate)
        with bench.under(policy) as region:
            for unit in level:
                module = bench.model.get_submodule(unit.fqn)
                yield (
                    unit,
                    [play(bench, region, module, c, dtype) for c in calls[unit.fqn]],
                )


def isolating_policy(
    bench: Bench,
    level: Sequence[Unit],
    candidate: Candidate | None,
    default: Candidate,
    inside: Precision | None = None,
) -> Policy:
    """The policy under which units of one depth are replayed.

    Args:
        bench: Where the model stands.
        level: The units.
        candidate: What they run in; None stands for the reference.
        default: What the policy's default will be.
        inside: What the modules in them run in (default: the reference).
    """
    if candidate is None:
        return bench.reference
    inside = inside or Precision(
        param="fp32",
        compute=bench.reference.default.compute,
        output="fp64" if candidate.compute == "fp64" else "fp32",
        reduce="fp32",
    )
    policy = Policy(name="replay", default=default.precision)
    children = [
        name
        for unit in level
        for fqn in unit.names
        for name in _inside(bench.model, fqn)
    ]
    names = [fqn for unit in level for fqn in unit.names]
    if children:
        policy = policy.with_rule(module=any_of(children), precision=inside)
    if candidate.precision != default.precision:
        policy = policy.with_rule(module=any_of(names), precision=candidate.precision)
    return policy


def any_of(names: Sequence[str]) -> str:
    """A module key that names exactly these modules."""
    return f"{REGEX_MARK}({'|'.join(map(re.escape, names))})"


def rounding_between(low: Sequence[Played], wide: Sequence[Played]) -> Rounding | None:
    """What a candidate changed; None where it is not finite."""
    if not all(played.is_finite() for played in low):
        return None
    pairs = list(zip(low, wide, strict=True))
    omegas: list[torch.Tensor | None] = [None] * len(low[0].weights)
    for one, other in pairs:
        for at, change in enumerate(map(_change, one.weights, other.weights)):
            before = omegas[at]
            omegas[at] = change if before is None or change is None else before + change
            omegas[at] = before if change is None else omegas[at]
    return Rounding(
        deltas=tuple(
            tuple(a - b for a, b in zip(one.outputs, other.outputs, strict=True))
            for one, other in pairs
        ),
        epsilons=tuple(
            tuple(map(_change, one.inputs, other.inputs)) for one, other in pairs
        ),
        omegas=tuple(omegas),
    )


def _change(
    one: torch.Tensor | None, other: torch.Tensor | None
) -> torch.Tensor | None:
    return None if one is None or other is None else one - other


def loss_scale_for(calls: dict[str, list[Call]]) -> float:
    """The loss scale that brings the largest gradient near 2^12, as fp16 wants it."""
    largest = max(
        (
            float(gradient.abs().max())
            for each in calls.values()
            for call in each
            for gradient in call.gradients
            if gradient is not None and gradient.numel()
        ),
        default=0.0,
    )
    if not math.isfinite(largest) or largest == 0:
        return 1.0
    return 2.0 ** min(24, max(0, 12 - math.frexp(largest)[1]))


def _inside(model: nn.Module, fqn: str) -> list[str]:
    """Names that together cover every module in one, wherever else it stands."""
    module = model.get_submodule(fqn)
    children = [f"{fqn}.{name}" if fqn else name for name, _ in module.named_children()]
    below = {id(each) for each in module.modules()} - {id(module)}
    elsewhere = [
        name
        for name, each in model.named_modules(remove_duplicate=False)
        if id(each) in below and name.rpartition(".")[0] != fqn
    ]
    prefix = f"{fqn}." if fqn else ""
    return children + [name for name in elsewhere if not name.startswith(prefix)]


def _brought_in(bench: Bench, candidate: Candidate | None) -> torch.dtype:
    wide = bench.reference.default.compute
    if candidate is None or candidate.compute == "fp64":
        return dtype_of(wide or "fp64")
    return torch.float32


def _complex(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype is torch.float64 else torch.complex64
