"""One run of a model, module by module: outputs, and the gradients that reach them.

A run is one forward and one backward on one batch with one seed. What is kept of it is
a copy, because operators may write to the outputs of modules. A recompute runs modules
again; those calls do not count.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from castwise.numerics.error import (
    Measures,
    measure,
    relative_error,
    share_nonfinite,
    tensors_of,
    worst_of,
)
from castwise.numerics.operator_call import stage_now
from castwise.numerics.replay import Outcome, as_leaves
from castwise.numerics.target import Batch, LossFn, checked_loss

NEGLIGIBLE = 1e-6
"""A gradient this small beside that of the whole model is measured against the latter.

The exact gradient of some weights is zero (the bias of attention keys, a bias that a
batch norm takes away again); relative to nothing every rounding error is infinite.
"""

Values = tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleRun:
    """What modules gave in one run, by fqn and number of the call."""

    outcome: Outcome
    """What came out of the whole."""

    outputs: dict[tuple[str, int], Values] = field(default_factory=dict)
    """What each call returned."""

    output_gradients: dict[tuple[str, int], dict[int, torch.Tensor]] = field(
        default_factory=dict
    )
    """The gradients that reached what each call returned, by place among it."""


def run_model(
    model: Callable[..., Any],
    batch: Batch,
    loss_fn: LossFn | None,
    *,
    region: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
    scale: float = 1.0,
) -> ModuleRun:
    """Run forward and backward once, and keep what modules gave.

    Args:
        model: A module, or any callable with the inputs of one.
        batch: The inputs and, last, the target.
        loss_fn: From output and target to a scalar. None: the batch is all inputs, and
            there is no backward.
        region: What the forward runs in. Default: nothing.
        scale: The loss scale; gradients are returned without it.

    Raises:
        TargetError: The loss is no scalar, or depends on nothing.
    """
    given = tuple(batch) if loss_fn is None else tuple(batch[:-1])
    inputs, leaves = as_leaves(given)
    module = model if isinstance(model, nn.Module) else None
    enter = region or contextlib.nullcontext
    with _watched(module) as (outputs, output_gradients):
        if loss_fn is None:
            with enter(), torch.no_grad():
                output = model(*inputs)
            return ModuleRun(
                outcome=Outcome(output=_copied(output), loss=math.nan), outputs=outputs
            )
        with enter():
            output = model(*inputs)
            loss = checked_loss(loss_fn(output, batch[-1]), what="a replay")
        with torch.autocast(loss.device.type, enabled=False):
            wide = loss.float() if loss.dtype.itemsize < 4 else loss
            wide.backward(torch.full_like(wide, scale))  # type: ignore[no-untyped-call]
    named = dict(module.named_parameters()) if module is not None else {}
    gradients = {n: w.grad for n, w in named.items() if w.grad is not None}
    for weight in named.values():
        weight.grad = None
    return ModuleRun(
        outcome=Outcome(
            output=_copied(output),
            loss=float(loss.detach()),
            gradients={name: _unscaled(g, scale) for name, g in gradients.items()},
            input_gradients=tuple(
                _unscaled(leaf.grad, scale) for leaf in leaves if leaf.grad is not None
            ),
        ),
        outputs=outputs,
        output_gradients={
            key: {at: _unscaled(gradient, scale) for at, gradient in found.items()}
            for key, found in output_gradients.items()
        },
    )


def run_scaled(
    run: Callable[[float], ModuleRun], scale: float
) -> tuple[ModuleRun, float]:
    """Run with a loss scale, halved as a training loop would until gradients fit.

    Returns:
        The run and the scale that it was made with.
    """
    while True:
        found = run(scale)
        gradients = found.outcome.gradients, found.outcome.input_gradients
        if scale <= 1 or not share_nonfinite(gradients):
            return found, scale
        scale /= 2


@contextlib.contextmanager
def _watched(
    model: nn.Module | None,
) -> Iterator[tuple[dict[Any, Values], dict[Any, dict[int, torch.Tensor]]]]:
    """Collect what modules return and the gradients that reach it."""
    outputs: dict[Any, Values] = {}
    output_gradients: dict[Any, dict[int, torch.Tensor]] = defaultdict(dict)
    calls: dict[str, int] = defaultdict(int)

    def hook(fqn: str) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            if stage_now() != "forward":
                return
            key = fqn, calls[fqn]
            calls[fqn] += 1
            found = [each for _, each in tensors_of(output)]
            outputs[key] = tuple(each.detach().clone() for each in found)
            for at, each in enumerate(found):
                if each.requires_grad:
                    each.register_hook(  # type: ignore[no-untyped-call]
                        lambda g, at=at: output_gradients[key].__setitem__(
                            at, g.detach()
                        )
                    )

        return keep

    modules = [] if model is None else list(model.named_modules())
    hooks = [module.register_forward_hook(hook(fqn)) for fqn, module in modules]
    try:
        yield outputs, output_gradients
    finally:
        for each in hooks:
            each.remove()


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleMeasures:
    """How far one module was off, in one or several runs."""

    output: Measures | None
    """Of what it returned; none if that held no floating tensor."""

    output_gradient: Measures | None
    """Of the gradient that reached what it returned."""

    weight_gradient: float | None
    """Relative error of the gradient of its own weights; none if it has none."""

    def worst(self, other: ModuleMeasures) -> ModuleMeasures:
        """The worse of two."""
        gradients = (self.weight_gradient, other.weight_gradient)
        return ModuleMeasures(
            output=worst_of(m for m in (self.output, other.output) if m is not None),
            output_gradient=worst_of(
                m
                for m in (self.output_gradient, other.output_gradient)
                if m is not None
            ),
            weight_gradient=max((g for g in gradients if g is not None), default=None),
        )


def measure_modules(
    candidate: ModuleRun, reference: ModuleRun, modules: Sequence[str], fmt: str
) -> dict[str, ModuleMeasures]:
    """Measure each module of a candidate that the reference has as well.

    Args:
        candidate: A run of the candidate.
        reference: The run of the reference on the same batch and draws.
        modules: The fqns to measure.
        fmt: The format whose units are counted.
    """
    total = _norm_of(reference.outcome.gradients)
    found: dict[str, ModuleMeasures] = {}
    for fqn in modules:
        keys = [key for key in reference.outputs if key[0] == fqn]
        pairs = [(candidate.outputs.get(k), reference.outputs[k]) for k in keys]
        output_gradients = [
            _paired(
                candidate.output_gradients.get(k), reference.output_gradients.get(k)
            )
            for k in keys
        ]
        found[fqn] = ModuleMeasures(
            output=worst_of(measure(*pair, fmt) for pair in pairs if _fit(*pair)),
            output_gradient=worst_of(
                measure(*pair, fmt) for pair in output_gradients if _fit(*pair)
            ),
            weight_gradient=_own_gradient(
                fqn, candidate.outcome, reference.outcome, total
            ),
        )
    return found


def gradient_error(
    candidate: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], total: float
) -> float:
    """Relative error of some gradients, of which negligible ones count by the total."""
    names = reference.keys() & candidate.keys()
    got, wanted = (
        {n: side[n] for n in sorted(names)} for side in (candidate, reference)
    )
    norm = _norm_of(wanted)
    error = relative_error(got, wanted)
    if norm >= NEGLIGIBLE * total or not total:
        return error
    return _norm_of({n: got[n] - wanted[n] for n in wanted}) / (NEGLIGIBLE * total)


def _own_gradient(
    fqn: str, candidate: Outcome, reference: Outcome, total: float
) -> float | None:
    """The error of the weights that a module itself owns."""
    prefix = f"{fqn}." if fqn else ""
    own = {
        name: gradient
        for name, gradient in reference.gradients.items()
        if name.startswith(prefix) and "." not in name.removeprefix(prefix)
    }
    if not own:
        return None
    missing = [name for name in own if name not in candidate.gradients]
    if missing:
        return math.inf
    return gradient_error(dict(candidate.gradients), own, total)


def _norm_of(gradients: Any) -> float:
    """The global norm, in float64."""
    wide = (each.to(_wide_dtype(each)) for _, each in tensors_of(dict(gradients)))
    return math.hypot(*(float(torch.linalg.vector_norm(each)) for each in wide))


def _wide_dtype(values: torch.Tensor) -> torch.dtype:
    return torch.complex128 if values.is_complex() else torch.float64


def _paired(
    candidate: dict[int, torch.Tensor] | None, reference: dict[int, torch.Tensor] | None
) -> tuple[Values | None, Values]:
    """Gradients at the places that both have."""
    if not candidate or not reference:
        return None, ()
    places = sorted(candidate.keys() & reference.keys())
    return tuple(candidate[p] for p in places), tuple(reference[p] for p in places)


def _fit(candidate: Values | None, reference: Values) -> bool:
    return (
        candidate is not None
        and bool(reference)
        and [each.shape for each in candidate] == [each.shape for each in reference]
    )


def _unscaled(gradient: torch.Tensor, scale: float) -> torch.Tensor:
    """Divide by the loss scale where nothing is lost: in fp32 or wider."""
    gradient = gradient.detach()
    if scale == 1:
        return gradient
    if gradient.is_complex():
        return gradient / scale
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.to(wide) / scale


def _copied(output: Any) -> Any:
    """A copy of the floating tensors of an output, as a flat tuple with paths."""
    return {path: each.detach().clone() for path, each in tensors_of(output)}
