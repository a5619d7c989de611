"""One open step of a run: losses in, and at its end the one decision that it is for.

It belongs to `Run` in `step.py`, which tells the whole story.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, Self

import torch

from castwise.distributed.gradients import clip, is_step_shared, local_part, unscale
from castwise.errors import SettingsError, StepError
from castwise.fitting import is_sharded
from castwise.loss_scale import NonFinite, NoScale
from castwise.optim.clipping import ByGroup, ByRow, scale_down
from castwise.optim.sweep import gradients_found_finite
from castwise.training.admission import refuse_loss
from castwise.training.outcome import Skipped, Stepped, skipped, writer_of
from castwise.training.replay import (
    Again,
    Explanation,
    explain,
    losses_of,
    on_this_rank,
)
from castwise.training.shortage import is_out_of_memory, shortage
from castwise.training.state_watch import refuse_poisoned_weights, too_large_to_square
from castwise.training.unison import first_proposal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from torch.autograd.graph import Node

    from castwise.training.step import Run


class StepWatcher(Protocol):
    """Who is told of the steps of a run, as one of `run.watchers`."""

    def begins(self) -> None:
        """The step is open and nothing ran in it."""

    def gradients_ready(self, scale: float) -> None:
        """Gradients are complete, and still hold the loss scale."""

    def ends(self, *, stepped: bool) -> None:
        """The weights were updated, or left alone."""


class Step:
    """One open step; made by `run.step()`."""

    def __init__(self, run: Run, again: Again | None = None) -> None:
        self._run = run
        self._again = again
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
        self._run._tape.note_loss(loss)  # noqa: SLF001 -- a run and its step share it
        self._losses.append(loss.detach())
        self._last_node = loss.grad_fn
        # Autocast here would cast the products of backward, in fp32 islands too.
        device_type = self._run.device.type
        off: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if torch.is_autocast_enabled(device_type):
            off = torch.autocast(device_type, enabled=False)
        with off:
            self._run.loss_scale.scaled(loss).backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        if self._used:
            raise StepError("a step is used once; call run.step() for each")
        self._run._open(self)  # noqa: SLF001 -- a run and its step share it
        self._used = True
        region = self._run.region()
        try:
            region.__enter__()
        except BaseException:
            self._run._close()  # noqa: SLF001 -- a run and its step share it
            raise
        self._region = region
        self._run._tape.open(listens=self._again is None)  # noqa: SLF001 -- as above
        for watcher in self._run.watchers:
            watcher.begins()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._region is not None
        region, self._region = self._region, None
        run = self._run
        try:
            region.__exit__(kind, error, trace)
            if error is None:
                self._finish()
        except RuntimeError as failed:
            if is_out_of_memory(failed):
                raise shortage(failed, run) from failed
            raise
        finally:
            run._tape.close()  # noqa: SLF001 -- a run and its step share it
            run._clear_gradients()  # noqa: SLF001 -- as above
            run._close()  # noqa: SLF001 -- as above
            self._last_node = None
        if error is not None and is_out_of_memory(error):
            raise shortage(error, run) from error

    def _finish(self) -> None:
        if not self._losses:
            raise StepError(
                "the step ended without a backward, so there is nothing to step by; "
                "call step.backward(loss) inside the block, not loss.backward()"
            )
        run = self._run
        gradients = run.gradients()
        scale = run.loss_scale.scale
        for watcher in run.watchers:
            watcher.gradients_ready(scale)
        finding, norm = self._checked(gradients)
        loss = float(torch.stack([each.float() for each in self._losses]).sum())
        clipped = False
        if finding is None:
            clipped = self._clipped(gradients, norm)
            finding = too_large_to_square(gradients, norm)
        gradients.clear()
        if finding is None:
            self._update()
            self._outcome = Stepped(
                loss=loss, gradient_norm=norm, clipped=clipped, scale=scale
            )
        else:
            explanation = self._left_alone(finding, scale)
            self._outcome = self._skipped(finding, explanation, loss, scale)
            finding = replace(finding, cause=str(explanation))
        run._count(self._outcome)  # noqa: SLF001 -- as above
        if finding is not None:
            refuse_poisoned_weights(run.parameters())
        run._learn(finding)  # noqa: SLF001 -- as above

    def _checked(
        self, gradients: Mapping[str, torch.Tensor]
    ) -> tuple[NonFinite | None, float]:
        """Unscale; find a gradient that is not finite, or else the global norm.

        Where there is nothing to undo, a finite norm says that every gradient is
        finite, and they are read once instead of twice.
        """
        loss_scale = self._run.loss_scale
        if isinstance(loss_scale, NoScale):
            norm = clip(gradients.values(), None)
            if math.isfinite(norm):
                return None, norm
        finding = unscale(loss_scale, gradients)
        if finding is not None:
            return finding, math.nan
        return None, clip(gradients.values(), None)

    def _clipped(self, gradients: Mapping[str, torch.Tensor], norm: float) -> bool:
        """Clip as the run was told, and say whether a global norm was too large."""
        run = self._run
        how = run.clip_norm
        if not isinstance(how, ByGroup | ByRow):
            if how is None or not norm > how:
                return False
            scale_down([*map(local_part, gradients.values())], norm, how)
            return True
        if any(map(is_sharded, gradients.values())):
            raise SettingsError(
                f"{type(how).__name__} needs whole gradients, and these are cut over "
                "processes; clip by their global norm, clip_norm=<number>"
            )
        return how.clip(run.optimizer.param_groups)

    def _update(self) -> None:
        run = self._run
        run._states.check(run.parameters)  # noqa: SLF001 -- a run and its step share it
        with gradients_found_finite(run.optimizer):
            run.optimizer.step()
        run._states.remember()  # noqa: SLF001 -- as above
        for watcher in run.watchers:
            watcher.ends(stepped=True)

    def _left_alone(self, finding: NonFinite, scale: float) -> Explanation:
        """End a step without an update, and find out why."""
        for watcher in self._run.watchers:
            watcher.ends(stepped=False)  # what is replayed is no step
        self._run._clear_gradients()  # noqa: SLF001 -- as above; the replay needs the room
        if finding.cause:
            return Explanation(note=finding.cause)
        return self._explanation(scale)

    def _explanation(self, scale: float) -> Explanation:
        run = self._run
        tape = run._tape  # noqa: SLF001 -- a run and its step share it
        own = explain(
            tape.losses if self._again is None else losses_of(self._again, tape.rewind),
            model=run.model,
            weights=run.parameters(),
            recorded=[float(each) for each in self._losses],
            scale=scale,
            device=run.device,
            region=run.region(),
        )
        return self._first_of_all(own) if is_step_shared(run.model) else own

    def _first_of_all(self, own: Explanation) -> Explanation:
        """Take the word of the first process on which something went wrong."""
        fine = own.found is None and all(bool(each.isfinite()) for each in self._losses)
        return first_proposal(None if fine else on_this_rank(own)) or own

    def _skipped(
        self, finding: NonFinite, explanation: Explanation, loss: float, scale: float
    ) -> Skipped:
        weight = self._run.parameters()[finding.parameter]
        return skipped(
            finding,
            explanation,
            writer=writer_of(weight, self._last_node),
            loss=loss,
            scale=scale,
        )
