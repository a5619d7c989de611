"""The replay of a skipped step: it runs again under a watch, and says what went wrong.

The losses are computed again from the same inputs and the same random state, in the
precision of the phase, and differentiated without touching a gradient of the model.
Buffers and random states are put back, so that a run goes on as if nothing had been
replayed. A loss that comes out otherwise than before proves nothing, and is not used.

Where a gradient overflowed, the backward is tried again at lower scales, which tells
from which scale on the step would have been fine.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from castwise.errors import StepError
from castwise.numerics.forensics import NonFiniteOperator, told
from castwise.numerics.forensics.origins import Origins
from castwise.numerics.forensics.watched_call import is_finite
from castwise.training.random_state import (
    capture_random_states,
    restore_random_states,
)
from castwise.training.tape import Call

Again = Callable[[], torch.Tensor | Iterable[torch.Tensor]]
Losses = Callable[[Call], Iterator[torch.Tensor]]

_SAME = 1e-3  # kernels that add in any order give almost the same loss again


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """What a replay found out."""

    found: NonFiniteOperator | None = None
    """The first operator to blame."""

    gone_at: float | None = None
    """The highest loss scale, of those tried, at which the step would be finite."""

    note: str = ""
    """Why no operator is named, where none is."""

    rank: int | None = None
    """The process that it happened on, where several step together."""

    def __str__(self) -> str:
        where = "" if self.rank is None else f"on rank {self.rank}: "
        if self.found is None:
            return f"{where}{self.note}"
        if self.gone_at is None:
            return f"{where}{self.found}"
        return f"{where}{self.found}; it is gone at loss scale {self.gone_at:g}"


def explain(
    losses: Losses,
    *,
    model: nn.Module,
    weights: Mapping[str, torch.Tensor],
    recorded: Sequence[float],
    scale: float,
    device: torch.device,
    region: contextlib.AbstractContextManager[None],
) -> Explanation:
    """Run a skipped step again and say what went wrong; never raise.

    Args:
        losses: Computes the losses of the step again, one after the other.
        model: The model that they are of.
        weights: What gradients are taken by.
        recorded: The losses of the step, unscaled.
        scale: The loss scale of the step.
        device: Where it runs.
        region: Puts the precision of the phase into force.
    """
    if _needs_all_processes(model):
        return Explanation(note="a sharded step cannot be replayed by one process")
    attempt = _Attempt(
        losses=losses,
        model=model,
        weights=[each for each in weights.values() if each.requires_grad],
        recorded=recorded,
        scale=scale,
        device=device,
    )
    try:
        with left_alone(model), region, _eager():
            return attempt.explanation()
    except Exception as error:  # noqa: BLE001 -- an explanation must not stop a run
        what = str(error).split("\n", 1)[0].rstrip(".")
        kind = "" if isinstance(error, StepError) else f"{type(error).__name__}: "
        return Explanation(note=f"the step could not be replayed: {kind}{what}")


def on_this_rank(own: Explanation) -> Explanation:
    """Say on which process it happened, for the others."""
    return replace(own, rank=torch.distributed.get_rank())


def losses_of(again: Again, rewind: Callable[[], None]) -> Losses:
    """Turn the computation that a user gave into what `explain` takes.

    Args:
        again: Computes the loss, or the losses one after the other.
        rewind: Puts the random state of the beginning of the step back.
    """

    def losses(_: Call) -> Iterator[torch.Tensor]:
        rewind()
        given = again()
        yield from [given] if isinstance(given, torch.Tensor) else given

    return losses


@dataclass(frozen=True, kw_only=True, slots=True)
class _Attempt:
    """A step that is run again."""

    losses: Losses
    model: nn.Module
    weights: list[torch.Tensor]
    recorded: Sequence[float]
    scale: float
    device: torch.device

    def explanation(self) -> Explanation:
        random_states = capture_random_states()
        origins = Origins(self.model)
        place = -1

        with origins:
            for place, loss in enumerate(self.losses(origins.call)):
                self._refuse_another(loss, place)
                gradients = self._gradients(loss, self.scale)
                if not all(map(is_finite, (loss, *gradients))):
                    found = told(origins.blamed((loss.detach(), *gradients)))
                    break
            else:
                return Explanation(note=self._nothing_found(place + 1))
        del loss, gradients
        if found is None or found.stage != "backward" or self.scale <= 1:
            return Explanation(found=found)
        restore_random_states(random_states)
        return Explanation(found=found, gone_at=self._gone_at(place))

    def _refuse_another(self, loss: torch.Tensor, place: int) -> None:
        """Refuse to draw conclusions from a step that is not the one that failed."""
        now = float(loss.detach())
        then = self.recorded[place] if place < len(self.recorded) else None
        if then is None or not (
            math.isclose(now, then, rel_tol=_SAME)
            or (not math.isfinite(now) and not math.isfinite(then))
        ):
            raise StepError(
                f"loss {place + 1} came out as {now:g} instead of "
                f"{'none' if then is None else format(then, 'g')}"
            )

    def _gradients(
        self, loss: torch.Tensor, scale: float, *, keep: bool = False
    ) -> list[torch.Tensor]:
        """Gradients of a scaled loss; those of the model stay as they are."""
        with torch.autocast(self.device.type, enabled=False):
            factor = torch.full((), scale, dtype=torch.float32, device=loss.device)
            found = torch.autograd.grad(
                loss if scale == 1 else loss * factor,
                self.weights,
                allow_unused=True,
                retain_graph=keep,
            )
        return [each for each in found if each is not None]

    def _gone_at(self, place: int) -> float | None:
        """Halve the scale until the gradients of one loss are finite, by bisection."""
        steps = self.losses(_called)
        loss = next(each for number, each in enumerate(steps) if number == place)

        def fine(halvings: int) -> bool:
            scale = self.scale * 0.5**halvings
            return all(map(is_finite, self._gradients(loss, scale, keep=True)))

        low, high = 0, math.ceil(math.log2(self.scale))
        if not fine(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fine(middle) else (middle, high)
        return self.scale * 0.5**high

    def _nothing_found(self, num_losses: int) -> str:
        if num_losses < len(self.recorded):
            return "the computation given to replay the step has fewer losses than it"
        if num_losses > 1:
            return (
                "every loss has finite gradients by itself: they overflow where they "
                "are added up"
            )
        return (
            "replayed, the gradients are finite: they were written to after the "
            "backward, or a hook changed them"
        )


@contextlib.contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Give back buffers, modes and random states as they were; weights are only read.

    Nothing is written to a weight here, not even the same value: what holds weights in
    16 bits takes a write for a new weight.
    """
    slots = [
        (module._buffers, dict(module._buffers))  # noqa: SLF001 -- by name, with those that are None
        for module in model.modules()
        if module._buffers  # noqa: SLF001 -- as above
    ]
    contents = [(each, each.detach().clone()) for each in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    random_states = capture_random_states()
    try:
        yield
    finally:
        restore_random_states(random_states)
        for module, training in modes:
            module.training = training
        for held, originals in slots:
            held.clear()
            held.update(originals)
        with torch.no_grad():
            for each, kept in contents:
                if not torch.equal(each, kept):
                    each.copy_(kept)


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Run compiled code as it was written, with gradients."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled; it loads slowly
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _called(_: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _needs_all_processes(model: nn.Module) -> bool:
    """Whether a forward or backward of the model talks to other processes."""
    group = torch.distributed
    if not group.is_available() or not group.is_initialized():
        return False
    if group.get_world_size() == 1:
        return False
    sharded = any(hasattr(weight, "device_mesh") for weight in model.parameters())
    synced = any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    return sharded or synced
