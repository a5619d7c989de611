"""The plain loop: order, evidence, checkpoints, leaving early, going on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import castwise as cw
from castwise.checkpoints import CheckpointShelf
from castwise.errors import ForeignCheckpointError, LossScaleError, SettingsError
from castwise.memory.monitor import MemoryMonitor
from castwise.training.averages import ExponentialAverage
from castwise.training.display import NullDisplay
from castwise.training.journal import Journal, Record, read_journal
from castwise.training.random_state import seed_everything
from castwise.training.schedule import WarmupStableDecay
from castwise.training.trainer import BatchLoss, Task, Trainer, TrainerSettings

STEPS = 12


class Regression(Task):
    """A linear model on random numbers that are a function of the step."""

    unit = "rows"

    def __init__(self, model: nn.Module, *, poison: int | None = None) -> None:
        self.model = model
        self.poison = poison
        self.evaluated: list[int] = []
        self.seen: list[int] = []

    def batch(self, step: int) -> Tensor:
        """Rows of this step."""
        self.seen.append(step)
        rows = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return rows * float("inf") if step == self.poison else rows

    def loss(self, batch: Tensor) -> BatchLoss:
        """Mean squared distance of the outputs to the rows' sums, plus noise."""
        target = batch.sum(dim=1, keepdim=True) + 1e-3 * torch.randn(())
        return BatchLoss(
            value=nn.functional.mse_loss(self.model(batch), target),
            measures={"double": torch.tensor(2.0)},
            num_units=len(batch),
        )

    def evaluate(self, step: int) -> Mapping[str, float]:
        """A score that is best in the middle."""
        self.evaluated.append(step)
        return {"score": -abs(step - 6.0)}

    def state_dict(self) -> dict[str, Any]:
        """Something to restore."""
        return {"evaluated": list(self.evaluated)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put it back."""
        self.evaluated = list(state["evaluated"])


class Made:
    """A trainer with everything around it."""

    def __init__(self, folder: Path, *, poison: int | None = None) -> None:
        seed_everything(3)
        self.model = nn.Linear(3, 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.run = cw.prepare(self.model, self.optimizer, cw.preset("32-true"))
        self.task = Regression(self.model, poison=poison)
        self.shelf = CheckpointShelf(folder=folder / "checkpoints", kind="toy")
        self.journal = Journal(folder, tensorboard=False)
        self.trainer = Trainer(
            run=self.run,
            task=self.task,
            schedule=WarmupStableDecay(num_steps=STEPS, num_warmup=2),
            averages=ExponentialAverage(self.model, decay=0.5),
            settings=TrainerSettings(
                num_steps=STEPS, evaluate_every=6, checkpoint_every=4, log_every=2
            ),
            shelf=self.shelf,
            journal=self.journal,
            display=NullDisplay(),
            monitor=MemoryMonitor("cpu"),
            facts={"answer": 42},
            score="score",
        )

    def records(self, event: str) -> list[Record]:
        """Lines of one event."""
        self.journal.close()
        return [r for r in read_journal(self.journal.path) if r.event == event]


Make = Callable[..., Made]


@pytest.fixture
def make() -> Iterator[Make]:
    """Make trainers whose journals are closed at the end."""
    made: list[Made] = []

    def build(folder: Path, *, poison: int | None = None) -> Made:
        made.append(Made(folder, poison=poison))
        return made[-1]

    yield build
    for each in made:
        each.journal.close()


def test_the_loop_does_everything_when_it_is_due(make: Make, tmp_path: Path) -> None:
    """Batches in order, epochs, checkpoints, the journal's lines."""
    made = make(tmp_path)
    result = made.trainer.fit()
    assert result.finished
    assert result.num_steps == STEPS
    assert made.task.seen == list(range(STEPS))
    assert made.task.evaluated == [6, 12]
    assert [r.step for r in made.records("train")] == [2, 4, 6, 8, 10, 12]
    assert made.records("train")[0].values["double"] == 2.0
    assert [r.step for r in made.records("epoch")] == [6, 12]
    latest = made.shelf.latest().value
    assert latest is not None
    assert latest.step == STEPS
    assert latest.tree["facts"] == {"answer": 42}


def test_only_weights_that_were_measured_carry_a_score(
    make: Make, tmp_path: Path
) -> None:
    """The checkpoints of steps 4 and 8 were never evaluated; 12 was."""
    made = make(tmp_path)
    made.trainer.fit()
    best = made.shelf.best().value
    assert best is not None
    assert (best.step, best.score) == (12, -6.0)


def test_a_resumed_loop_ends_with_the_same_bits(make: Make, tmp_path: Path) -> None:
    """From the checkpoint of step 4, with global random numbers in the loss."""
    whole = make(tmp_path / "whole")
    whole.trainer.fit()
    stored = next(p for p in whole.shelf.paths() if "-step-4." in p.name)
    again = make(tmp_path / "again")
    torch.rand(99)  # another history of the generator
    again.trainer.resume(cw.load_checkpoint(stored, kind="toy"))
    again.trainer.fit()
    assert again.task.seen == list(range(4, STEPS))
    assert torch.equal(again.model.weight, whole.model.weight)
    assert again.task.evaluated == whole.task.evaluated
    for left, right in zip(
        again.optimizer.state.values(), whole.optimizer.state.values(), strict=True
    ):
        assert torch.equal(left["exp_avg_sq"], right["exp_avg_sq"])


def test_a_skipped_step_is_told_and_changes_nothing(make: Make, tmp_path: Path) -> None:
    """A batch of infinities: weights stay, the journal names a parameter."""
    made = make(tmp_path, poison=5)
    made.trainer.fit()
    (skip,) = made.records("skip")
    assert skip.step == 6
    assert skip.values["parameter"] in {"weight", "bias"}
    assert (skip.values["op"], skip.values["stage"]) == ("sum", "forward")
    assert "what an input held" in skip.values["because"]
    assert made.records("train")[-1].values["skipped"] == 1.0
    assert torch.isfinite(made.model.weight).all()


def test_a_signal_finishes_the_step_and_saves(make: Make, tmp_path: Path) -> None:
    """SIGTERM in the middle of step 3: the loop ends after it, with a checkpoint."""
    made = make(tmp_path)
    draw = made.task.batch

    def batch(step: int) -> Tensor:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(step)

    made.task.batch = batch  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGTERM)
    result = made.trainer.fit()
    assert (result.num_steps, result.stopped_by) == (3, "SIGTERM")
    assert not result.finished
    assert signal.getsignal(signal.SIGTERM) is before
    latest = made.shelf.latest().value
    assert latest is not None
    assert latest.step == 3


