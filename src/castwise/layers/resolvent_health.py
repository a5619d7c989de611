"""How exact is a resolvent mixing, where training happens?

    residual    max over tokens ||out - right|| / ||right||,  right = the layer in fp64

`right` is computed from what the layer was given and its weights as they are, so that
nothing but the layer's own arithmetic is measured: 1e-7 in fp32, some 1e-2 where bf16
rounds the potential. `layer_probe` says how a probe looks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from castwise.layers.layer_probe import LayerProbe
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


class ResolventProbe(LayerProbe[ResolventHealth]):
    """Watches every resolvent mixing of a model, every `interval` forwards of each."""

    kind = ResolventMixing
    names = ("residual",)
    health = ResolventHealth

    def measures(
        self, layer: ResolventMixing, x: Tensor, out: Tensor
    ) -> Mapping[str, Callable[[], Tensor]]:
        """Return how the residual is computed."""
        return {"residual": lambda: residual(layer, x, out)}
