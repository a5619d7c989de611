"""The memory of a training step before anything runs: walked with shapes, not numbers.

    estimate = castwise.estimate(model, batch, loss_fn, policy, optimizer=optimizer)
    estimate.peak_bytes
    estimate.peak                       # where in the step, and by which operator
    estimate.by_module("saved")

The step that `run.step()` makes is made with fake tensors: the policy is put on a copy
without numbers, forward and backward run in its region, and the optimizer steps, over
weights that are held as they will be. A `Ledger` writes down what is born and dies.
Nothing is allocated and nothing of the model is touched; it may stand on the meta
device, so models that fit nowhere can be asked about.

What a ledger cannot see is not in the figures; the estimate's `notes` say what it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from castwise.errors import CastwiseError, SettingsError, TargetError
from castwise.fitting import device_of
from castwise.islands import apply_policy, module_facts
from castwise.loss_scale import loss_scale_of
from castwise.memory.estimate_fakes import fake_like, fake_mode, fake_model
from castwise.memory.estimate_records import Estimate, estimate_of
from castwise.memory.estimate_update import MakesOptimizer, Update
from castwise.memory.lifetimes import Ledger, Lifetimes
from castwise.memory.recompute import is_recomputed
from castwise.memory.recompute import recompute as put_recompute
from castwise.policy.rules import Policy
from castwise.region import Region

LossFn: TypeAlias = Callable[[Any, Any], torch.Tensor]
"""From the model's output and the target to a scalar."""

Recompute: TypeAlias = Sequence[str] | Callable[[nn.Module], object]
"""Globs for the modules that are run again, or what puts recomputation on a model."""

__all__ = ["Estimate", "LossFn", "Recompute", "estimate", "foretell"]

_UNSEEN = (
    "not counted: memory that a kernel takes and gives back within one operator, what "
    "oneDNN or cuBLAS keep, and the rounding of the allocator to its blocks"
)
_COMPILED = (
    "the model is compiled, and the figures are those of the same model not compiled"
)


def estimate(
    model: nn.Module,
    batch: Sequence[Any],
    loss_fn: LossFn,
    policy: Policy | None = None,
    *,
    optimizer: Optimizer | MakesOptimizer | None = None,
    storage: str | None = None,
    recompute: Recompute = (),
    device: str | torch.device | None = None,
    phase: str = "full",
    beside: Mapping[str, int] | None = None,
) -> Estimate:
    """Tell what a training step will hold, and when, before anything runs.

    Args:
        model: Any module tree without a policy on it, on any device or on `meta`; it
            stays as it is.
        batch: The model's inputs and, last, the target of the loss.
        loss_fn: From the model's output and the target to a scalar.
        policy: What runs in which format. Default: the model as it is.
        optimizer: Of the model, or what builds one from its parameters. Default: none,
            so that the step ends with the backward.
        storage: How weights in 16 bits are stored, instead of as the policy says.
        recompute: Globs for the fqns of modules that are run again in the backward
            instead of saving what they compute; or a function that puts recomputation
            on the model that it is given. Default: what the model does by itself.
        device: Whose kernels are followed. Default: where the model stands; the CPU for
            `meta`.
        phase: The phase of the policy.
        beside: Bytes of what else stands there, by name, such as averaged weights.

    Raises:
        PolicyError: The policy cannot be put on this model.
        SettingsError: The optimizer is that of another model, or cannot be followed; a
            glob names no module; nothing here knows the device.
        TargetError: The batch is none, or forward or loss need numbers.
    """
    lifetimes, facts = foretell(
        model,
        batch,
        loss_fn,
        policy,
        optimizer=optimizer,
        storage=storage,
        recompute=recompute,
        device=device,
        phase=phase,
        beside=beside,
    )
    return estimate_of(lifetimes, **facts)


def foretell(
    model: nn.Module,
    batch: Sequence[Any],
    loss_fn: LossFn,
    policy: Policy | None = None,
    *,
    optimizer: Optimizer | MakesOptimizer | None = None,
    storage: str | None = None,
    recompute: Recompute = (),
    device: str | torch.device | None = None,
    phase: str = "full",
    beside: Mapping[str, int] | None = None,
) -> tuple[Lifetimes, dict[str, Any]]:
    """Return every allocation of the step, and the other fields of its estimate.

    Args and errors are those of `estimate`.
    """
    inner = getattr(model, "_orig_mod", model)
    where = _where(inner, device)
    asked = _asked(policy, storage)
    with fake_mode(where):
        walk = _Walk(inner, asked, optimizer, recompute, where, phase)
        lifetimes = walk.run(_checked(batch), loss_fn, beside or {})
    return lifetimes, {
        "policy": "as it is" if policy is None else policy.name,
        "optimizer": "none" if walk.update is None else walk.update.name,
        "device": str(where),
        "num_parameters": sum(weight.numel() for weight in inner.parameters()),
        "recompute": walk.recomputed,
        "notes": (_UNSEEN,) if inner is model else (_UNSEEN, _COMPILED),
    }