def test_weights_of_another_model_are_refused_before_anything_changes(
    make: Make,
    tmp_path: Path,
) -> None:
    """The first weight that does not fit is named with both shapes."""
    made = make(tmp_path)
    before = made.model.weight.detach().clone()
    other = {"model": {"weight": torch.zeros(2, 3), "bias": torch.zeros(1)}}
    with pytest.raises(ForeignCheckpointError, match=r"weight is \(2, 3\)"):
        made.trainer.resume(other)
    assert torch.equal(made.model.weight, before)


def test_a_run_that_stops_leaves_its_cause_in_the_journal(
    make: Make, tmp_path: Path
) -> None:
    """The last line says what was wrong, although the loop ended with an error."""
    made = make(tmp_path)
    with torch.no_grad():
        made.model.weight.fill_(float("nan"))
    with pytest.raises(LossScaleError, match="weight 'weight' itself holds NaN"):
        made.trainer.fit()
    (skip,) = made.records("skip")
    assert skip.step == 1
    assert "what the weight weight held" in skip.values["because"]
    assert made.shelf.paths() == [], "no checkpoint of weights that are lost"


def test_counts_below_one_are_refused() -> None:
    """The setting is named."""
    with pytest.raises(SettingsError, match="checkpoint_every"):
        TrainerSettings(num_steps=1, evaluate_every=1, checkpoint_every=0)
