"""One plain loop: batches in, steps through `Run`, evidence and checkpoints out.

A recipe gives the trainer a `Task` (batches as a pure function of the step, a loss, an
evaluation). The trainer owns nothing numerical: precision, loss scale, clipping and the
decision to skip live in `step.py`. It owns order: what happens between two steps, what
is written when, and how a run that was killed goes on exactly where it was.

    for step in range(first, num_steps):
        set the learning rate for `step`
        with run.step() as open_step:                     # castwise.training.step
            open_step.backward(task.loss(task.batch(step)).value)
        averages.update()
        log | evaluate | save | leave on a signal
"""

from __future__ import annotations

import signal
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any, final

from torch import Tensor
from torch.profiler import record_function

from castwise.checkpoints import CheckpointShelf
from castwise.errors import ForeignCheckpointError, LossScaleError, SettingsError
from castwise.memory.monitor import MemoryMonitor
from castwise.training.averages import Averages
from castwise.training.curriculum import Transition
from castwise.training.display import Display
from castwise.training.journal import Journal
from castwise.training.random_state import (
    capture_random_states,
    restore_random_states,
)
from castwise.training.resharding import laid_out
from castwise.training.schedule import WarmupStableDecay
from castwise.training.sentinel import RolledBack, Sentinel
from castwise.training.step import Run, Skipped, Stepped
from castwise.training.stepping import Stepping
from castwise.training.strategy import Strategy
from castwise.training.trace_table import DATA, span_of
from castwise.training.unison import first_proposal

if TYPE_CHECKING:
    from castwise.checkpoints.background import Saved

MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerSettings:
    """When the loop does what."""

    num_steps: int
    """Steps of the whole run, counted over every resume."""

    evaluate_every: int
    """Steps of one epoch: it ends with an evaluation and a memory reading."""

    checkpoint_every: int
    """Steps between two checkpoints; the last step always writes one."""

    log_every: int = 10
    """Steps between two lines of the journal."""

    def __post_init__(self) -> None:
        """Refuse counts below one.

        Raises:
            SettingsError: If any count is below 1.
        """
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value < 1:
                raise SettingsError(
                    f"The trainer needs {name} >= 1, got {value}; it counts steps."
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLoss:
    """What a task says about one batch."""

    value: Tensor
    """Scalar loss to descend on."""

    measures: Mapping[str, Tensor]
    """Scalar tensors for the journal, read only when a line is due."""

    num_units: int
    """How many units (cells, tokens) the batch holds, for the rate on the display."""

    samples: Tensor | None = None
    """Loss of each sample, if the task tells: then a comparison knows its noise."""


class Task(ABC):
    """The seam between a recipe and the loop."""

    unit: str = "items"
    """Word for what `BatchLoss.num_units` counts."""

    @abstractmethod
    def batch(self, step: int) -> Any:
        """Return the batch of update `step`: a pure function of the step."""

    @abstractmethod
    def loss(self, batch: Any) -> BatchLoss:
        """Run the model forward on a batch; called inside an open step."""

    def loss_alone(self, batch: Any) -> BatchLoss:
        """Run forward once more in this process alone, to explain a skipped step."""
        return self.loss(batch)

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Measure the model after `step` updates; called with averaged weights."""
        del step
        return {}

    def rate_factor(self, step: int) -> float:
        """Return a factor for the scheduled learning rate of update `step`."""
        del step
        return 1.0

    def end_epoch(
        self, step: int, measures: Mapping[str, float]
    ) -> Sequence[Transition]:
        """End an epoch, as a curriculum does; return the changes of stage."""
        del step, measures
        return ()

    def state_dict(self) -> dict[str, Any]:
        """Return what else a checkpoint must hold, a curriculum for example."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        del state


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    """How the loop ended."""

    num_steps: int
    """Updates made so far, over every resume."""

    finished: bool
    """False when a signal ended the loop early."""

    stopped_by: str | None
    """Name of that signal."""

    train_seconds: float
    """Time inside the loop over every resume, evaluation and checkpoints included."""

    step_seconds: float
    """Median time of one step in this process; NaN when none was made."""


@dataclass(kw_only=True, slots=True)
class _Progress:
    """What changes from step to step."""

    step: int = 0
    num_skipped: int = 0
    seconds_before: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    step_seconds: list[float] = field(default_factory=list)
    data_seconds: list[float] = field(default_factory=list)
    num_units: int = 0
    window_started: float = field(default_factory=time.perf_counter)

    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started


@final
class Trainer:
    """Runs a task to its last step, or to a signal, and can go on from any checkpoint.

    Args:
        run: A prepared model, optimizer and policy.
        task: The recipe's work.
        schedule: Learning-rate factor by step, applied to each group's initial rate.
        averages: Averaged weights for evaluation, or `NoAverages`.
        settings: When what happens.
        shelf: Where checkpoints stand.
        journal: Where every line of evidence goes.
        display: What a person watches.
        monitor: Memory of the device.
        facts: Plain data stored in each checkpoint (settings, versions, formats).
        score: Name of the evaluation measure that ranks checkpoints, larger is better.
        sentinel: Takes bad steps back and promotes modules; none for plain steps.
        stepping: Makes the steps, and keeps the averages, in a way of its own; none
            for plain steps.
        strategy: How the run is spread over processes; each has a trainer, and all
            do the same. Default: one process.
    """

    def __init__(
        self,
        *,
        run: Run,
        task: Task,
        schedule: WarmupStableDecay,
        averages: Averages,
        settings: TrainerSettings,
        shelf: CheckpointShelf,
        journal: Journal,
        display: Display,
        monitor: MemoryMonitor,
        facts: Mapping[str, Any],
        score: str | None = None,
        sentinel: Sentinel | None = None,
        stepping: Stepping | None = None,
        strategy: Strategy | None = None,
    ) -> None:
        if sentinel is not None and stepping is not None:
            raise SettingsError(
                "a sentinel repeats steps that a stepping of another kind makes once; "
                "give the trainer one of them"
            )
        self._run = run
        self._sentinel = sentinel
        self._stepping = stepping
        self._strategy = strategy or Strategy()
        self._task = task
        self._schedule = schedule
        self._averages = averages
        self._settings = settings
        self._saves = self._strategy.saves(shelf)
        self._journal = journal
        self._display = display
        self._monitor = monitor
        self._facts = dict(facts)
        self._score_name = score
        self._score: float | None = None
        self._progress = _Progress()
        self._initial_rates = [float(g["lr"]) for g in run.optimizer.param_groups]

    def resume(self, tree: Mapping[str, Any]) -> None:
        """Continue from the tree of a checkpoint that `fit` wrote.

        Raises:
            ForeignCheckpointError: Its weights do not fit the model; nothing changed.
            LossScaleError: It was written under another kind of loss scale.
        """
        self._refuse_other_weights(tree["model"])
        if self._strategy.is_sharded:
            tree = laid_out(tree, self._run.model, self._run.optimizer)
        self._run.model.load_state_dict(tree["model"])
        self._run.optimizer.load_state_dict(tree["optimizer"])
        self._run.load_state_dict(tree["run"])
        self._averages.load_state_dict(tree["averages"])
        self._task.load_state_dict(tree["task"])
        if self._sentinel is not None and "sentinel" in tree:
            self._sentinel.load_state_dict(tree["sentinel"])
        if self._stepping is not None:
            self._stepping.load_state_dict(tree["stepping"])
        self._strategy.take_not_sent(self._run.model, tree)
        self._restore_random_states(tree["random"])
        position = tree["position"]
        self._progress.step = position["step"]
        self._progress.num_skipped = position["num_skipped"]
        self._progress.seconds_before = position["train_seconds"]
        self._journal.rewind(position["step"])

    def _restore_random_states(self, stored: Any) -> None:
        """Put back the states of this rank; one that was not there begins anew."""
        by_rank = stored if isinstance(stored, list) else [stored]
        rank = self._strategy.ranks.rank
        if rank < len(by_rank):
            restore_random_states(by_rank[rank])

    def _random_states(self) -> Any:
        """Return the random states: of this process, or of every rank in a list."""
        by_rank = self._strategy.gathered(capture_random_states())
        return by_rank[0] if len(by_rank) == 1 else by_rank

    def _refuse_other_weights(self, stored: Mapping[str, Tensor]) -> None:
        held = self._run.model.state_dict()
        for name in sorted(held.keys() | stored.keys()):
            ours = tuple(held[name].shape) if name in held else "nothing"
            theirs = tuple(stored[name].shape) if name in stored else "nothing"
            if ours != theirs:
                raise ForeignCheckpointError(
                    f"The checkpoint fits another model: {name} is {theirs} there and "
                    f"{ours} here; use the version of castwise that wrote it, or start "
                    "a new run."
                )

    def fit(self) -> FitResult:
        """Train to the last step or to a signal; either way a checkpoint stands."""
        self._progress.started = time.perf_counter()
        self._monitor.reset_peak()
        stopped: str | None = None
        with _caught_signals() as caught:
            while self._progress.step < self._settings.num_steps and stopped is None:
                self._one_step()
                stopped = self._agreed_stop(caught)
                self._after_step(stopping=stopped is not None)
            self._tell_saved(self._saves.wait())
        return FitResult(
            num_steps=self._progress.step,
            finished=self._progress.step >= self._settings.num_steps,
            stopped_by=stopped,
            train_seconds=self._progress.seconds(),
            step_seconds=(
                statistics.median(self._progress.step_seconds)
                if self._progress.step_seconds
                else float("nan")
            ),
        )

    def _agreed_stop(self, caught: Sequence[str]) -> str | None:
        """Return the signal to stop for; a signal to one rank stops all at one step."""
        own = caught[0] if caught else None
        return own if self._strategy.ranks.num_ranks == 1 else first_proposal(own)

    def _one_step(self) -> None:
        started = time.perf_counter()
        step = self._progress.step
        factor = self._schedule.factor(step) * self._task.rate_factor(step)
        groups = self._run.optimizer.param_groups
        for group, rate in zip(groups, self._initial_rates, strict=True):
            group["lr"] = rate * factor
        before = self._run.loss_scale.scale
        loss, outcome = self._made(step)
        if isinstance(outcome, Stepped):
            if self._stepping is None:
                self._averages.update()
        elif outcome is not None:
            self._tell_skip(step, outcome)
        scale = self._run.loss_scale.scale
        if scale != before:
            self._journal.write("scale", step + 1, {"scale": scale})
        self._progress.step = step + 1
        self._progress.num_units += loss.num_units
        self._progress.step_seconds.append(time.perf_counter() - started)
        if self._due(self._settings.log_every):
            self._log(loss)

    def _made(
        self, step: int
    ) -> tuple[BatchLoss, Stepped | Skipped | RolledBack | None]:
        """Make a step in the way that this trainer was given."""
        if self._stepping is None:
            plain = self._sentinel is None
            return self._plain_step(step) if plain else self._guarded_step(step)
        made = self._stepping.step(self._batch(step))
        for event in made.events:
            self._journal.write(event.name, step + 1, event.values)
            if event.note:
                self._display.note(event.note)
        if made.events:
            self._display.update(step + 1, self._stepping.values())
        return made.loss, made.outcome

    def _batch(self, step: int) -> Any:
        """Get the batch of a step, and note how long the trainer waited for it."""
        started = time.perf_counter()
        with record_function(span_of(DATA)):
            batch = self._task.batch(step)
        self._progress.data_seconds.append(time.perf_counter() - started)
        return batch

    def _plain_step(self, step: int) -> tuple[BatchLoss, Stepped | Skipped]:
        open_step = self._run.step(again=lambda: self._task.loss_alone(batch).value)
        try:
            with open_step:
                batch = self._batch(step)
                loss = self._task.loss(batch)
                open_step.backward(loss.value)
        except LossScaleError:
            if isinstance(open_step.outcome, Skipped):
                self._tell_skip(step, open_step.outcome)
            raise
        return loss, open_step.outcome

    def _guarded_step(
        self, step: int
    ) -> tuple[BatchLoss, Stepped | Skipped | RolledBack]:
        assert self._sentinel is not None
        batch, losses = self._batch(step), list[BatchLoss]()

        def compute() -> Tensor:
            losses.append(self._task.loss(batch))
            return losses[-1].value

        known = len(self._run.changes)
        outcome = self._sentinel.step(compute)
        for change in self._run.changes[known:]:
            values = {**asdict(change), "after": change.step}
            del values["step"]  # the journal's own word
            self._journal.write("policy", step + 1, values)
            self._display.note(str(change))
        return losses[-1], outcome

    def _tell_skip(self, step: int, outcome: Skipped | RolledBack) -> None:
        self._progress.num_skipped += 1
        names = ("because", "parameter", "op", "module", "stage", "kind", "where")
        all_names = (*names, "scale", "gone_at")
        values: dict[str, Any] = {
            name: getattr(outcome, name, None) for name in all_names
        }
        rank = getattr(outcome, "rank", None)
        if rank is not None:  # all skip, and all know whose rows it was
            values["rank"] = rank
        self._journal.write("skip", step + 1, values)
        self._display.note(f"step {step + 1} skipped: {values['because']}")

    def _after_step(self, *, stopping: bool) -> None:
        last = self._progress.step == self._settings.num_steps
        self._score = None  # only weights that were measured carry a score
        if self._due(self._settings.evaluate_every) or last:
            self._end_epoch()
        if self._due(self._settings.checkpoint_every) or last or stopping:
            self._tell_saved(
                self._saves.begin(self._progress.step, self._tree(), self._score)
            )
        self._tell_saved(self._saves.finished())

    def _tell_saved(self, saved: Sequence[Saved]) -> None:
        """Report checkpoints that were under way and now stand on the disk."""
        for each in saved:
            self._journal.write("saved", each.step, {"checkpoint": each.path.name})

    def _due(self, every: int) -> bool:
        return self._progress.step % every == 0

    def _log(self, loss: BatchLoss) -> None:
        progress = self._progress
        now = time.perf_counter()
        window = max(now - progress.window_started, 1e-9)
        recent = progress.step_seconds[-self._settings.log_every :]
        waited = progress.data_seconds[-len(recent) :]
        mine = {"loss": loss.value.detach(), **loss.measures}
        values: dict[str, str | float] = {
            **self._strategy.means({name: float(each) for name, each in mine.items()}),
            f"{self._task.unit}_per_s": (
                progress.num_units * self._strategy.ranks.num_ranks / window
            ),
            "step_ms": 1e3 * statistics.median(recent),
            "data_share": sum(waited) / sum(recent),
            "learning_rate": float(self._run.optimizer.param_groups[0]["lr"]),
            "scale": float(self._run.loss_scale.scale),
            "skipped": float(progress.num_skipped),
            "memory_mib": self._monitor.now_bytes() / MIB,
            "memory_peak_mib": self._monitor.peak_bytes() / MIB,
            **({} if self._stepping is None else self._stepping.values()),
        }
        progress.num_units = 0
        progress.window_started = now
        self._journal.write("train", progress.step, values)
        self._display.update(progress.step, values)

    def _end_epoch(self) -> None:
        """Evaluate with averaged weights; read memory for training and evaluation."""
        progress = self._progress
        train_peak = self._monitor.peak_bytes()
        if self._stepping is not None:
            train_peak = max(train_peak, self._stepping.peak_bytes())
        self._monitor.reset_peak()
        started = time.perf_counter()
        with self._averages.in_place_of_weights():
            measures = self._strategy.agreed(self._task.evaluate(progress.step))
        if self._score_name is not None:
            self._score = measures.get(self._score_name)
        values = {
            **measures,
            "epoch": float(-(-progress.step // self._settings.evaluate_every)),
            "train_seconds": progress.seconds(),
            "evaluate_seconds": time.perf_counter() - started,
            "train_peak_mib": train_peak / MIB,
            "evaluate_peak_mib": self._monitor.peak_bytes() / MIB,
            "memory_mib": self._monitor.now_bytes() / MIB,
        }
        self._journal.write("epoch", progress.step, values)
        self._display.update(progress.step, measures)
        for change in self._task.end_epoch(progress.step, measures):
            self._journal.write("stage", progress.step, change.record())
            self._display.note(f"step {progress.step}: {change}")
        self._monitor.reset_peak()
        progress.num_units = 0
        progress.window_started = time.perf_counter()

    def _tree(self) -> dict[str, Any]:
        """Return everything that the next process needs, as plain data and tensors."""
        progress = self._progress
        return {
            "model": self._run.model.state_dict(),
            "optimizer": self._run.optimizer.state_dict(),
            "schedule": {
                name: getattr(self._schedule, name)
                for name in self._schedule.__dataclass_fields__
            },
            "run": self._run.state_dict(),
            "averages": self._averages.state_dict(),
            "task": self._task.state_dict(),
            "random": self._random_states(),
            **self._strategy.not_sent(self._run.model),
            **(
                {}
                if self._sentinel is None
                else {"sentinel": self._sentinel.state_dict()}
            ),
            **(
                {}
                if self._stepping is None
                else {"stepping": self._stepping.state_dict()}
            ),
            "position": {
                "step": progress.step,
                "num_skipped": progress.num_skipped,
                "train_seconds": progress.seconds(),
            },
            "facts": self._facts,
        }


@contextmanager
def _caught_signals() -> Iterator[list[str]]:
    """Collect SIGINT and SIGTERM by name; a second one acts at once.

    Outside the main thread Python delivers no signals, and nothing is caught.
    """
    caught: list[str] = []
    before: dict[signal.Signals, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        caught.append(signal.Signals(number).name)
        for which, handler in before.items():
            signal.signal(which, handler)

    for which in (signal.SIGINT, signal.SIGTERM):
        try:
            before[which] = signal.signal(which, note)
        except ValueError:  # not the main thread
            break
    try:
        yield caught
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