class _Walk:
    """One model, set up under fakes, and the step that is made with it."""

    def __init__(
        self,
        model: nn.Module,
        policy: Policy | None,
        optimizer: Optimizer | MakesOptimizer | None,
        recompute: Recompute,
        device: torch.device,
        phase: str,
    ) -> None:
        self.device = device
        fakes = fake_model(model, device)
        self.model = fakes.module
        bound = None if policy is None else policy.bind(module_facts(self.model))
        self.update = None
        if optimizer is not None:
            self.update = Update(optimizer, fakes, bound, device)
        self.region: Region | None = None
        self.scale = loss_scale_of("none")
        if bound is not None and policy is not None:
            applied = apply_policy(self.model, bound, device.type, phase=phase)
            self.region = Region.of(policy, phase, (applied,))
            self.scale = loss_scale_of(policy.decide_loss_scale().value)
        self.recomputed = _put_recompute(self.model, recompute)
        if self.update is not None:
            self.update.warm_up()

    def run(
        self, batch: Sequence[Any], loss_fn: LossFn, beside: Mapping[str, int]
    ) -> Lifetimes:
        """Make the step and return what was born and died in it."""
        given = fake_like(tuple(batch), self.device)
        ledger = Ledger(self.model)
        self._name(ledger, given, beside)
        try:
            with ledger:
                self._step(ledger, given, loss_fn)
        except CastwiseError:
            raise
        except Exception as error:
            raise TargetError(
                "an estimate needs a forward and a loss that can be followed without "
                f"numbers; got {type(error).__name__}: {_first_line(error)}; branch on "
                "shapes instead of values, or measure a real step"
            ) from error
        return ledger.lifetimes()

    def _step(self, ledger: Ledger, batch: tuple[Any, ...], loss_fn: LossFn) -> None:
        with self._in_region():
            loss = loss_fn(self.model(*batch[:-1]), batch[-1])
            _refuse_loss(loss)
            with torch.autocast(self.device.type, enabled=False):
                ledger.begin("backward")
                self.scale.scaled(loss).backward()  # type: ignore[no-untyped-call]
        ledger.begin("update")
        for name, weight in self.model.named_parameters():
            if weight.grad is not None:
                module = name.rpartition(".")[0]
                ledger.name(weight.grad, kind="gradients", module=module)
        if self.update is not None:
            self.update.step()

    def _in_region(self) -> contextlib.AbstractContextManager[None]:
        if self.region is None:
            return contextlib.nullcontext()
        return self.region.entered(self.device.type)

    def _name(self, ledger: Ledger, batch: Any, beside: Mapping[str, int]) -> None:
        """Tell the ledger what stands there before the step."""
        names = {}
        for name, weight in self.model.named_parameters():
            names[id(weight)] = name.rpartition(".")[0]
            ledger.name(weight, kind="weights", module=names[id(weight)])
        for name, buffer in self.model.named_buffers():
            ledger.name(buffer, kind="buffers", module=name.rpartition(".")[0])
        if self.update is not None:
            self.update.name_in(ledger, names)
        ledger.name_all(batch, kind="batch")
        for name, size in beside.items():
            ledger.stand(size, kind="beside", module=name, fmt="")


def _where(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """Return the device to follow.

    Raises:
        SettingsError: torch was built without it.
    """
    where = device_of(model) if device is None else torch.device(device)
    if where.type == "meta":
        where = torch.device("cpu")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(
            "an estimate for cuda needs a torch that was built for it and a device, "
            "because kernels are chosen by asking it; take device='cpu'"
        )
    return where


def _asked(policy: Policy | None, storage: str | None) -> Policy | None:
    if storage is None:
        return policy
    if policy is None:
        raise SettingsError(
            f"storage {storage!r} is of weights in 16 bits, which a policy asks for; "
            "give the policy too"
        )
    return policy.with_storage(storage)


def _checked(batch: Sequence[Any]) -> Sequence[Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TargetError(
            f"an estimate needs a batch of (inputs..., target), got a "
            f"{type(batch).__name__}; give a tuple such as (x, y)"
        )
    return batch


def _refuse_loss(loss: Any) -> None:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise TargetError(
            f"an estimate needs a loss of one number, got {_shown(loss)}; return a "
            "scalar tensor from loss_fn"
        )
    if not loss.requires_grad:
        raise TargetError(
            "an estimate needs a loss that depends on the weights, got one without a "
            "gradient; return a scalar tensor from loss_fn"
        )


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"shape {tuple(value.shape)}"
    return type(value).__name__


def _put_recompute(model: nn.Module, asked: Recompute) -> tuple[str, ...]:
    """Let modules run again in the backward; return their fqns."""
    if callable(asked):
        asked(model)
    elif asked:
        put_recompute(model, modules=asked)
    return tuple(fqn for fqn, each in model.named_modules() if is_recomputed(each))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
