"""The parameters of one optimizer that are held, and their fp32 form during a step.

A plain parameter is fp32 itself for that long: its data are exchanged. A sharded one
cannot change its format once FSDP2 works with it, and one of DDP would lose the hook
that sends its gradient. So a stand-in in fp32 takes its place among the optimizer's
parameters, and its states go with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from castwise.errors import WeightStorageError
from castwise.optim.shards import local, sharded_like
from castwise.optim.storage import Extras, WeightStorage

_UNKNOWN = -(2**63)  # a fingerprint that no weight has


@dataclass(slots=True)
class HeldParameter:
    """One parameter: the 16-bit weight that the model sees and what stands beside."""

    parameter: torch.nn.Parameter
    storage: WeightStorage
    own: torch.Tensor | None
    """The 16-bit weight; None: the local part of a sharded parameter."""

    place: int
    """Of the parameter among those that are held, from 1."""

    extras: Extras = field(default_factory=dict)
    version: int = -1
    """Of the weight when we last wrote it; any other tells a foreign write."""

    partner: int | None = None
    """Fingerprint of the weight that the extras belong to; None: not known."""

    trusted: bool = False
    """Whether the next foreign write is the one that belongs to loaded extras."""

    @property
    def needs_stand_in(self) -> bool:
        """Whether its data must not be exchanged: FSDP2 or DDP work with them."""
        return self.own is None or (
            torch.distributed.is_available() and torch.distributed.is_initialized()
        )

    @property
    def weight(self) -> torch.Tensor:
        """The weight in 16 bits, or what this process holds of it."""
        return local(self.parameter).detach() if self.own is None else self.own

    def begin(self, full: torch.Tensor) -> None:
        """Make an fp32 tensor the weight, with nothing remembered of the former one."""
        self.extras = self.storage.begin(full, self.weight, self.place)
        self.remember_version()
        self.trusted = False
        # FSDP2 may move the local part before its first forward; that is no new weight.
        self.partner = None if self.own is not None else self.fingerprint()

    def full(self) -> torch.Tensor:
        """Return the exact weight in fp32, or what this process holds of it."""
        return self.storage.join(self.weight, self.extras)

    def fingerprint(self) -> int:
        """Return a number that two weights share only if they are very likely equal."""
        bits = self.weight.view(torch.int16).flatten()
        odd = bits[1::2].sum(dtype=torch.int64)
        return int(bits.sum(dtype=torch.int64) * 1_000_003 + odd)

    def saved(self) -> Extras:
        """Return what a state dict is to hold of it, named by storage."""
        name, shape = self.storage.name, self.weight.shape
        extras = {
            f"{name}.{key}": sharded_like(self.parameter, value)
            if value.shape == shape
            else value
            for key, value in self.extras.items()
        }
        # That of a shard would fit one number of processes only.
        known = self.fingerprint() if self.own is not None else _UNKNOWN
        extras[f"{name}.fingerprint"] = torch.tensor(known, dtype=torch.int64)
        return extras

    def load(self, saved: Extras) -> None:
        """Take back what `saved` returned; the weight itself comes with the model."""
        prefix = f"{self.storage.name}."
        own = {key.removeprefix(prefix): value for key, value in saved.items()}
        fingerprint = own.pop("fingerprint", None)
        if own.keys() != self.extras.keys() or fingerprint is None:
            raise WeightStorageError(
                f"need the states of weights held in {self.storage.name}; got "
                f"{', '.join(saved)}; hold the weights as they were saved, or load "
                "them as fp32 with load_fp32_weights"
            )
        for name, value in own.items():
            device = self.extras[name].device
            self.extras[name] = local(value).to(device, copy=True)
        self.partner = int(fingerprint)
        self.trusted = self.own is None or self.partner == _UNKNOWN
        self.version = -1  # compare at the next step, when the model is loaded too

    def notice_foreign_write(self) -> None:
        """Take over what somebody wrote into the parameter since the last step."""
        if self._version() == self.version:
            return
        if not self.trusted and self.partner != self.fingerprint():
            self.begin(self.weight.float())
        self.remember_version()
        self.trusted = False

    def remember_version(self) -> None:
        """Take the parameter as it is for our own work."""
        self.version = self._version()

    def _version(self) -> int:
        tensor = self.parameter if self.own is not None else local(self.parameter)
        version: int = tensor._version  # noqa: SLF001 -- no public name
        return version


class Joined:
    """The parameters that are fp32 at the moment, and what they were before."""

    def __init__(self, optimizer: Optimizer, held: Iterable[HeldParameter]) -> None:
        self._optimizer = optimizer
        self._held = list(held)
        self._gradients: list[torch.Tensor | None] = []
        self._stand_ins: dict[int, torch.nn.Parameter] = {}

    def join(self) -> None:
        """Show the optimizer exact weights and gradients in fp32."""
        self._gradients = [held.parameter.grad for held in self._held]
        for held, gradient in zip(self._held, self._gradients, strict=True):
            wide = None if gradient is None else gradient.float()
            if held.needs_stand_in:
                full = sharded_like(held.parameter, held.full())
                stand_in = torch.nn.Parameter(full, requires_grad=False)
                stand_in.grad = wide
                self._stand_ins[id(held.parameter)] = stand_in
            else:
                held.parameter.grad = None
                held.parameter.data = held.full()
                held.parameter.grad = wide
        self._exchange(self._stand_ins)

    def part(self) -> None:
        """Show the model its 16-bit weights and gradients again."""
        back = {
            id(self._stand_ins[id(held.parameter)]): held.parameter
            for held in self._held
            if held.needs_stand_in
        }
        self._exchange(back)
        for held, gradient in zip(self._held, self._gradients, strict=True):
            if held.needs_stand_in:
                full = local(self._stand_ins.pop(id(held.parameter)))
            else:
                assert held.own is not None
                full = held.parameter.data
                held.parameter.grad = None
                held.parameter.data = held.own
                held.parameter.grad = gradient
            held.storage.part(full.detach(), held.weight, held.extras)

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

    def _exchange(self, by: dict[int, torch.nn.Parameter]) -> None:
        """Let other parameters take the places and states of some."""
        if not by:
            return
        states = self._optimizer.state
        for group in self._optimizer.param_groups:
            for place, parameter in enumerate(group["params"]):
                other = by.get(id(parameter))
                if other is None:
                    continue
                group["params"][place] = other
                if parameter in states:
                    states[other] = states.pop(parameter)


def check_parameters(
    parameters: list[tuple[torch.nn.Parameter, WeightStorage]], start: int
) -> None:
    """Refuse parameters that have no 16-bit form or share memory."""
    seen: dict[tuple[int, int], int] = {}
    for place, (parameter, storage) in enumerate(parameters, start):
        where = f"parameter {place} of the optimizer, {list(parameter.shape)}"
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise WeightStorageError(
                f"storage {storage.name} needs parameters in fp32 or 16 bits; got "
                f"{parameter.dtype} in {where}; name it in keep="
            )
        if parameter.layout != torch.strided or not parameter.is_leaf:
            raise WeightStorageError(
                f"storage {storage.name} needs dense parameters; got "
                f"{type(parameter.data).__name__} of layout {parameter.layout} in "
                f"{where}; name it in keep="
            )
        part = local(parameter)
        address = part.data_ptr(), part.numel()
        if part.numel() and seen.setdefault(address, place) != place:
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
