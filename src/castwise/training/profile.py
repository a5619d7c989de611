"""A profile of a few steps: a trace for the eye, and a short table for the log.

    with profile_steps(run, folder, StepWindow(first=10, num_steps=3)) as profile:
        ...                               # any loop over run.step()
    print(profile.table.text())

Before the window and after it nothing is recorded and no hook stands on the model; a
step then costs two comparisons. Inside, `torch.profiler` runs with shapes and memory,
and each module runs in a span of its name. `trace.json.gz` opens in a browser
(ui.perfetto.dev); `profile.json` and `profile.txt` hold the table (`trace_table`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, final

import torch
from torch.profiler import ProfilerActivity, record_function

from castwise.checkpoints.durable import storage_error
from castwise.errors import PolicyError, SettingsError
from castwise.training.trace_table import (
    UPDATE,
    Promise,
    TraceTable,
    read_trace,
    span_of,
)

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from castwise.training.step import Run

_LOW = ("bf16", "fp16", "fp8_e4m3", "fp8_e5m2")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWindow:
    """Which steps are profiled."""

    first: int = 10
    """Number of the first one, from 0; earlier ones warm kernels and caches up."""

    num_steps: int = 3
    """How many."""

    def __post_init__(self) -> None:
        """Refuse a window without a step.

        Raises:
            SettingsError: If it begins before step 0 or holds no step.
        """
        if self.first < 0 or self.num_steps < 1:
            raise SettingsError(
                "a profile needs a window of at least one step from step 0 on, got "
                f"{self.num_steps} from {self.first}; write for example --profile 10:3"
            )

    @classmethod
    def parse(cls, text: str) -> StepWindow:
        """Read `FIRST:COUNT`.

        Raises:
            SettingsError: The text is no such window.
        """
        first, colon, count = text.partition(":")
        if not (colon and first.strip().isdigit() and count.strip().isdigit()):
            raise SettingsError(
                f"--profile needs FIRST:COUNT, got {text!r}; write for example "
                "--profile 10:3"
            )
        return cls(first=int(first), num_steps=int(count))


def profile_steps(
    run: Run,
    folder: Path,
    window: StepWindow,
    *,
    first_step: int = 0,
    on_table: Callable[[int, TraceTable], None] | None = None,
) -> Profile:
    """Profile a window of the steps of a run.

    Args:
        run: What is stepped.
        folder: Made when the window ends; what stands there is overwritten.
        window: Which steps.
        first_step: Number of the next step, after a resume.
        on_table: Called with the number of steps made and the table, when it is there.
    """
    return Profile(run, folder, window, first_step=first_step, on_table=on_table)


@final
class Profile:
    """Listens to a run, and records in its window; see `profile_steps`."""

    def __init__(
        self,
        run: Run,
        folder: Path,
        window: StepWindow,
        *,
        first_step: int,
        on_table: Callable[[int, TraceTable], None] | None,
    ) -> None:
        self._run, self._folder, self._window = run, folder, window
        self._step = first_step
        self._on_table = on_table
        self._recorder: torch.profiler.profile | None = None
        self._update: Any = None
        self._hooks: list[RemovableHandle] = []
        self._num_recorded = 0
        self.table: TraceTable | None = None
        """What was found; none before the window has ended."""

    def __enter__(self) -> Self:
        """Listen to the run."""
        self._run.watchers.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the run; a window that is open ends here."""
        self._run.watchers.remove(self)
        if self._recorder is not None:
            self._stop()

    def begins(self) -> None:
        """Start to record at the first step of the window."""
        if self._step == self._window.first:
            self._start()

    def gradients_ready(self, scale: float) -> None:
        """Begin the span of the update."""
        del scale
        if self._recorder is not None:
            self._update = record_function(span_of(UPDATE))
            self._update.__enter__()

    def ends(self, *, stepped: bool) -> None:
        """End the span of the update, and the window at its last step."""
        del stepped
        self._step += 1
        if self._recorder is None:
            return
        if self._update is not None:
            self._update.__exit__(None, None, None)
            self._update = None
        self._num_recorded += 1
        if self._num_recorded == self._window.num_steps:
            self._stop()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._run.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        for fqn, module in self._run.model.named_modules():
            self._hooks += _spanned(module, fqn)
        self._num_recorded = 0
        # its library tells standard error of every start and stop
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._recorder = torch.profiler.profile(
            activities=activities, record_shapes=True, profile_memory=True
        )
        self._recorder.start()

    def _stop(self) -> None:
        assert self._recorder is not None
        recorder, self._recorder = self._recorder, None
        recorder.stop()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if not self._num_recorded:
            return
        path = self._folder / "trace.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            recorder.export_chrome_trace(str(path))
            self.table = read_trace(
                path, num_steps=self._num_recorded, promise=promise_of(self._run)
            )
            record = json.dumps(self.table.record(), indent=1)
            (self._folder / "profile.json").write_text(record + "\n")
            (self._folder / "profile.txt").write_text(self.table.text() + "\n")
        except OSError as error:
            raise storage_error("write", path, error) from error
        if self._on_table is not None:
            self._on_table(self._step, self.table)


def promise_of(run: Run) -> Promise:
    """Return what the policy of a run promises: low formats, by module and operator."""
    bound, phase = run.applied.bound, run.phase
    table = bound.policy.operator_table(phase)

    def promised(fqn: str, op: str) -> str | None:
        if table.category(op) != "low":
            return None
        try:
            compute = bound.precision_of(fqn, phase=phase).compute
        except PolicyError:  # of no module: the loss, the update
            return None
        return compute if compute in _LOW else None

    return promised


def _spanned(module: nn.Module, fqn: str) -> list[RemovableHandle]:
    """Run a module in a span of its name."""
    spans: list[Any] = []

    def enter(*_: Any) -> None:
        spans.append(record_function(span_of(fqn)))
        spans[-1].__enter__()

    def leave(*_: Any) -> None:
        if spans:  # a module may be left that was entered before the window
            spans.pop().__exit__(None, None, None)

    return [
        module.register_forward_pre_hook(enter, prepend=True),
        module.register_forward_hook(leave, always_call=True),
    ]
