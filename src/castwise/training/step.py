"""One update of the weights: forward, backward, check, clip, step, and its outcome.

    run = prepare(model, optimizer, policy)
    for x, y in loader:
        with run.step() as step:                 # the policy's precision is in force
            step.backward(loss_fn(model(x), y))  # more than once: gradients add up
        step.outcome                             # Stepped(...) or Skipped(because=...)

When the block ends, gradients are unscaled and checked. If all are finite, they are
clipped by their global norm and the optimizer steps; if one is not, under any format,
the step is skipped and the weights stay as they are. Gradients are cleared either way,
and the loss scale learns. When the block dies of an exception, nothing has happened.

A training loop of one's own keeps everything else: data, schedule, evaluation.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any, Self

import torch

from castwise.decision import Decision
from castwise.errors import StepError
from castwise.fitting import device_of, fit_to_device, refuse_sharded_storage
from castwise.islands import AppliedPolicy, apply_policy, module_facts
from castwise.loss_scale import LossScale, NonFinite, loss_scale_of
from castwise.optim.clipping import clip_by_global_norm
from castwise.region import Region
from castwise.training.admission import (
    refuse_loss,
    refuse_settings,
    refuse_stale_state,
)
from castwise.training.in_force import PrecisionInForce, held_formats
from castwise.training.outcome import Skipped, Stepped, writer_of
from castwise.training.storage_in_force import (
    StorageInForce,
    put_storage_into_force,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

    from torch import nn
    from torch.autograd.graph import Node

    from castwise.optim.holding import HeldWeights
    from castwise.policy.rules import Policy


__all__ = ["Run", "Skipped", "Step", "Stepped", "prepare"]


class Step:
    """One open step; made by `run.step()`."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._losses: list[torch.Tensor] = []
        self._last_node: Node | None = None
        self._outcome: Stepped | Skipped | None = None
        self._region: contextlib.AbstractContextManager[None] | None = None
        self._used = False

    @property
    def outcome(self) -> Stepped | Skipped:
        """What became of the step; known when its block has ended."""
        if self._outcome is None:
            raise StepError(
                "the outcome of a step is known when its block has ended without an "
                "exception; read it after the with block"
            )
        return self._outcome

    def backward(self, loss: torch.Tensor, *, retain_graph: bool = False) -> None:
        """Add the gradients of a scalar loss, scaled; call it once or several times.

        Raises:
            StepError: The step is not open, or the loss has no gradient.
        """
        if self._region is None:
            raise StepError(
                "backward needs an open step; call it inside `with run.step() as step:`"
            )
        refuse_loss(loss)
        self._losses.append(loss.detach())
        self._last_node = loss.grad_fn
        # Autocast here would cast the products of backward, in fp32 islands too.
        with torch.autocast(self._run.device.type, enabled=False):
            self._run.loss_scale.scaled(loss).backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        if self._used:
            raise StepError("a step is used once; call run.step() for each")
        self._run._open(self)  # noqa: SLF001 -- the run and its step are one room
        self._used = True
        region = self._run.region()
        try:
            region.__enter__()
        except BaseException:
            self._run._close()  # noqa: SLF001 -- the run and its step are one room
            raise
        self._region = region
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._region is not None
        region, self._region = self._region, None
        try:
            region.__exit__(kind, error, trace)
            if error is None:
                self._finish()
        finally:
            self._run._clear_gradients()  # noqa: SLF001 -- the run and its step are one room
            self._run._close()  # noqa: SLF001 -- the run and its step are one room
            self._last_node = None

    def _finish(self) -> None:
        if not self._losses:
            raise StepError(
                "the step ended without a backward, so there is nothing to step by; "
                "call step.backward(loss) inside the block, not loss.backward()"
            )
        run = self._run
        gradients = run.gradients()
        scale = run.loss_scale.scale
        finding = run.loss_scale.unscale(gradients)
        loss = float(torch.stack([each.float() for each in self._losses]).sum())
        if finding is None:
            norm = clip_by_global_norm(list(gradients.values()), run.clip_norm)
            run.optimizer.step()
            self._outcome = Stepped(
                loss=loss,
                gradient_norm=norm,
                clipped=run.clip_norm is not None and norm > run.clip_norm,
                scale=scale,
            )
        else:
            self._outcome = self._skipped(finding, loss, scale)
        run._count(self._outcome)  # noqa: SLF001 -- the run and its step are one room
        run.loss_scale.adjust(finding)

    def _skipped(self, finding: NonFinite, loss: float, scale: float) -> Skipped:
        at = f" at loss scale {scale:g}" if scale != 1 else ""
        op = None
        if not math.isfinite(loss):
            shown = "NaN" if math.isnan(loss) else "inf"
            because = f"the loss is {shown}, so the forward went wrong; {finding}"
        else:
            because = f"{finding}{at}"
            op = writer_of(self._run.parameters()[finding.parameter], self._last_node)
        return Skipped(
            because=because, parameter=finding.parameter, op=op, scale=scale, loss=loss
        )


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
        clip_norm: float | None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss_scale = loss_scale
        self.clip_norm = clip_norm
        self.device = device
        self.num_stepped = 0
        self.num_skipped = 0
        self._applied: AppliedPolicy | None = applied
        self._asked, self._fallbacks = asked, fallbacks
        self._loss_scale_decision = loss_scale_decision
        self._storage = storage
        self._open_step: Step | None = None
        self._names: dict[torch.Tensor, str] = {}
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

    def step(self) -> Step:
        """Return a step to open with `with`."""
        return Step(self)

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

    def parameters(self) -> dict[str, torch.Tensor]:
        """The optimizer's parameters by name; by place if they are not the model's."""
        return {
            self._name_of(weight, f"param_groups[{at}]['params'][{place}]"): weight
            for at, group in enumerate(self.optimizer.param_groups)
            for place, weight in enumerate(group["params"])
        }

    def _name_of(self, weight: torch.Tensor, place: str) -> str:
        """Look a name up; the model is walked only when a parameter is new."""
        if weight not in self._names:
            named = self.model.named_parameters()
            self._names = {weight: name for name, weight in named}
            self._names.setdefault(weight, place)
        return self._names[weight]

    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradients that the optimizer would step by, by parameter name."""
        return {
            name: weight.grad
            for name, weight in self.parameters().items()
            if weight.grad is not None
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold beside the model and the optimizer."""
        return {
            "loss_scale": self.loss_scale.state_dict(),
            "phase": self.phase,
            "num_stepped": self.num_stepped,
            "num_skipped": self.num_skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            LossScaleError: It was taken with another kind of loss scale.
            StepError: It is no state of a run.
        """
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise StepError(
                f"the state of a run lacks {', '.join(missing)}; give what "
                "run.state_dict() returned"
            )
        self.loss_scale.load_state_dict(state["loss_scale"])
        self.phase = state["phase"]
        self.num_stepped = int(state["num_stepped"])
        self.num_skipped = int(state["num_skipped"])

    def remove(self) -> None:
        """Take the policy off the model; the run cannot be used afterwards.

        Weights in 16 bits come back in fp32, with every bit that their storage held.
        """
        if self._open_step is not None:
            raise StepError("the run cannot be removed while a step is open; leave it")
        self.applied.remove()
        self._storage.remove()
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
        self.model.zero_grad(set_to_none=True)

    def _count(self, outcome: Stepped | Skipped) -> None:
        if isinstance(outcome, Stepped):
            self.num_stepped += 1
        else:
            self.num_skipped += 1


def prepare(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    policy: Policy,
    *,
    clip_norm: float | None = None,
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
        clip_norm: Largest global norm of the gradients. Default: not clipped.
        loss_scale: Default: what the policy says, or else what its formats need.
        device: Where the model is moved to. Default: where it is.
        phase: The phase to begin in.
        fallback: The format to use instead of one that the device cannot do.

    Raises:
        UnsupportedFormatError: The device cannot do a format of the policy.
        UnmatchedRuleError: A rule matches nothing in the model.
        IslandError: A module cannot be held as the policy says.
        SettingsError: The optimizer cannot be stepped, or is that of another model.
        WeightStorageError: A weight in 16 bits cannot be stored as the policy says.
    """
    refuse_settings(model, optimizer, clip_norm)
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
