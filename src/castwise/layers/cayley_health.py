"""Is the propagator still unitary? Four measures, taken where training happens.

    unitarity   max |U^H U - I| of the step as this precision computes it
    residual    max over tokens ||(I + i K) out - (I - i K) rhs|| / ||rhs||
    sparsity    share of output entries below 1e-6 of the largest of their token
    norm        max over tokens | ||out||^2 / ||in||^2 - 1 |

The probe looks at what went in and came out of each layer, by a forward hook, so that
autocast, islands and product switches are in force as they are in training; a second
forward in another precision would see nothing. Numbers stay on the device until they
are read, all at once. What cannot be measured is NaN with a message, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from castwise.layers.cayley import CayleyPropagator, as_planes

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


class HealthProbe:
    """Watches every propagator of a model, every `interval` forwards of each.

    Args:
        model: a propagator or anything that holds some.
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
            if isinstance(module, CayleyPropagator)
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def read(self) -> Mapping[str, CayleyHealth]:
        """Return the latest measures by fqn: one transfer from the device for all."""
        found, self._found = self._found, {}
        if not found:
            return {}
        rows = torch.stack([values for values, _ in found.values()]).tolist()
        return {
            fqn: CayleyHealth(
                **dict(zip(MEASURES, row, strict=True)), messages=_explain(row, told)
            )
            for (fqn, (_, told)), row in zip(found.items(), rows, strict=True)
        }

    def _hook(self, fqn: str) -> Callable[..., None]:
        def measure(
            layer: CayleyPropagator, args: tuple[Any, ...], out: Tensor
        ) -> None:
            if self.paused:
                return
            call = self._calls.get(fqn, 0)
            self._calls[fqn] = call + 1
            if call % self.interval == 0:
                self._found[fqn] = _measure(layer, args[0], out)

        hook: Callable[..., None] = torch.compiler.disable(measure)  # type: ignore[no-untyped-call]
        return hook


@torch.no_grad()
def _measure(
    layer: CayleyPropagator, psi: Tensor, out: Tensor
) -> tuple[Tensor, tuple[str, ...]]:
    """Compute all measures on the device; what fails is NaN and a message."""
    measures: dict[str, Callable[[], Tensor]] = {
        "unitarity": lambda: unitarity(layer),
        "residual": lambda: layer.residual(
            layer.rotated(as_planes(psi)), as_planes(out)
        ).max(),
        "sparsity": lambda: sparsity(out),
        "norm": lambda: norm_deviation(psi, out),
    }
    values, messages = [], []
    for name, measure in measures.items():
        try:
            values.append(measure().double())
        except Exception as error:  # noqa: BLE001 -- a probe must not end the run
            values.append(torch.tensor(math.nan, device=out.device).double())
            messages.append(f"{name} cannot be computed: {error}")
    return torch.stack(values), tuple(messages)


def _explain(row: list[float], told: tuple[str, ...]) -> tuple[str, ...]:
    """Add a message for each NaN that has none."""
    silent = [
        f"{name} is NaN: the layer's input or output is not finite, or zero"
        for name, value in zip(MEASURES, row, strict=True)
        if math.isnan(value) and not any(text.startswith(name) for text in told)
    ]
    return (*told, *silent)
