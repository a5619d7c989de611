"""A probe: how far the output of each low module is from the same in fp32.

One forward runs without gradients. Each module that computes low computes once more,
from the inputs that it was given, with autocast off and everything in fp32; a module
that was promoted computes once more in the low format of its surroundings. The error is
the distance of the two outputs over the norm of the higher one, so it is the module's
own, and what it inherited does not count.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from castwise.autocast import autocast
from castwise.dtypes import DTYPES
from castwise.islands.crossing import cast_tensor
from castwise.islands.swap import own_class
from castwise.numerics.operator_call import floating
from castwise.training.step import Run

_LOW = {DTYPES["bf16"], DTYPES["fp16"]}


def measure_modules(
    run: Run, compute: Callable[[], object], promoted: frozenset[str]
) -> dict[str, float]:
    """Return the relative error of each module in low precision.

    Args:
        run: The model under its policy.
        compute: Runs a forward of the model.
        promoted: Modules that run high and are asked how they would do low.
    """
    found: dict[str, float] = {}
    busy = [False]
    hooks = []
    for fqn, module in _candidates(run, promoted):
        probe = _Probe(run, fqn, fqn in promoted, found, busy)
        hooks += [
            module.register_forward_pre_hook(probe.before, with_kwargs=True),
            module.register_forward_hook(probe.after, with_kwargs=True),
        ]
    try:
        with torch.no_grad(), run.region():
            compute()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _candidates(run: Run, promoted: frozenset[str]) -> Iterator[tuple[str, nn.Module]]:
    """Modules without children that compute low, and those that were promoted."""
    bound, phase = run.applied.bound, run.phase
    for fqn, module in run.model.named_modules():
        is_leaf = not any(True for _ in module.children())
        if fqn in promoted:
            yield fqn, module
        elif is_leaf and fqn and not isinstance(module, nn.modules.dropout._DropoutNd):  # noqa: SLF001 -- what all dropouts have in common
            place = f".{fqn}".partition(".parametrizations")[0].removeprefix(".")
            if bound.precision_of(place, phase=phase).compute in {"bf16", "fp16"}:
                yield fqn, module


class _Probe:
    """Looks at one module."""

    def __init__(
        self,
        run: Run,
        fqn: str,
        is_promoted: bool,
        found: dict[str, float],
        busy: list[bool],
    ) -> None:
        self._run, self._fqn, self._is_promoted = run, fqn, is_promoted
        self._found, self._busy = found, busy
        self._random: list[torch.Tensor] = []

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Remember the random state that the module begins with."""
        del module, args, kwargs
        self._random = self._states()

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Compute the output in the other precision, and compare."""
        if self._busy[0]:
            return
        self._busy[0] = True
        left = self._states()
        self._put(self._random)
        try:
            other = self._other(module, args, kwargs)
        finally:
            self._put(left)
            self._busy[0] = False
        low, high = (other, output) if self._is_promoted else (output, other)
        error = _distance(low, high)
        self._found[self._fqn] = max(error, self._found.get(self._fqn, 0.0))

    def _states(self) -> list[torch.Tensor]:
        device = self._run.device
        on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return [torch.get_rng_state(), *on_device]

    def _put(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state, self._run.device)

    def _other(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        cls: Any = own_class(module)
        forward = cls.forward
        if self._is_promoted:
            run = self._run
            low = run.applied.low_format() or "bf16"
            table = run.applied.bound.policy.operator_table(run.phase)
            with autocast(run.device.type, low, table):
                dtype = DTYPES[low]
                return forward(module, *_cast(args, dtype), **_cast(kwargs, dtype))
        with (
            torch.autocast(self._run.device.type, enabled=False),
            _held_in_fp32(module),
        ):
            wide = torch.float32
            return forward(module, *_cast(args, wide), **_cast(kwargs, wide))


@contextlib.contextmanager
def _held_in_fp32(module: nn.Module) -> Iterator[None]:
    """Hold the weights of a module in fp32 for one forward."""
    before = [(w, w.data) for w in module.parameters() if w.dtype in _LOW]
    try:
        for weight, data in before:
            weight.data = data.float()
        yield
    finally:
        for weight, data in before:
            weight.data = data


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast the floating tensors among arguments."""
    if isinstance(value, torch.Tensor):
        return cast_tensor(value, dtype)
    if isinstance(value, tuple | list):
        return type(value)(_cast(each, dtype) for each in value)
    if isinstance(value, dict):
        return {key: _cast(each, dtype) for key, each in value.items()}
    return value


def _distance(low: Any, high: Any) -> float:
    """Relative distance of all outputs together; infinite where only low overflows."""
    off = norm = 0.0
    for a, b in zip(floating(low), floating(high), strict=True):
        wide = b.double() if not b.is_complex() else b.to(torch.complex128)
        off += float((a.to(wide.dtype) - wide).abs().square().sum())
        norm += float(wide.abs().square().sum())
    if not math.isfinite(norm):
        return 0.0  # no precision is to blame
    if not math.isfinite(off):
        return math.inf
    return math.sqrt(off / norm) if norm else 0.0
