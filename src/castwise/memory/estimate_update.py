"""The update of a step under fake tensors: what an optimizer and its storage make.

An optimizer of torch makes its states in its first step, and temporaries in every step;
both are followed by letting it step. castwise's own optimizers sweep in machine code
and make nothing at all, but a copy of a gradient that lies in memory otherwise than its
weight. Norms and checks of the gradients make a number for each, which is not counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from castwise.dtypes import format_of
from castwise.errors import CastwiseError, PolicyError, SettingsError
from castwise.memory.estimate_fakes import FakeHold, FakeModel, fake_optimizer
from castwise.optim.holding import HeldIn, held_weights_of
from castwise.optim.storage import make_storage
from castwise.optim.sweep import SweepOptimizer

if TYPE_CHECKING:
    from castwise.memory.lifetimes import Ledger
    from castwise.policy.bound import BoundPolicy

MakesOptimizer = Callable[[list[nn.Parameter]], Optimizer]
"""Builds an optimizer over parameters."""


class Update:
    """An optimizer over fakes, with its weights held as they will be.

    Args:
        optimizer: Over the parameters of the original model, or what builds one.
        model: The fakes.
        bound: The policy, which says how weights in 16 bits are stored.
        device: Where the fakes stand.

    Raises:
        SettingsError: The optimizer is that of another model.
        PolicyError: The policy says how weights in 16 bits are stored, and none is.
    """

    def __init__(
        self,
        optimizer: Optimizer | MakesOptimizer,
        model: FakeModel,
        bound: BoundPolicy | None,
        device: torch.device,
    ) -> None:
        self.optimizer = fake_optimizer(optimizer, model, device)
        self.name = type(self.optimizer).__name__
        self._refuse_foreign(model.module)
        self._hold: FakeHold | None = None
        held = held_weights_of(optimizer) if isinstance(optimizer, Optimizer) else None
        choose = _by_policy(model.module, bound)
        if held is not None:
            originals = {
                id(twin): held.storage_of(original)
                for original, twin in zip(
                    _parameters(optimizer), _parameters(self.optimizer), strict=True
                )
            }
            choose = _as_held(originals)
        if any(choose(each) is not None for each in _parameters(self.optimizer)):
            self._hold = FakeHold(self.optimizer, choose)
        elif bound is not None and bound.policy.storage is not None:
            raise PolicyError(
                f"{bound.policy.name} says how weights in 16 bits are stored, but "
                "holds none of the optimizer's weights in 16 bits; write p=bf16 for "
                "some, or leave storage out"
            )

    def warm_up(self) -> None:
        """Step once, so that every state exists.

        Raises:
            SettingsError: The optimizer's step needs numbers.
        """
        for weight in _parameters(self.optimizer):
            if weight.requires_grad:
                weight.grad = torch.empty_like(weight)
        self.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self) -> None:
        """Let the optimizer step, as far as it makes anything.

        Raises:
            SettingsError: The optimizer's step needs numbers.
        """
        try:
            self._step()
        except CastwiseError:
            raise
        except Exception as error:
            raise SettingsError(
                f"an estimate needs an optimizer whose step can be followed without "
                f"numbers, and {self.name} cannot: {type(error).__name__}: "
                f"{_first_line(error)}; leave optimizer= out and add its states with "
                "beside="
            ) from error

    def _step(self) -> None:
        optimizer, hold = self.optimizer, self._hold
        if isinstance(optimizer, SweepOptimizer):
            with contextlib.nullcontext() if hold is None else hold.all_joined():
                _sweep(optimizer)
        else:
            _as_on_device(optimizer)
            optimizer.step()

    def name_in(self, ledger: Ledger, names: dict[int, str]) -> None:
        """Tell a ledger what states and storages are.

        Args:
            ledger: Not entered yet.
            names: id of a weight -> fqn of its module.
        """
        for weight in _parameters(self.optimizer):
            module = names.get(id(weight), "")
            beside = {} if self._hold is None else self._hold.beside(weight)
            for extra in beside.values():
                ledger.name(extra, kind="storage", module=module)
            for state in self.optimizer.state.get(weight, {}).values():
                if isinstance(state, torch.Tensor):
                    ledger.name(state, kind="states", module=module)

    def _refuse_foreign(self, module: nn.Module) -> None:
        known = {id(weight) for weight in module.parameters()}
        for weight in _parameters(self.optimizer):
            if id(weight) not in known:
                raise SettingsError(
                    "an estimate needs the optimizer of this model, and a parameter of "
                    f"shape {list(weight.shape)} is not one of its weights; build the "
                    "optimizer from the parameters that it is given"
                )


def _sweep(optimizer: SweepOptimizer) -> None:
    """Make what a sweep makes."""
    swept = optimizer._swept()  # noqa: SLF001 -- copies of gradients are made here
    if swept and optimizer.backend_for(swept[0].weight.device).value == "twin":
        optimizer._advance(optimizer._sweepers(swept), 1.0)  # noqa: SLF001 -- the readable twin makes its own


def _parameters(optimizer: Any) -> list[nn.Parameter]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _by_policy(
    module: nn.Module, bound: BoundPolicy | None
) -> Callable[[nn.Parameter], HeldIn | None]:
    """Hold weights as the policy says, and as `castwise.prepare` will hold them."""
    owners = {
        id(weight): name.rpartition(".")[0].partition(".parametrizations")[0]
        for name, weight in module.named_parameters()
    }

    def choose(weight: nn.Parameter) -> HeldIn | None:
        if bound is None or not weight.is_floating_point():
            return None
        fqn = owners[id(weight)]
        storage, fmt = bound.storage_of(fqn).value, bound.precision_of(fqn).param
        if storage is None or fmt is None:
            return None
        return HeldIn(make_storage(storage, fmt, accept_lost_updates=True), fmt)

    return choose


def _as_held(
    storages: dict[int, str | None],
) -> Callable[[nn.Parameter], HeldIn | None]:
    """Hold weights as `hold_weights` holds the originals already."""

    def choose(weight: nn.Parameter) -> HeldIn | None:
        storage = storages.get(id(weight))
        if storage is None:
            return None
        fmt = format_of(weight.dtype)
        return HeldIn(make_storage(storage, fmt, accept_lost_updates=True), fmt)

    return choose


def _as_on_device(optimizer: Optimizer) -> None:
    """Take the path that torch takes on a GPU, where fakes would miss it."""
    for group in optimizer.param_groups:
        on_gpu = any(weight.device.type == "cuda" for weight in group["params"])
        if on_gpu and "foreach" in group and not group.get("fused"):
            group["foreach"] = group["foreach"] is not False


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
