"""A hybrid run as the steps of the plain trainer: its loop, our phases.

    losses = TaskLoss()
    hybrid = HybridTrainer(model, optimizer, losses, settings=settings)
    losses.task = task                      # which may need `hybrid.run` itself
    Trainer(run=hybrid.run, task=task, stepping=HybridStepping(hybrid, losses), ...)

Every change of phase becomes a line of the journal with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from castwise.hybrid.hybrid_trainer import HybridStep, HybridTrainer
from castwise.training.stepping import Event, Made, Stepping
from castwise.training.trainer import BatchLoss, Task


@final
class TaskLoss:
    """The loss of a task, as a hybrid trainer calls it; remembers what the task said.

    Where no gradient is wanted, two losses are going to be compared: then the losses of
    single samples are returned, if the task tells them.
    """

    def __init__(self) -> None:
        self.task: Task | None = None
        self.said: BatchLoss | None = None

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the task's loss of a batch."""
        del model  # the task knows it
        assert self.task is not None, "a task comes before the first step"
        self.said = self.task.loss(batch)
        if self.said.samples is None or torch.is_grad_enabled():
            return self.said.value
        return self.said.samples

    def alone(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of a step that is replayed, in this process alone."""
        del model
        assert self.task is not None, "it has made a step before"
        return self.task.loss_alone(batch).value


@final
class HybridStepping(Stepping):
    """Makes the steps of a trainer in phases.

    Args:
        trainer: Makes them.
        losses: The loss that it was given.
    """

    def __init__(self, trainer: HybridTrainer, losses: TaskLoss) -> None:
        self.trainer = trainer
        self._losses = losses

    def step(self, batch: Any) -> Made:
        """Do what the phase does with a batch."""
        self._losses.said = None
        done = self.trainer.step(batch)
        said = self._losses.said
        if said is None:  # a landing that nothing verifies runs no forward
            said = BatchLoss(value=torch.tensor(done.loss), measures={}, num_units=0)
        return Made(loss=said, outcome=done.outcome, events=self._events(done))

    def values(self) -> Mapping[str, str | float]:
        """Return phase, confidence, and what became of the predictions."""
        found = self.trainer.statistics
        confidence = self.trainer.confidence
        return {
            "phase": self.trainer.phase,
            "confidence": "none" if confidence is None else f"{confidence:.2f}",
            "accepted": f"{found.accepts - found.late_rollbacks}/{found.tries}",
            "credited_steps": found.credited_steps,
        }

    def peak_bytes(self) -> int:
        """Return the highest peak of a phase since this was last asked."""
        return self.trainer.meter.take_peak()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the hybrid run."""
        return self.trainer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.trainer.load_state_dict(state)

    def _events(self, done: HybridStep) -> tuple[Event, ...]:
        """Tell a change of phase; a person hears of predictions only."""
        change = done.transition
        if change is None:
            return ()
        values = {
            "source": change.source,
            "target": change.target,
            "because": change.because,
            "seen_confidence": self.trainer.confidence
            if done.confidence is None
            else done.confidence,
            **self.values(),
        }
        told = "predict" in {change.source, change.target} or (
            change.source == "correct"
        )
        return (Event(name="phase", values=values, note=str(change) if told else ""),)
