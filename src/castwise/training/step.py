"""One update of the weights: forward, backward, check, clip, step, and its outcome.

    run = prepare(model, optimizer, policy)
    for x, y in loader:
        with run.step() as step:                 # the policy's precision is in force
            step.backward(loss_fn(model(x), y))  # more than once: gradients add up
        step.outcome                             # Stepped(...) or Skipped(because=...)

When the block ends, gradients are unscaled and checked. If all are finite, they are
clipped by their global norm and the optimizer steps; if one is not, under any format,
the step is skipped and the weights stay as they are, and it is replayed to say which
operator is to blame (`replay`). Gradients are cleared either way, and the loss scale
learns. When the block dies of an exception, nothing has happened.

A training loop of one's own keeps everything else: data, schedule, evaluation.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from castwise.decision import Decision
from castwise.errors import PolicyError, StepError
from castwise.fitting import device_of, fit_to_device, refuse_sharded_storage
from castwise.islands import AppliedPolicy, apply_policy, module_facts
from castwise.loss_scale import LossScale, NonFinite, loss_scale_of
from castwise.optim.clipping import ByGroup, ByRow
from castwise.region import Region, refuse_unknown_operators
from castwise.training.admission import refuse_settings, refuse_stale_state
from castwise.training.in_force import PrecisionInForce, held_formats
from castwise.training.open_step import Step, StepWatcher
from castwise.training.outcome import Skipped, Stepped
from castwise.training.overrides import (
    PolicyChange,
    from_records,
    overridden,
    records,
)
from castwise.training.scale_history import ScaleHistory
from castwise.training.state_watch import StateWatch
from castwise.training.storage_in_force import (
    StorageInForce,
    put_storage_into_force,
)
from castwise.training.tape import Tape

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from castwise.optim.holding import HeldWeights
    from castwise.policy.rules import Policy
    from castwise.training.replay import Again


__all__ = ["Run", "Skipped", "Step", "Stepped", "prepare"]


class Run:
    """A model, its optimizer and a policy in force; made by `prepare`."""

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        applied: AppliedPolicy,
        asked: Policy,
        fallbacks: tuple[Decision[str], ...],
        loss_scale: LossScale,
        loss_scale_decision: Decision[str],
        storage: StorageInForce,
        device: torch.device,
        clip_norm: float | ByGroup | ByRow | None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss_scale = loss_scale
        self.clip_norm = clip_norm
        self.device = device
        self.num_stepped = 0
        self.num_skipped = 0
        self.history = ScaleHistory()
        self.history.note_scale(0, loss_scale.scale)
        self.watchers: list[StepWatcher] = []
        """Who is told of every step; `castwise.watch` comes and goes here."""
        self._tape = Tape(model, device)
        self._states = StateWatch(optimizer)
        self.changes: tuple[PolicyChange, ...] = ()
        """The history of the policy: modules that were given another precision."""
        self._applied: AppliedPolicy | None = applied
        self._given = applied.bound.policy
        self._asked, self._fallbacks = asked, fallbacks
        self._loss_scale_decision = loss_scale_decision
        self._storage = storage
        self._open_step: Step | None = None
        self._named: dict[str, torch.Tensor] = {}
        self._named_ids: list[int] = []
        self._regions: dict[str, Region] = {}

    @property
    def applied(self) -> AppliedPolicy:
        """The policy on the model.

        Raises:
            StepError: It was removed.
        """
        if self._applied is None:
            raise StepError(
                "this run was removed from its model; call prepare again for a new one"
            )
        return self._applied

    @property
    def held(self) -> HeldWeights | None:
        """What holds the exact weights behind those in 16 bits, if any are."""
        return self._storage.held

    @property
    def phase(self) -> str:
        """The phase whose precision is in force; may change between steps."""
        return self.applied.phase

    @phase.setter
    def phase(self, phase: str) -> None:
        if self._open_step is not None:
            raise StepError(
                f"the phase cannot become {phase!r} while a step is open; set "
                "run.phase between two steps"
            )
        self.applied.phase = phase

    @property
    def precision(self) -> PrecisionInForce:
        """The policy asked for, and what is in force now."""
        policy = self.applied.bound.policy
        compute = policy.base_precision(phase=self.phase).compute
        assert compute is not None
        return PrecisionInForce(
            asked=self._asked,
            effective=policy,
            fallbacks=self._fallbacks,
            device=str(self.device),
            phase=self.phase,
            compute=compute,
            islands=self.applied.coverage(),
            parameters=held_formats(self.model),
            storage=self._storage.decisions,
            loss_scale=self._loss_scale_decision,
        )

    def step(self, again: Again | None = None) -> Step:
        """Return a step to open with `with`.

        Args:
            again: Computes the loss of the step once more, or its losses one after the
                other, to find out why it was skipped. Default: what the model and torch
                were seen to compute, which is enough unless the model is compiled.
        """
        return Step(self, again)

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Run forward in the policy's precision without gradients.

        Train or eval mode stays as it is.
        """
        with torch.no_grad(), self.region():
            yield

    @contextlib.contextmanager
    def region(self) -> Iterator[None]:
        """Put the precision of the phase into force, and nothing else."""
        if self.phase not in self._regions:
            policy = self.applied.bound.policy
            self._regions[self.phase] = Region.of(policy, self.phase, (self.applied,))
        with self._regions[self.phase].entered(self.device.type):
            yield

    def override(self, module: str, precision: str | None, *, because: str) -> None:
        """Run a module in another precision from the next step on.

        Weights stay held as they are, so the precision names no `p=`.

        Args:
            module: fqn of the module; all below it follows.
            precision: What it computes in and hands out, such as `c=fp32,o=fp32`; none
                for what the policy says.
            because: The reason, one line; it stands in `run.changes`.

        Raises:
            PolicyError: The module cannot be held so; nothing was changed.
            StepError: A step is open.
        """
        step = self.num_stepped + self.num_skipped
        change = PolicyChange(
            step=step, module=module, precision=precision, because=because
        )
        self._put((*self.changes, change))

    def _put(self, changes: tuple[PolicyChange, ...]) -> None:
        """Put the policy with all overrides on the model, or leave it as it was."""
        if self._open_step is not None:
            raise StepError(
                "the policy cannot change while a step is open; change it between two "
                "steps"
            )
        before, phase, device_type = self.applied, self.phase, self.device.type
        bound = overridden(self._given, changes).bind(module_facts(self.model))
        before.remove()
        try:
            self._applied = apply_policy(self.model, bound, device_type, phase=phase)
        except PolicyError:
            self._applied = apply_policy(
                self.model, before.bound, device_type, phase=phase
            )
            raise
        finally:
            self._regions.clear()
        self.changes = changes

    def parameters(self) -> dict[str, torch.Tensor]:
        """The optimizer's parameters by name; by place if they are not the model's."""
        groups = self.optimizer.param_groups
        ids = [id(weight) for group in groups for weight in group["params"]]
        if ids != self._named_ids:  # the model is walked only when they changed
            names = {weight: name for name, weight in self.model.named_parameters()}
            self._named = {
                names.get(weight, f"param_groups[{at}]['params'][{place}]"): weight
                for at, group in enumerate(groups)
                for place, weight in enumerate(group["params"])
            }
            self._named_ids = ids
        return self._named.copy()

    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradients that the optimizer would step by, by parameter name."""
        return {
            name: gradient
            for name, weight in self.parameters().items()
            if (gradient := weight.grad) is not None
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold beside the model and the optimizer."""
        return {
            "loss_scale": self.loss_scale.state_dict(),
            "phase": self.phase,
            "num_stepped": self.num_stepped,
            "num_skipped": self.num_skipped,
            "history": self.history.state_dict(),
            "changes": records(self.changes),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            LossScaleError: It was taken with another kind of loss scale.
            StepError: It is no state of a run.
        """
        state = {"changes": [], **state}  # absent from checkpoints of the first version
        needed = self.state_dict().keys() - {"history"}  # earlier runs kept none
        missing = [name for name in self.state_dict() if name in needed - state.keys()]
        if missing:
            raise StepError(
                f"the state of a run lacks {', '.join(missing)}; give what "
                "run.state_dict() returned"
            )
        self.loss_scale.load_state_dict(state["loss_scale"])
        self.phase = state["phase"]
        self.num_stepped = int(state["num_stepped"])
        self.num_skipped = int(state["num_skipped"])
        if "history" in state:
            self.history.load_state_dict(state["history"])
        changes = from_records(state["changes"])
        if changes != self.changes:
            self._put(changes)

    def remove(self) -> None:
        """Take the policy off the model; the run cannot be used afterwards.

        Weights in 16 bits come back in fp32, with every bit that their storage held.
        """
        if self._open_step is not None:
            raise StepError("the run cannot be removed while a step is open; leave it")
        self.applied.remove()
        self._storage.remove()
        self._tape.remove()
        self._applied = None

    def _open(self, step: Step) -> None:
        if self._open_step is not None:
            raise StepError(
                "a step is already open and steps do not nest; to accumulate gradients "
                "call step.backward several times in one step"
            )
        for name, weight in self.parameters().items():
            if weight.grad is not None:
                raise StepError(
                    f"{name!r} already holds a gradient that no step has scaled; call "
                    "optimizer.zero_grad() first, and step.backward for each backward"
                )
        self._open_step = step

    def _close(self) -> None:
        self._open_step = None

    def _clear_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        _drop_gradients(self.model)

    def _count(self, outcome: Stepped | Skipped) -> None:
        if isinstance(outcome, Stepped):
            self.num_stepped += 1
        else:
            self.num_skipped += 1
        self.history.note(self.num_stepped + self.num_skipped, outcome)

    def _learn(self, finding: NonFinite | None) -> None:
        """Let the scale learn from a step that was counted."""
        self.loss_scale.adjust(finding)
        done = self.num_stepped + self.num_skipped
        self.history.note_scale(done, self.loss_scale.scale)


def prepare(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    policy: Policy,
    *,
    clip_norm: float | ByGroup | ByRow | None = None,
    loss_scale: LossScale | None = None,
    device: str | torch.device | None = None,
    phase: str = "full",
    fallback: str | None = None,
) -> Run:
    """Put a policy on a model, and return the run that steps it.

    Args:
        model: Any module tree; its code stays as it is.
        optimizer: Built before or after; parameters keep their identity.
        policy: What runs in which format.
        clip_norm: Largest global norm of the gradients, or how to clip them otherwise
            (`ByGroup`, `ByRow`). Default: not clipped.
        loss_scale: Default: what the policy says, or else what its formats need.
        device: Where the model is moved to. Default: where it is.
        phase: The phase to begin in.
        fallback: The format to use instead of one that the device cannot do.

    Raises:
        UnsupportedFormatError: The device cannot do a format of the policy.
        UnmatchedRuleError: A rule matches nothing in the model.
        RuleError: A rule names an operator that PyTorch does not have.
        IslandError: A module cannot be held as the policy says.
        SettingsError: The optimizer cannot be stepped, or is that of another model.
        WeightStorageError: A weight in 16 bits cannot be stored as the policy says.
    """
    refuse_settings(model, optimizer, clip_norm)
    refuse_unknown_operators(policy)
    if device is not None:
        model.to(device)
    where = device_of(model)
    fitted, fallbacks = fit_to_device(policy, where, fallback)
    decision = (
        fitted.decide_loss_scale()
        if loss_scale is None
        else Decision(type(loss_scale).__name__, "it was given to prepare")
    )
    bound = fitted.bind(module_facts(model))
    storage = put_storage_into_force(model, optimizer, bound, exchanged=bool(fallbacks))
    with contextlib.ExitStack() as undo:
        undo.callback(storage.remove)
        refuse_sharded_storage(model, bound)
        applied = apply_policy(model, bound, where.type, phase=phase)
        undo.callback(applied.remove)
        refuse_stale_state(optimizer, storage.held)
        undo.pop_all()
    return Run(
        model=model,
        optimizer=optimizer,
        applied=applied,
        asked=policy,
        fallbacks=fallbacks,
        loss_scale=loss_scale or loss_scale_of(decision.value),
        loss_scale_decision=decision,
        storage=storage,
        device=where,
        clip_norm=clip_norm,
    )


def _drop_gradients(model: nn.Module) -> None:
    """Clear all gradients, as `zero_grad` does, in a fifth of the time.

    It is called in each step, and most of its work would be the names of modules.
    """
    pending, seen = [model], {id(model)}
    while pending:
        module = pending.pop()
        for weight in module._parameters.values():  # noqa: SLF001 -- the names are dear
            if weight is not None and weight.grad is not None:
                weight.grad = None
        for child in module._modules.values():  # noqa: SLF001 -- as above
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                pending.append(child)
