"""A probe looks at what went in and came out of layers, where training happens.

It is a forward hook, so that autocast, islands and product switches are in force as
they are in training; a second forward in another precision would see nothing. Numbers
stay on the device until they are read, all at once. What cannot be measured is NaN with
a message, never 0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

Health = TypeVar("Health")


class LayerProbe(ABC, Generic[Health]):
    """Watches every layer of one kind in a model, every `interval` forwards of each.

    Args:
        model: such a layer or anything that holds some.
        interval: forwards between two measurements.
    """

    kind: ClassVar[type[nn.Module]]
    """The layers to watch."""

    names: ClassVar[tuple[str, ...]]
    """The measures, in the order of fields of their health."""

    health: Callable[..., Health]
    """What is told of a layer: a field for each measure, and `messages`."""

    def __init__(self, model: nn.Module, *, interval: int = 1) -> None:
        self.interval = interval
        self.paused = False
        """Whether forwards pass unmeasured and uncounted."""
        self._calls: dict[str, int] = {}
        self._found: dict[str, tuple[Tensor, tuple[str, ...]]] = {}
        self._handles = [
            module.register_forward_hook(self._hook(fqn))
            for fqn, module in model.named_modules()
            if isinstance(module, self.kind)
        ]

    @abstractmethod
    def measures(
        self, layer: Any, x: Tensor, out: Tensor
    ) -> Mapping[str, Callable[[], Tensor]]:
        """Return by name how each measure is computed, a number on the device."""

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def read(self) -> Mapping[str, Health]:
        """Return the latest measures by fqn: one transfer from the device for all."""
        found, self._found = self._found, {}
        if not found:
            return {}
        rows = torch.stack([values for values, _ in found.values()]).tolist()
        return {
            fqn: self.health(
                **dict(zip(self.names, row, strict=True)),
                messages=self._explained(row, told),
            )
            for (fqn, (_, told)), row in zip(found.items(), rows, strict=True)
        }

    def _hook(self, fqn: str) -> Callable[..., None]:
        def measure(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            if self.paused:
                return
            call = self._calls.get(fqn, 0)
            self._calls[fqn] = call + 1
            if call % self.interval == 0:
                self._found[fqn] = self._measured(layer, args[0], out)

        hook: Callable[..., None] = torch.compiler.disable(measure)  # type: ignore[no-untyped-call]
        return hook

    @torch.no_grad()
    def _measured(
        self, layer: nn.Module, x: Tensor, out: Tensor
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Compute all measures on the device; what fails is NaN and a message."""
        values, messages = [], []
        for name, measure in self.measures(layer, x, out).items():
            try:
                values.append(measure().double())
            except Exception as error:  # noqa: BLE001 -- a probe must not end the run
                values.append(torch.tensor(math.nan, device=out.device).double())
                messages.append(f"{name} cannot be computed: {error}")
        return torch.stack(values), tuple(messages)

    def _explained(self, row: list[float], told: tuple[str, ...]) -> tuple[str, ...]:
        """Add a message for each NaN that has none."""
        silent = [
            f"{name} is NaN: the layer's input or output is not finite, or zero"
            for name, value in zip(self.names, row, strict=True)
            if math.isnan(value) and not any(text.startswith(name) for text in told)
        ]
        return (*told, *silent)
