"""How exact is a resolvent mixing, where training happens?

    residual    max over tokens ||out - right|| / ||right||,  right = the layer in fp64

`right` is computed from what the layer was given and its weights as they are, so that
nothing but the layer's own arithmetic is measured: 1e-7 in fp32, some 1e-2 where bf16
rounds the potential. The probe is a forward hook: autocast and islands are in force as
they are in training. What cannot be measured is NaN with a message, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from castwise.layers.resolvent_mixing import ResolventMixing


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolventHealth:
    """The measure of one layer at one step."""

    residual: float
    """Largest relative error of a token; NaN where a message says why."""

    messages: tuple[str, ...] = ()
    """Why it is NaN."""


@torch.no_grad()
def residual(layer: ResolventMixing, x: Tensor, out: Tensor) -> Tensor:
    """Compare an output of a layer with the layer in fp64."""
    right = layer.in_fp64(x)
    error = torch.linalg.vector_norm(out.double() - right, dim=-1)
    size = torch.linalg.vector_norm(right, dim=-1)
    worst: Tensor = (error / size).max()
    return worst


class ResolventProbe:
    """Watches every resolvent mixing of a model, every `interval` forwards of each.

    Args:
        model: a mixing or anything that holds some.
        interval: forwards between two measurements.
    """

    def __init__(self, model: nn.Module, *, interval: int = 1) -> None:
        self.interval = interval
        self.paused = False
        """Whether forwards pass unmeasured and uncounted."""
        self._calls: dict[str, int] = {}
        self._found: dict[str, tuple[Tensor, tuple[str, ...]]] = {}
        self._handles = [
            module.register_forward_hook(self._hook(fqn))
            for fqn, module in model.named_modules()
            if isinstance(module, ResolventMixing)
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def read(self) -> Mapping[str, ResolventHealth]:
        """Return the latest measures by fqn: one transfer from the device for all."""
        found, self._found = self._found, {}
        if not found:
            return {}
        values = torch.stack([value for value, _ in found.values()]).tolist()
        return {
            fqn: ResolventHealth(residual=value, messages=_explain(value, told))
            for (fqn, (_, told)), value in zip(found.items(), values, strict=True)
        }

    def _hook(self, fqn: str) -> Callable[..., None]:
        def measure(layer: ResolventMixing, args: tuple[Any, ...], out: Tensor) -> None:
            if self.paused:
                return
            call = self._calls.get(fqn, 0)
            self._calls[fqn] = call + 1
            if call % self.interval == 0:
                self._found[fqn] = _measure(layer, args[0], out)

        hook: Callable[..., None] = torch.compiler.disable(measure)  # type: ignore[no-untyped-call]
        return hook


def _measure(
    layer: ResolventMixing, x: Tensor, out: Tensor
) -> tuple[Tensor, tuple[str, ...]]:
    try:
        return residual(layer, x.detach(), out.detach()), ()
    except Exception as error:  # noqa: BLE001 -- a probe must not end the run
        missing = torch.tensor(math.nan, device=out.device, dtype=torch.float64)
        return missing, (f"residual cannot be computed: {error}",)


def _explain(value: float, told: tuple[str, ...]) -> tuple[str, ...]:
    if not math.isnan(value) or told:
        return told
    return ("residual is NaN: the layer's input or output is not finite, or zero",)
