"""A model prepared to be stepped plainly or in phases, for any recipe.

made = prepare_run(model, optimizer, policy, hybrid=settings, device=device)
task = SomeTask(run=made.run, ...)
Trainer(run=made.run, task=task, stepping=made.stepping(task, averages), ...)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import distributed, nn

from castwise.hybrid import HybridSettings, HybridTrainer
from castwise.hybrid.agreement import Alone, OverProcesses
from castwise.hybrid.stepping import HybridStepping, TaskLoss
from castwise.memory.monitor import MemoryMonitor
from castwise.policy import Policy
from castwise.recipes.hybrid_choice import joined_policy
from castwise.recipes.hybrid_story import SUMMARY, summary_of
from castwise.training.averages import Averages
from castwise.training.journal import Journal
from castwise.training.step import Run, prepare
from castwise.training.stepping import Stepping
from castwise.training.trainer import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRun:
    """A run, and what makes its steps if it is one in phases."""

    run: Run
    """The prepared model."""

    hybrid: HybridTrainer | None
    """What makes the steps of a run in phases."""

    losses: TaskLoss
    """Where such a run asks for losses."""

    def stepping(self, task: Task, averages: Averages) -> Stepping | None:
        """Return what the trainer is to be given; none for plain steps.

        Args:
            task: The recipe's work.
            averages: What the phases are to keep.
        """
        if self.hybrid is None:
            return None
        self.losses.task, self.hybrid.averages = task, averages
        return HybridStepping(self.hybrid, self.losses)

    def tell(self, journal: Journal, num_steps: int) -> None:
        """Write what the phases have cost into the journal, if there were any."""
        if self.hybrid is not None:
            journal.write(SUMMARY, num_steps, summary_of(self.hybrid))


def prepare_run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    policy: Policy,
    *,
    hybrid: HybridSettings | None,
    clip_norm: float | None,
    device: torch.device,
    fallback: str | None,
    monitor: MemoryMonitor,
    num_ranks: int = 1,
) -> PreparedRun:
    """Put a policy on a model, in phases if settings for them are given.

    Args:
        model: Any module tree.
        optimizer: Of its parameters.
        policy: The precision that the flags ask for; phases go over it.
        hybrid: Phases to train in; none for plain steps.
        clip_norm: As in `prepare`.
        device: Where the model is moved to.
        fallback: As in `prepare`.
        monitor: Memory of the device, which phases measure.
        num_ranks: Processes that train the same weights and must decide the same.
    """
    losses = TaskLoss()
    if hybrid is None:
        run = prepare(
            model,
            optimizer,
            policy,
            clip_norm=clip_norm,
            device=device,
            fallback=fallback,
        )
        return PreparedRun(run=run, hybrid=None, losses=losses)
    trainer = HybridTrainer(
        model,
        optimizer,
        losses,
        settings=hybrid,
        policy=joined_policy(hybrid, policy),
        clip_norm=clip_norm,
        device=device,
        fallback=fallback,
        monitor=monitor,
        agreement=OverProcesses(distributed.group.WORLD) if num_ranks > 1 else Alone(),
    )
    return PreparedRun(run=trainer.run, hybrid=trainer, losses=losses)
