"""What happens between the steps of a Lightning run: journal, display, checkpoints.

The journal's lines are those of castwise's own trainer, so that one report serves both.
Only the first process writes. Checkpoints are saved after the validation that falls on
the same step, so that a run that goes on from one repeats nothing.
"""

from __future__ import annotations

import signal
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

from lightning.pytorch import Callback, LightningModule, Trainer

from castwise.integrations.lightning import CastwisePrecision
from castwise.memory.monitor import MemoryMonitor
from castwise.recipes.language.health import Probe, worst
from castwise.recipes.language.settings import TrainingSettings
from castwise.recipes.soliton_lm.plain_files import ShelfFiles
from castwise.training.display import Display
from castwise.training.journal import Journal
from castwise.training.random_state import restore_random_states
from castwise.training.unison import first_proposal, largest

if TYPE_CHECKING:
    from castwise.checkpoints.background import Saved

MIB = 2**20


@final
class RunCallback(Callback):
    """Keeps the evidence of a run, and its checkpoints.

    Args:
        training: When what is due.
        num_tokens: Of a batch.
        journal: Gets every line.
        display: What a person watches.
        monitor: Memory of the device.
        probe: Watches the propagators.
        precision: The policy in force.
        files: Where checkpoints go.
        tree: The checkpoint that the run goes on from, if any.
        writes: Whether this is the first process, the one that writes.
    """

    def __init__(
        self,
        *,
        training: TrainingSettings,
        num_tokens: int,
        journal: Journal,
        display: Display,
        monitor: MemoryMonitor,
        probe: Probe,
        precision: CastwisePrecision,
        files: ShelfFiles,
        tree: Mapping[str, Any] | None,
        writes: bool,
    ) -> None:
        self._training, self._num_tokens = training, num_tokens
        self._journal, self._display, self._monitor = journal, display, monitor
        self._probe, self._precision, self._files = probe, precision, files
        self._tree, self._writes = tree, writes
        self._seconds_before = 0.0 if tree is None else float(tree["train_seconds"])
        self._skipped_before = 0 if tree is None else int(tree["num_skipped"])
        self._started = self._window_started = time.perf_counter()
        self._step_started = 0.0
        self._step_seconds: list[float] = []
        self._num_skipped = 0
        self._scale = 0.0
        self._train_peak = 0
        self._validation_started = 0.0
        self.stopped_by: str | None = None

    @property
    def train_seconds(self) -> float:
        """Time in the loop over every resume."""
        return self._seconds_before + time.perf_counter() - self._started

    def stop(self, number: int, frame: object) -> None:
        """Note a signal; the step that is running is finished first.

        Raises:
            KeyboardInterrupt: At the second one.
        """
        del frame
        if self.stopped_by is not None:
            raise KeyboardInterrupt
        self.stopped_by = signal.Signals(number).name

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or go on with the random numbers of the checkpoint."""
        if threading.current_thread() is threading.main_thread():
            # Lightning has put its own in place; it puts back what was there before
            for one in (signal.SIGINT, signal.SIGTERM):
                signal.signal(one, self.stop)
        if self._tree is not None:
            stored = self._tree["random"]
            by_rank = stored if isinstance(stored, list) else [stored]
            at = trainer.global_rank
            self._files.strategy.take_not_sent(pl_module, self._tree)
            restore_random_states(by_rank[at if at < len(by_rank) else 0])
        self._monitor.reset_peak()
        self._started = self._window_started = time.perf_counter()
        self._scale = float(self._precision.loss_scale.scale)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the probe look where a line is due."""
        del pl_module, batch, batch_idx
        due = (trainer.global_step + 1) % self._training.log_every == 0
        self._probe.paused = not due
        self._step_started = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write what is due, and save where no validation follows."""
        del outputs, batch, batch_idx
        step = trainer.global_step
        self._step_seconds.append(time.perf_counter() - self._step_started)
        self._tell_skip(step)
        if step % self._training.log_every == 0:
            self._log(step, pl_module)
        self._probe.paused = True
        self.stopped_by = first_proposal(self.stopped_by)
        if self.stopped_by is not None:
            trainer.should_stop = True
        if not self._validates(step):
            self._save(trainer, step)
        self._tell_saved(self._files.reported())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the checkpoint that is under way."""
        del trainer, pl_module
        self._tell_saved(self._files.reported(wait=True))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the peak of training, and let the probe look."""
        del trainer, pl_module
        self._train_peak = self._monitor.peak_bytes()
        self._monitor.reset_peak()
        self._probe.paused = False
        self._validation_started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the line of an epoch; save."""
        self._probe.paused = True
        step = trainer.global_step
        fitting = trainer.state.fn == "fit"
        if fitting and not self._validates(step):
            return  # Lightning measures once more when a run is stopped; it is saved
        measures = dict(getattr(pl_module, "measured"))  # noqa: B009 -- ours, typed as any module
        health = largest(worst(self._probe.read()))
        measures |= {f"validation_{name}": value for name, value in health.items()}
        values = {
            **measures,
            "epoch": float(-(-step // self._training.evaluate_every)),
            "train_seconds": self.train_seconds,
            "evaluate_seconds": time.perf_counter() - self._validation_started,
            "train_peak_mib": self._train_peak / MIB,
            "evaluate_peak_mib": self._monitor.peak_bytes() / MIB,
            "memory_mib": self._monitor.now_bytes() / MIB,
        }
        self._write("epoch", step, values, shown=measures)
        self._monitor.reset_peak()
        self._window_started = time.perf_counter()
        self._step_seconds.clear()
        if fitting:
            self._files.score = -measures["validation_loss"]
            self._save(trainer, step)
            self._files.score = None

    def _validates(self, step: int) -> bool:
        return step % self._training.evaluate_every == 0

    def _save(self, trainer: Trainer, step: int) -> None:
        last = step >= self._training.num_steps
        due = step % self._training.checkpoint_every == 0
        if not (due or last or self.stopped_by is not None):
            return
        self._files.extras = {
            "train_seconds": self.train_seconds,
            "num_skipped": self._skipped_before + self._num_skipped,
            **self._files.strategy.not_sent(trainer.lightning_module),
        }
        trainer.save_checkpoint(f"step-{step}")

    def _tell_saved(self, saved: Sequence[Saved]) -> None:
        """Report checkpoints that were under way and now stand on the disk."""
        for each in saved:
            self._write("saved", each.step, {"checkpoint": each.path.name})

    def _tell_skip(self, step: int) -> None:
        finding = self._precision.last_finding
        if self._precision.num_skipped > self._num_skipped and finding is not None:
            values = {
                "because": str(finding),
                "parameter": getattr(finding, "parameter", None),
                "scale": self._scale,
                "rank": getattr(finding, "rank", None),
            }
            self._write("skip", step, values)
            self._display.note(f"step {step} skipped: {finding}")
        self._num_skipped = self._precision.num_skipped
        scale = float(self._precision.loss_scale.scale)
        if scale != self._scale:
            self._write("scale", step, {"scale": scale})
        self._scale = scale

    def _log(self, step: int, module: LightningModule) -> None:
        recent = self._step_seconds[-self._training.log_every :]
        now = time.perf_counter()
        window = max(now - self._window_started, 1e-9)
        optimizer = module.optimizers()
        assert not isinstance(optimizer, list)
        loss = getattr(module, "last_loss")  # noqa: B009 -- ours, typed as any module
        losses: Any = module.all_gather(loss)  # a call that every process makes
        values = {
            "loss": float(losses.float().mean()),
            **largest(worst(self._probe.read())),
            "tokens_per_s": len(recent) * self._num_tokens / window,
            "step_ms": 1e3 * statistics.median(recent),
            "learning_rate": float(optimizer.param_groups[0]["lr"]),
            "scale": self._scale,
            "skipped": float(self._skipped_before + self._num_skipped),
            "memory_mib": self._monitor.now_bytes() / MIB,
            "memory_peak_mib": self._monitor.peak_bytes() / MIB,
        }
        self._window_started = now
        self._write("train", step, values, shown=values)

    def _write(
        self,
        event: str,
        step: int,
        values: Mapping[str, Any],
        *,
        shown: Mapping[str, Any] | None = None,
    ) -> None:
        if not self._writes:
            return
        self._journal.write(event, step, values)
        if shown is not None:
            self._display.update(step, shown)
