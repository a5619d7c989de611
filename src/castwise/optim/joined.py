"""The parameters of one optimizer that are held, and their fp32 form during a step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from castwise.errors import WeightStorageError
from castwise.optim.storage import Extras, WeightStorage


@dataclass(slots=True)
class HeldParameter:
    """One parameter: the 16-bit weight that the model sees and what stands beside."""

    parameter: torch.nn.Parameter
    weight: torch.Tensor
    extras: Extras
    version: int = -1
    """Of the parameter when we last wrote it; any other tells a foreign write."""

    partner: int | None = None
    """Fingerprint of the weight that loaded extras belong to; None: none loaded."""

    def fingerprint(self) -> int:
        """Return a number that two weights share only if they are very likely equal."""
        bits = self.weight.view(torch.int16).flatten()
        odd = bits[1::2].sum(dtype=torch.int64)
        return int(bits.sum(dtype=torch.int64) * 1_000_003 + odd)

    def written_by_others(self) -> bool:
        """Return whether somebody else wrote the parameter since we did."""
        version: int = self.parameter._version  # noqa: SLF001 -- no public name
        return version != self.version

    def remember_version(self) -> None:
        """Take the parameter as it is for our own work."""
        self.version = self.parameter._version  # noqa: SLF001 -- no public name


class Joined:
    """The parameters that are fp32 at the moment, and what they were before."""

    def __init__(self, storage: WeightStorage, held: list[HeldParameter]) -> None:
        self._storage = storage
        self._held = held
        self._gradients: list[torch.Tensor | None] = []

    def join(self) -> None:
        """Show the optimizer exact weights and gradients in fp32."""
        self._gradients = [held.parameter.grad for held in self._held]
        for held, gradient in zip(self._held, self._gradients, strict=True):
            held.parameter.grad = None
            held.parameter.data = self._storage.join(held.weight, held.extras)
            if gradient is not None:
                held.parameter.grad = gradient.float()

    def part(self) -> None:
        """Show the model its 16-bit weights and gradients again."""
        for held, gradient in zip(self._held, self._gradients, strict=True):
            parameter = held.parameter
            full = parameter.data
            parameter.grad = None
            parameter.data = held.weight
            parameter.grad = gradient
            self._storage.part(full, held.weight, held.extras)

    def closure(self, evaluate: Callable[[], Any]) -> Callable[[], Any]:
        """Return a closure that evaluates on the 16-bit weights."""

        @functools.wraps(evaluate)
        def on_16_bits() -> Any:
            self.part()
            try:
                with torch.enable_grad():
                    return evaluate()
            finally:
                self.join()

        return on_16_bits


def check_parameters(
    parameters: list[torch.nn.Parameter], start: int, storage: WeightStorage
) -> None:
    """Refuse parameters that have no 16-bit form or share memory."""
    seen: dict[tuple[int, int], int] = {}
    for place, parameter in enumerate(parameters, start):
        where = f"parameter {place} of the optimizer, {list(parameter.shape)}"
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise WeightStorageError(
                f"storage {storage.name} needs parameters in fp32 or 16 bits; got "
                f"{parameter.dtype} in {where}; name it in keep="
            )
        if parameter.layout != torch.strided or hasattr(parameter, "device_mesh"):
            raise WeightStorageError(
                f"storage {storage.name} needs whole, dense parameters; got "
                f"{type(parameter.data).__name__} of layout {parameter.layout} in "
                f"{where}; FSDP2 holds fp32 shards itself"
            )
        address = parameter.data_ptr(), parameter.numel()
        if parameter.numel() and seen.setdefault(address, place) != place:
            raise WeightStorageError(
                f"need parameters that share no memory; got {where} on top of "
                f"parameter {seen[address]}; make them one Parameter"
            )


def raise_states(state: dict[str, Any] | None, shape: torch.Size) -> None:
    """Raise states that were made for a 16-bit weight to fp32, in place."""
    for name, value in (state or {}).items():
        small = isinstance(value, torch.Tensor) and value.element_size() == 2
        if small and value.shape == shape and value.is_floating_point():
            assert state is not None
            state[name] = value.float()
