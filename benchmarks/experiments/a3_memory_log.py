"""A3: the log of a run says in which epoch and phase the memory went up.

A run of three epochs, in a process of its own, is given a spike of 200 MiB in its
second epoch: in training, in the evaluation, or, as the control, not at all. What is
judged is the journal that the trainer wrote, nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

import castwise as cw
from castwise.checkpoints import CheckpointShelf
from castwise.memory.monitor import MemoryMonitor, steady_allocator
from castwise.training.averages import NoAverages
from castwise.training.display import NullDisplay
from castwise.training.journal import Journal, read_journal
from castwise.training.schedule import WarmupStableDecay
from castwise.training.trainer import BatchLoss, Task, Trainer, TrainerSettings
from experiments.contract import Check, Experiment, Results

SPIKE_MIB, STEPS_PER_EPOCH = 200, 6
TRAINING, EVALUATION, NOTHING = "in training", "in evaluation", "nowhere"
FIELDS = ("train_peak_mib", "evaluate_peak_mib", "memory_mib")


@final
class MemoryLog(Experiment):
    """A planted spike, found in the journal."""

    name = "A3"
    question = "Does the log of a run show in which epoch and phase memory went up?"
    arms = (TRAINING, EVALUATION, NOTHING)
    num_seeds = 3
    settings: ClassVar[Mapping[str, Any]] = {
        "spike": SPIKE_MIB,
        "steps": STEPS_PER_EPOCH,
    }

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Run it in a process whose memory nothing else has touched."""
        with tempfile.TemporaryDirectory() as folder:
            home = str(Path(__file__).parents[1])
            command = [sys.executable, "-m", "experiments.a3_memory_log"]
            subprocess.run(
                [*command, arm, str(seed), folder],
                check=True,
                env={**os.environ, "PYTHONPATH": home},
            )
            records = read_journal(Path(folder))
        epochs = [record.values for record in records if record.event == "epoch"]
        return {name: [float(epoch[name]) for epoch in epochs] for name in FIELDS}

    def judge(self, results: Results, limits: Mapping[str, float]) -> list[Check]:
        """Find the spike where it was planted, and nowhere else."""
        least, most = limits["spike_mib"], limits["noise_mib"]
        checks = []
        for arm, field in (
            (TRAINING, "train_peak_mib"),
            (EVALUATION, "evaluate_peak_mib"),
        ):
            runs = [values[field] for values in results[arm].values()]
            rise = min(second - first for first, second, _ in runs)
            left = max(abs(third - first) for first, _, third in runs)
            checks += [
                Check(
                    name=f"MiB by which the second epoch's peak rises, planted {arm}",
                    value=rise,
                    num=len(runs),
                    need=f">= {least:g} in every run",
                    holds=rise >= least,
                ),
                Check(
                    name=f"MiB that the third epoch's peak is off the first's, {arm}",
                    value=left,
                    num=len(runs),
                    need=f"<= {most:g} in every run",
                    holds=left <= most,
                ),
            ]
        quiet = [
            max(values[field]) - min(values[field])
            for arm, field in (
                (NOTHING, "train_peak_mib"),
                (NOTHING, "evaluate_peak_mib"),
                (TRAINING, "evaluate_peak_mib"),
                (EVALUATION, "train_peak_mib"),
            )
            for values in results[arm].values()
        ]
        return [
            *checks,
            Check(
                name="MiB between epochs where nothing was planted, most",
                value=max(quiet),
                num=len(quiet),
                need=f"<= {most:g}",
                holds=max(quiet) <= most,
                control=True,
            ),
        ]


class Spiky(Task):
    """A linear regression that holds a block of memory for a moment."""

    def __init__(self, model: nn.Module, arm: str) -> None:
        self._model = model
        self._arm = arm

    def batch(self, step: int) -> Tensor:
        """Draw the rows of a step; in the middle of the second epoch, hold a block."""
        if self._arm == TRAINING and step == STEPS_PER_EPOCH + STEPS_PER_EPOCH // 2:
            _hold()
        return torch.randn(64, 256, generator=torch.Generator().manual_seed(step))

    def loss(self, batch: Tensor) -> BatchLoss:
        """Return the mean square of the outputs."""
        value = self._model(batch).square().mean()
        return BatchLoss(value=value, measures={}, num_units=len(batch))

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Evaluate; at the end of the second epoch, hold a block."""
        if self._arm == EVALUATION and step == 2 * STEPS_PER_EPOCH:
            _hold()
        with torch.no_grad():
            return {"loss": float(self.loss(self.batch(-1)).value)}


def _hold() -> None:
    """Touch a block of memory and let it go."""
    torch.ones(SPIKE_MIB * 2**20, dtype=torch.uint8)


def main(arm: str, seed: str, folder: str) -> None:
    """Train three epochs under the trainer and leave its journal behind."""
    steady_allocator()
    torch.manual_seed(int(seed))
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
    run = cw.prepare(
        model, torch.optim.AdamW(model.parameters(), lr=1e-3), cw.preset("32-true")
    )
    num_steps = 3 * STEPS_PER_EPOCH
    with Journal(folder, tensorboard=False) as journal:
        Trainer(
            run=run,
            task=Spiky(model, arm),
            schedule=WarmupStableDecay(num_steps=num_steps),
            averages=NoAverages(),
            settings=TrainerSettings(
                num_steps=num_steps,
                evaluate_every=STEPS_PER_EPOCH,
                checkpoint_every=num_steps,
            ),
            shelf=CheckpointShelf(folder=Path(folder) / "checkpoints", kind="spiky"),
            journal=journal,
            display=NullDisplay(),
            monitor=MemoryMonitor("cpu"),
            facts=json.loads("{}"),
        ).fit()


if __name__ == "__main__":
    main(*sys.argv[1:])
