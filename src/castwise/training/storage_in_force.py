"""The storage of 16-bit weights that a policy asks for, put under the optimizer.

Weights are held before their format changes, so that what stands beside them begins
with the digits that 16 bits do not hold. Weights that no optimizer of the run holds are
never updated, and need no storage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from castwise.decision import Decision
from castwise.errors import PolicyError, SettingsError, WeightStorageError
from castwise.optim.holding import HeldIn, HeldWeights, held_weights_of
from castwise.optim.storage import make_storage

if TYPE_CHECKING:
    import torch
    from torch import nn

    from castwise.policy.bound import BoundPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageInForce:
    """How the 16-bit weights of an optimizer are stored."""

    held: HeldWeights | None = None
    """What holds them; None where no weight is held in 16 bits."""

    decisions: tuple[Decision[str], ...] = ()
    """Each storage in use, and why."""

    is_ours: bool = False
    """Whether `prepare` put it there, and the run takes it away."""

    def remove(self) -> None:
        """Give the weights back in fp32, if it was `prepare` that held them."""
        if self.held is not None and self.is_ours:
            self.held.remove()


def put_storage_into_force(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    bound: BoundPolicy,
    *,
    exchanged: bool,
) -> StorageInForce:
    """Hold the optimizer's 16-bit weights as the policy says.

    Args:
        model: Names the weights.
        optimizer: Its code stays as it is.
        bound: The policy, bound to the model.
        exchanged: Whether formats were exchanged for the device; then a storage that
            has nothing left to hold is no mistake.

    Raises:
        WeightStorageError: A weight cannot be stored so, or should be in two ways.
        PolicyError: The policy says how to store weights in 16 bits, and none is.
        SettingsError: The weights are held already, and otherwise.
    """
    weights = [w for group in optimizer.param_groups for w in group["params"]]
    chosen = _Chosen(model, bound)
    decisions = {
        decision.value: decision
        for decision in map(chosen.decision, weights)
        if decision is not None
    }
    before = held_weights_of(optimizer)
    if before is not None:
        _refuse_another_hold(before, weights, chosen, bound)
        reason = "held by hold_weights before the policy came"
        return StorageInForce(
            held=before,
            decisions=tuple(Decision(name, reason) for name in before.storages),
        )
    if not decisions:
        if not exchanged:
            _refuse_idle_storage(bound)
        return StorageInForce()
    return StorageInForce(
        held=HeldWeights(optimizer, chosen),
        decisions=tuple(decisions.values()),
        is_ours=True,
    )


class _Chosen:
    """What the policy chooses for each weight, also for those added later."""

    def __init__(self, model: nn.Module, bound: BoundPolicy) -> None:
        self._model, self._bound = model, bound
        self._owners: dict[torch.Tensor, list[str]] = {}

    def __call__(self, weight: nn.Parameter) -> HeldIn | None:
        """Say how a weight is to be held."""
        decision = self.decision(weight)
        if decision is None:
            return None
        fmt = self._bound.precision_of(self._owners[weight][0]).param
        assert fmt is not None
        storage = make_storage(decision.value, fmt, accept_lost_updates=True)
        return HeldIn(storage, fmt)

    def decision(self, weight: torch.Tensor) -> Decision[str] | None:
        """Say how a weight is stored and why; None where nothing stands beside it."""
        if weight not in self._owners:
            self._owners = _owners(self._model)
        owners = self._owners.get(weight)
        if owners is None or not weight.is_floating_point():
            return None
        first, *others = ((fqn, self._bound.storage_of(fqn)) for fqn in owners)
        for fqn, decision in others:
            if decision.value != first[1].value:
                raise WeightStorageError(
                    f"{first[0]!r} and {fqn!r} share a weight, but store it as "
                    f"{first[1]} and {decision}; give both names one storage"
                )
        value, because = first[1].value, first[1].because
        return None if value is None else Decision(value, because)


def _owners(model: nn.Module) -> dict[torch.Tensor, list[str]]:
    """Return the fqn of every module that owns a weight."""
    owners: dict[torch.Tensor, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        fqn = f".{name.rpartition('.')[0]}".partition(".parametrizations")[0]
        owners.setdefault(weight, []).append(fqn.removeprefix("."))
    return owners


def _says_storage(bound: BoundPolicy) -> bool:
    """Return whether the policy names any storage."""
    policy = bound.policy
    return policy.storage is not None or any(rule.storage for rule in policy.rules)


def _refuse_idle_storage(bound: BoundPolicy) -> None:
    if _says_storage(bound):
        raise PolicyError(
            f"{bound.policy.name} says how weights in 16 bits are stored, but holds "
            "none of the optimizer's weights in 16 bits; write p=bf16 for some, or "
            "leave storage out"
        )


def _refuse_another_hold(
    before: HeldWeights,
    weights: list[torch.Tensor],
    chosen: _Chosen,
    bound: BoundPolicy,
) -> None:
    for weight in weights:
        decision = chosen.decision(weight)
        now = before.storage_of(weight)
        if decision is None or decision.value == now:
            continue
        if now is None or _says_storage(bound):
            raise SettingsError(
                f"{bound.policy.name} stores {_shown(chosen, weight)} as {decision}, "
                f"but hold_weights already holds it as {now or 'nothing else'}; leave "
                "hold_weights to prepare, or write the same storage in both"
            )


def _shown(chosen: _Chosen, weight: torch.Tensor) -> str:
    return f"a weight of {chosen._owners[weight][0] or 'the model'!r}"  # noqa: SLF001 -- one room
