"""A watch over the numbers of a run: what underflows, overflows, or does not move.

    with watch(run, schedule=WatchSchedule(every=100)) as watching:
        for x, y in loader:
            with run.step() as step:
                step.backward(loss_fn(model(x), y))
    watching.windows[-1].largest_scale("fp16")

Weights, gradients, the outputs of modules and their gradients are counted by exponent
on the steps that the schedule names. On the others nothing is hooked and one number is
compared. A model in a loop of one's own is watched with its optimizer:

    with watch(model, optimizer=optimizer) as watching: ...

Where several processes train, each window holds the counts of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import nn

from castwise.errors import SettingsError, StepError
from castwise.numerics.operator_call import floating
from castwise.numerics.watch.table import WatchTable, num_ranks
from castwise.numerics.watch.windows import WatchWindow


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchSchedule:
    """Which steps are looked at."""

    every: int = 100
    """Steps from the beginning of a window to that of the next one."""

    samples: int = 1
    """Steps that a window looks at, one after the other."""

    first: int = 0
    """The step at which the first window begins."""

    last: int | None = None
    """The last step that is looked at; none for no end."""

    def __post_init__(self) -> None:
        """Refuse windows that overlap or hold nothing."""
        if not 1 <= self.samples <= self.every or self.first < 0:
            raise SettingsError(
                "a watch needs 1 <= samples <= every and first >= 0, got samples "
                f"{self.samples}, every {self.every}, first {self.first}"
            )

    def place(self, step: int) -> int | None:
        """The place of a step in its window, or none if it is not looked at."""
        if step < self.first or (self.last is not None and step > self.last):
            return None
        place = (step - self.first) % self.every
        return place if place < self.samples else None


@runtime_checkable
class WatchedRun(Protocol):
    """What a run has to offer: `castwise.prepare` returns one."""

    model: nn.Module
    watchers: list[Any]

    def parameters(self) -> dict[str, torch.Tensor]:
        """The weights that are trained, by name."""
        ...


class Watch:
    """A watch over one run; made by `watch`, in force inside its with block."""

    def __init__(
        self,
        model: nn.Module,
        weights: Callable[[], Mapping[str, torch.Tensor]],
        schedule: WatchSchedule,
        *,
        first_step: int = 0,
        is_held: bool = False,
        on_window: Callable[[WatchWindow], object] | None = None,
    ) -> None:
        self.windows: list[WatchWindow] = []
        """Everything that was counted so far."""
        self.schedule = schedule
        self._model, self._weights, self._is_held = model, weights, is_held
        self._on_window = on_window
        self._step = first_step
        self._scale = 1.0
        self._num_skipped = 0
        self._looking = False
        self._first_looked_at = first_step
        self._hooks: list[Any] = []
        self._attach: Callable[[Watch], Callable[[], None]] | None = None
        self._detach: Callable[[], None] | None = None
        self._table: WatchTable | None = None

    def __enter__(self) -> Self:
        if self._attach is not None and self._detach is None:
            self._detach = self._attach(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._unhook()
        if self._detach is not None:
            self._detach()
            self._detach = None

    def begins(self) -> None:
        """Tell that a step begins."""
        place = self.schedule.place(self._step)
        self._looking = place is not None
        if self._looking:
            self._forget()  # what a step left that died of an exception
            if place == 0 or self._table is None:
                self._first_looked_at = self._step
            self._look()

    def gradients_ready(self, scale: float) -> None:
        """Tell that gradients are complete and still hold the loss scale."""
        if not self._looking:
            return
        self._unhook()
        self._scale = scale
        table = self._table
        assert table is not None
        table.see_weights(self._weights())

    def ends(self, *, stepped: bool) -> None:
        """Tell that a step is over, and whether the weights were updated."""
        self._num_skipped += not stepped
        if self._looking:
            self._look_away(stepped=stepped)
        self._step += 1

    def _look(self) -> None:
        if self._table is None:
            self._table = WatchTable(self._model, self._weights())
        self._table.renew()
        for fqn, module in self._table.modules:
            self._hooks.append(module.register_forward_hook(_OutputHook(self, fqn)))

    def see_output(self, fqn: str, output: Any) -> None:
        """Count what a module handed out, and later the gradient of it."""
        table = self._table
        if table is None or not self._looking:
            return
        tensors = (output,) if type(output) is torch.Tensor else floating(output)
        for tensor in tensors:
            if not tensor.is_floating_point():  # integers, and complex numbers
                continue
            table.see("output", fqn, tensor)
            if tensor.requires_grad:
                tensor.register_hook(_GradientHook(self, fqn))  # type: ignore[no-untyped-call]

    def see_output_gradient(self, fqn: str, gradient: torch.Tensor) -> None:
        """Count the gradient of what a module handed out."""
        if self._looking and self._table is not None:
            self._table.see("output_gradient", fqn, gradient)

    def _look_away(self, *, stepped: bool) -> None:
        self._unhook()
        self._looking = False
        table = self._table
        assert table is not None
        if stepped and not self._is_held:
            table.see_updates(self._weights())
        table.count()
        place = self.schedule.place(self._step)
        is_last = self._step == self.schedule.last
        if place == self.schedule.samples - 1 or is_last:
            self._close_window(table)

    def _forget(self) -> None:
        self._unhook()
        if self._table is not None:
            self._table.forget()

    def _close_window(self, table: WatchTable) -> None:
        window = WatchWindow(
            first_step=self._first_looked_at,
            last_step=self._step,
            scale=self._scale,
            num_ranks=num_ranks(),
            num_skipped=self._num_skipped,
            tensors=table.close(self._scale, is_held=self._is_held),
        )
        self._num_skipped = 0
        self.windows.append(window)
        if self._on_window is not None:
            self._on_window(window)

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def watch(
    run_or_model: WatchedRun | nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: WatchSchedule | None = None,
    first_step: int = 0,
    on_window: Callable[[WatchWindow], object] | None = None,
) -> Watch:
    """Watch the numbers of a run, or of a model in a loop of one's own.

    Args:
        run_or_model: What `castwise.prepare` returned, or a model.
        optimizer: For a model: what updates it; its steps are the steps.
        schedule: Which steps are looked at. Default: every 100th.
        first_step: Number of the next step, after a resume.
        on_window: Is given each window when it is complete.

    Raises:
        SettingsError: A model came without its optimizer.
    """
    plan = schedule or WatchSchedule()
    if isinstance(run_or_model, WatchedRun):
        run = run_or_model
        watching = Watch(
            run.model,
            run.parameters,
            plan,
            first_step=first_step,
            is_held=getattr(run, "held", None) is not None,
            on_window=on_window,
        )
        watching._attach = _Runs(run)  # noqa: SLF001 -- made here
        return watching
    if optimizer is None:
        raise SettingsError(
            "a watch over a model needs the optimizer whose steps it follows; give "
            "optimizer=, or watch what cw.prepare returned"
        )
    model = run_or_model
    watching = Watch(
        model,
        lambda: dict(model.named_parameters()),
        plan,
        first_step=first_step,
        is_held=hasattr(optimizer.step, "held_by_castwise"),
        on_window=on_window,
    )
    watching._attach = _Loops(model, optimizer)  # noqa: SLF001 -- made here
    return watching


@dataclass(frozen=True, slots=True)
class _Runs:
    """Follows the steps of a run."""

    run: WatchedRun

    def __call__(self, watching: Watch) -> Callable[[], None]:
        self.run.watchers.append(watching)
        return lambda: self.run.watchers.remove(watching)


@dataclass(frozen=True, slots=True)
class _Loops:
    """Follows a loop that is not ours: a step is over when the optimizer stepped."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __call__(self, watching: Watch) -> Callable[[], None]:
        state = {"open": False}

        def forward(*_: object) -> None:
            if not state["open"] and torch.is_grad_enabled():
                state["open"] = True
                watching.begins()

        def before(*_: object) -> None:
            if not state["open"]:
                raise StepError(
                    "the optimizer stepped without a forward of the watched model; "
                    "watch the model that is trained"
                )
            watching.gradients_ready(1.0)

        def after(*_: object) -> None:
            state["open"] = False
            watching.ends(stepped=True)

        hooks = [
            self.model.register_forward_pre_hook(forward),
            self.optimizer.register_step_pre_hook(before),
            self.optimizer.register_step_post_hook(after),
        ]

        def detach() -> None:
            for hook in hooks:
                hook.remove()

        return detach


@dataclass(frozen=True, slots=True)
class _OutputHook:
    watching: Watch
    fqn: str

    def __call__(self, module: nn.Module, given: Any, output: Any) -> None:
        del module, given
        self.watching.see_output(self.fqn, output)


@dataclass(frozen=True, slots=True)
class _GradientHook:
    watching: Watch
    fqn: str

    def __call__(self, gradient: torch.Tensor) -> None:
        self.watching.see_output_gradient(self.fqn, gradient)
