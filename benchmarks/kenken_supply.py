"""Do batches of the KenKen recipe keep its trainer busy?

    python benchmarks/kenken_supply.py                          # small, on this CPU
    python benchmarks/kenken_supply.py --presets small,base --device cuda

For every preset: how fast one thread draws batches, with nothing else to do, and which
share of its step the trainer waits for one. Two tasks take turns, one that draws when a
batch is needed and one that draws two ahead on a thread; both make the same batches.
Sets are small, since a batch costs the same whatever it is drawn from. `--cells` makes
batches smaller, for a preset that this machine is too slow for: share and step are
those of the smaller batch then.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: one thread a process

import torch
from page_tables import markdown

import castwise as cw
from castwise.recipes.kenken.alphabets import parse_mode
from castwise.recipes.kenken.batches import draw_batch
from castwise.recipes.kenken.dataset import generate_puzzle_set
from castwise.recipes.kenken.model import KenKenModel, model_settings
from castwise.recipes.kenken.puzzle_set import Kind, PuzzleSet, Split
from castwise.recipes.kenken.settings import PRESETS, KenKenSettings
from castwise.recipes.kenken.supply import Key, Supply
from castwise.recipes.kenken.task import KenKenTask, mixture_of
from castwise.training.step import Run

NUM_DRAWN = 40
AHEAD = (0, 2)
"""Batches drawn ahead: the rivals."""

COLUMNS = (
    "preset",
    "puzzles a batch",
    "ms to draw one",
    "puzzles/s",
    "ms a step",
    *(f"share waited, {depth} ahead" for depth in AHEAD),
)


def puzzles(settings: KenKenSettings, count: int) -> dict[Key, PuzzleSet]:
    """Make small sets of everything that a preset draws from."""
    return {
        (size, parse_mode(name), kind): generate_puzzle_set(
            size, parse_mode(name), count, 0, Split.TRAIN, kind=kind, workers=1
        )
        for size in settings.sizes
        for name in settings.modes
        for kind in (Kind.KENKEN, Kind.LATIN)
    }


def drawn(
    settings: KenKenSettings, sets: Mapping[Key, PuzzleSet]
) -> tuple[float, float]:
    """Return puzzles of a batch and CPU seconds to draw one, means over many."""
    mixture, count = mixture_of(settings), 0
    for step in range(NUM_DRAWN):  # clues are read once and kept
        draw_batch(sets, mixture, seed=0, step=step)
    began = time.process_time()
    for step in range(NUM_DRAWN):
        count += len(draw_batch(sets, mixture, seed=0, step=NUM_DRAWN + step))
    return count / NUM_DRAWN, (time.process_time() - began) / NUM_DRAWN


@dataclass(kw_only=True)
class Rival:
    """One training, and what its steps took."""

    task: KenKenTask
    """Draws batches, computes losses."""

    run: Run
    """Makes the steps."""

    waited: list[float]
    """Seconds for a batch, step by step."""

    took: list[float]
    """Seconds of the whole step."""

    def step(self, number: int) -> None:
        """Make one step as the trainer makes it."""
        started = time.perf_counter()
        batch = self.task.batch(number)
        self.waited.append(time.perf_counter() - started)
        with self.run.step() as step:
            step.backward(self.task.loss(batch).value)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.took.append(time.perf_counter() - started)

    def share(self) -> float:
        """Return the share of the time waited, over steps that are warm."""
        warm = slice(len(self.took) // 4, None)
        return sum(self.waited[warm]) / sum(self.took[warm])


def rival(
    settings: KenKenSettings,
    sets: Mapping[Key, PuzzleSet],
    device: torch.device,
    num_ahead: int,
) -> Rival:
    """Make one training of the preset in bf16."""
    torch.manual_seed(0)
    model = KenKenModel(model_settings(settings.model)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    run = cw.prepare(model, optimizer, cw.preset("bf16-mixed"), clip_norm=1.0)
    task = KenKenTask(
        run=run,
        model=model,
        supply=Supply(train=sets, validation={}),
        settings=settings,
        device=device,
        num_ahead=num_ahead,
    )
    return Rival(task=task, run=run, waited=[], took=[])


def measured(
    name: str, settings: KenKenSettings, count: int, device: torch.device
) -> tuple[str, ...]:
    """Measure one preset; return a row of the table."""
    sets = puzzles(settings, count)
    per_batch, seconds = drawn(settings, sets)
    rivals = [rival(settings, sets, device, depth) for depth in AHEAD]
    for number in range(settings.num_steps):
        for each in rivals if number % 2 else reversed(rivals):
            each.step(number)
    step = statistics.median(rivals[0].took[settings.num_steps // 4 :])
    return (
        f"`{name}`",
        f"{per_batch:.0f}",
        f"{1e3 * seconds:.1f}",
        f"{per_batch / seconds:,.0f}",
        f"{1e3 * step:.0f}",
        *(f"{each.share():.2%}" for each in rivals),
    )


def main() -> int:
    """Measure every preset that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", default="small")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--cells", type=int, help="cells of a batch")
    parser.add_argument("--puzzles", type=int, default=300, help="of each set")
    parser.add_argument("--device", default="cpu")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in flags.presets.split(","):
        settings = replace(PRESETS[name], num_steps=flags.steps)
        if flags.cells is not None:
            settings = replace(settings, cells_per_step=flags.cells)
        device = torch.device(flags.device)
        rows.append(measured(name, settings, flags.puzzles, device))
    print(markdown(COLUMNS, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
