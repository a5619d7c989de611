"""A training run that is killed again and again, for `test_killed.py`.

    python killed_run.py FOLDER NUM_KILLS

One process runs to the end in peace. Then children of this process train, each from the
newest checkpoint, and each is killed with SIGKILL at a random instant after it has made
some progress; the last one may finish. Prints what both ended with.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import castwise as cw
from castwise.loss_scale import DynamicScale
from castwise.memory.monitor import MemoryMonitor
from castwise.training.averages import ExponentialAverage
from castwise.training.display import NullDisplay
from castwise.training.journal import Journal, read_journal
from castwise.training.random_state import seed_everything
from castwise.training.schedule import WarmupStableDecay
from castwise.training.trainer import BatchLoss, Task, Trainer, TrainerSettings

NUM_STEPS = 45


class Noisy(Task):
    """Draws random numbers in the forward, and overflows now and then."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.step = 0

    def batch(self, step: int) -> tuple[int, torch.Tensor]:
        """Rows that are a function of the step."""
        lot = torch.Generator().manual_seed(step)
        return step, torch.randn(16, 33, generator=lot)

    def loss(self, batch: tuple[int, torch.Tensor]) -> BatchLoss:
        """A loss in fp16 range, but for every ninth step."""
        step, x = batch
        out = self.model(x).float()
        factor = 1e38 if step % 9 == 5 else 1.0
        loss = (out - x.sum(1, keepdim=True)).pow(2).mean() * factor * factor
        return BatchLoss(value=loss, measures={}, num_units=16)


def trainer_in(folder: Path) -> tuple[Trainer, cw.Run, cw.CheckpointShelf]:
    """A trainer with a checkpoint for every step, from the newest if there is one."""
    seed_everything(5)
    model = nn.Sequential(
        nn.Linear(33, 65), nn.BatchNorm1d(65), nn.Dropout(0.1), nn.Linear(65, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    policy = cw.Policy.parse(
        "castwise: 1\nname: low\nstorage: split\n"
        "default: p=bf16,c=bf16,o=bf16,r=fp32\n"
        "rules:\n  - type: BatchNorm1d\n    precision: p=fp32,c=fp32\n"
    )
    scale = DynamicScale(initial=2.0**20, interval=4)
    run = cw.prepare(model, optimizer, policy, loss_scale=scale, clip_norm=1.0)
    shelf = cw.CheckpointShelf(folder=folder / "checkpoints", kind="killed")
    trainer = Trainer(
        run=run,
        task=Noisy(model),
        schedule=WarmupStableDecay(num_steps=NUM_STEPS, num_warmup=3),
        averages=ExponentialAverage(model, decay=0.9),
        settings=TrainerSettings(
            num_steps=NUM_STEPS, evaluate_every=20, checkpoint_every=1, log_every=5
        ),
        shelf=shelf,
        journal=Journal(folder, tensorboard=False),
        display=NullDisplay(),
        monitor=MemoryMonitor("cpu"),
        facts={},
    )
    stored = shelf.latest().value
    if stored is not None:
        trainer.resume(cw.load_checkpoint(stored.path, kind="killed"))
    return trainer, run, shelf


def digest(value: Any) -> str:
    """A digest of nested values, bit by bit."""
    found = hashlib.sha256()

    def add(each: Any) -> None:
        if isinstance(each, torch.Tensor):
            found.update(str(each.dtype).encode())
            numbers = each.detach().contiguous().flatten()
            found.update(bytes(numbers.view(torch.uint8).tolist()))
        elif isinstance(each, dict):
            for name in sorted(each, key=str):
                found.update(str(name).encode())
                add(each[name])
        elif isinstance(each, (list, tuple)):
            for one in each:
                add(one)
        else:
            found.update(repr(each).encode())

    add(value)
    return found.hexdigest()


def train(folder: Path) -> None:
    """Train to the end, and leave what came out in a file."""
    trainer, run, _ = trainer_in(folder)
    trainer.fit()
    assert run.held is not None
    end = {
        "model": digest(dict(run.model.state_dict())),
        "exact": digest(run.held.fp32_weights(run.model)),
        "optimizer": digest(run.optimizer.state_dict()),
        "run": digest(run.state_dict()),
        "num_skipped": run.num_skipped,
    }
    (folder / "end.json").write_text(json.dumps(end))


def child(folder: Path) -> int:
    """Train in a child; never returns there."""
    number = os.fork()
    if number == 0:
        code = 1
        try:
            train(folder)
            code = 0
        finally:
            os._exit(code)
    return number


def progress(folder: Path) -> int:
    """The number of the newest checkpoint."""
    shelf = cw.CheckpointShelf(folder=folder / "checkpoints", kind="killed")
    steps = [int(path.name.split("-step-")[1].split(".")[0]) for path in shelf.paths()]
    return max(steps, default=0)


def killed(folder: Path, lot: random.Random) -> bool:
    """Let a child make a few steps and kill it; False if it had finished."""
    begun, steps = progress(folder), lot.randint(1, 3)
    number = child(folder)
    while progress(folder) < begun + steps:
        done, _ = os.waitpid(number, os.WNOHANG)
        if done:
            return False
        time.sleep(0.001)
    time.sleep(lot.uniform(0.0, 0.03))
    os.kill(number, signal.SIGKILL)
    _, status = os.waitpid(number, 0)
    return os.WIFSIGNALED(status)


def main() -> None:
    """Train in peace, train under fire, and print both ends."""
    folder, num_kills = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    ends = {}
    for name in ("whole", "killed"):
        (folder / name).mkdir()
    os.waitpid(child(folder / "whole"), 0)
    lot = random.Random(7)
    kills = 0
    while kills < num_kills and killed(folder / "killed", lot):
        kills += 1
    os.waitpid(child(folder / "killed"), 0)
    for name in ("whole", "killed"):
        ends[name] = json.loads((folder / name / "end.json").read_text())
        records = read_journal(folder / name)
        ends[name]["skips"] = [
            [r.step, r.values["because"]] for r in records if r.event == "skip"
        ]
    print(json.dumps({"kills": kills, **ends}))  # noqa: T201 -- read by the test


if __name__ == "__main__":
    main()
