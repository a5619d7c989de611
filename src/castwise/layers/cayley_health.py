"""Is the propagator still unitary? Four measures, taken where training happens.

    unitarity   max |U^H U - I| of the step as this precision computes it
    residual    max over tokens ||(I + i K) out - (I - i K) rhs|| / ||rhs||
    sparsity    share of output entries below 1e-6 of the largest of their token
    norm        max over tokens | ||out||^2 / ||in||^2 - 1 |

`layer_probe` says how a probe looks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from castwise.layers.cayley import CayleyPropagator, as_planes
from castwise.layers.layer_probe import LayerProbe

NEGLIGIBLE = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class CayleyHealth:
    """Measures of one layer at one step; NaN where a message says why."""

    unitarity: float
    """Largest entry of U^H U - I."""

    residual: float
    """Largest relative residual of a token."""

    sparsity: float
    """Share of negligible output entries."""

    norm: float
    """Largest relative change of a token's squared norm."""

    messages: tuple[str, ...] = ()
    """Why a measure is NaN."""


MEASURES = tuple(f.name for f in fields(CayleyHealth) if f.name != "messages")


def unitarity(layer: CayleyPropagator) -> Tensor:
    """Send the identity through the layer and see how far from unitary it is.

    A rotation turns each row of the identity by a phase and no more, so what is seen
    is the step; and by `forward`, because that is what an island is put around.
    """
    weight = layer.envelope
    eye = torch.eye(len(weight), device=weight.device)
    u = as_planes(layer.forward(eye)).double()
    # rows are images: U^H U = (re - i im)(re + i im)^T for a symmetric U
    real = u[0] @ u[0].T + u[1] @ u[1].T - eye
    imaginary = u[0] @ u[1].T - u[1] @ u[0].T
    return torch.hypot(real, imaginary).max()


def sparsity(values: Tensor) -> Tensor:
    """Return the share of entries negligible beside the largest of their row."""
    size = values.abs()
    return (size <= NEGLIGIBLE * size.amax(-1, keepdim=True)).double().mean()


def norm_deviation(before: Tensor, after: Tensor) -> Tensor:
    """Return the largest relative change of a token's squared norm."""
    old = as_planes(before).double().square().sum((0, -1))
    new = as_planes(after).double().square().sum((0, -1))
    return (new / old - 1).abs().max()


class HealthProbe(LayerProbe[CayleyHealth]):
    """Watches every propagator of a model, every `interval` forwards of each."""

    kind = CayleyPropagator
    names = MEASURES
    health = CayleyHealth

    def measures(
        self, layer: CayleyPropagator, x: Tensor, out: Tensor
    ) -> Mapping[str, Callable[[], Tensor]]:
        """Return how the four measures are computed."""
        return {
            "unitarity": lambda: unitarity(layer),
            "residual": lambda: layer.residual(
                layer.rotated(as_planes(x)), as_planes(out)
            ).max(),
            "sparsity": lambda: sparsity(out),
            "norm": lambda: norm_deviation(x, out),
        }
