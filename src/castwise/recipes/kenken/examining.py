"""`castwise kenken eval`: a checkpoint on the frozen test sets, beside its baselines.

network             the checkpoint alone, cells in the order asked for, no search
legal random        any rank that row and column still allow, cells in random order
fewest first        the same, where the fewest ranks are left first; no model
propagation         the exact solver without a single trial: what pure logic solves
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import castwise
from castwise.checkpoints.durable import replace_file
from castwise.errors import SettingsError
from castwise.recipes.kenken.alphabets import Mode, parse_mode
from castwise.recipes.kenken.decoding import DecodingSettings, Order
from castwise.recipes.kenken.evaluation import EvaluationSettings, evaluate
from castwise.recipes.kenken.frozen_sets import NUM_PUZZLES, SEED, frozen_set
from castwise.recipes.kenken.measures import Rate
from castwise.recipes.kenken.puzzle_set import GENERATOR_VERSION
from castwise.recipes.kenken.solver import load_solver
from castwise.recipes.kenken.solving import newest_checkpoint
from castwise.recipes.kenken.supply import default_folder

if TYPE_CHECKING:
    from rich.console import JustifyMethod

    from castwise.recipes.kenken.batches import PuzzleBatch
    from castwise.recipes.kenken.decoding import Predictor
    from castwise.recipes.kenken.puzzle_set import PuzzleSet

ALL_MODES = tuple(mode.value for mode in Mode)
EMPTY_GRID = ((0.0, 0.0),)
THRESHOLD = 0.999  # cells that are this certain are committed together


@dataclass(frozen=True, kw_only=True, slots=True)
class Examined:
    """One frozen test set: what solves how much of it."""

    size: int
    """Rows of the puzzles."""

    mode: str
    """Their alphabet."""

    digest: str
    """Of the whole set."""

    network: Rate
    """Solved by the checkpoint from the empty grid, without search."""

    forwards: float
    """Forwards of the network per puzzle."""

    legal_random: Rate
    """Solved by legal random filling."""

    fewest_first: Rate
    """Solved by filling where the fewest ranks are left."""

    propagation: Rate
    """Solved by the exact solver without a trial."""

    median_nodes: float
    """Trials of the exact solver, median."""

    most_nodes: float
    """Trials of the exact solver, 99th percentile."""


def evaluate_checkpoint(
    *,
    checkpoint: Path | None,
    runs: Path,
    sizes: Sequence[int] | None,
    modes: Sequence[str],
    num_puzzles: int,
    order: str,
    data: Path | None,
) -> tuple[dict[str, Any], tuple[Examined, ...]]:
    """Examine a checkpoint on frozen test sets.

    Args:
        checkpoint: Weights; None for the best of the newest run.
        runs: Where numbered runs stand.
        sizes: Sizes to examine; None for those that it was trained on, from 4.
        modes: Names of alphabets.
        num_puzzles: How many puzzles of each set, its first ones.
        order: Name of a decoding order.
        data: Folder that keeps the sets; None for the user's cache.

    Returns:
        Facts for the record, and a row for each set.

    Raises:
        CheckpointError: There is no usable checkpoint.
        DataError: A set that was made is not the frozen one.
        SettingsError: More puzzles were asked for than a set has.
    """
    if not 1 <= num_puzzles <= NUM_PUZZLES:
        raise SettingsError(
            f"a frozen test set has {NUM_PUZZLES} puzzles, got --count {num_puzzles}; "
            f"ask for 1 to {NUM_PUZZLES}"
        )
    path = checkpoint if checkpoint is not None else newest_checkpoint(runs)
    solver = load_solver(path)
    chosen = [n for n in solver.settings.sizes if n >= 4] if sizes is None else sizes
    folder = default_folder() if data is None else data
    rows = tuple(
        examine(
            solver.predict,
            frozen_set(size, parse_mode(mode), folder),
            num_puzzles,
            Order(order),
        )
        for size in chosen
        for mode in modes
    )
    facts = {
        "checkpoint_step": solver.step,
        "preset": solver.settings.preset,
        "order": order,
        "threshold": THRESHOLD,
        "num_puzzles": num_puzzles,
        "seed": SEED,
        "generator_version": GENERATOR_VERSION,
        "castwise": castwise.__version__,
        "torch": str(torch.__version__),
        "machine": platform.machine(),
    }
    return facts, rows


def examine(
    predict: Predictor, puzzles: PuzzleSet, num_puzzles: int, order: Order
) -> Examined:
    """Solve the first puzzles of a set by a network and by every baseline."""
    network = _measure(
        predict,
        puzzles,
        num_puzzles,
        DecodingSettings(order=order, threshold=THRESHOLD),
    )
    guess = DecodingSettings(legal=True, temperature=1.0)
    random = DecodingSettings(legal=True, temperature=1.0, order=Order.RANDOM)
    nodes = puzzles.nodes[:num_puzzles]
    return Examined(
        size=puzzles.size,
        mode=puzzles.mode.value,
        digest=puzzles.digest,
        network=network.valid,
        forwards=network.forwards,
        legal_random=_measure(_anything, puzzles, num_puzzles, random).valid,
        fewest_first=_measure(_anything, puzzles, num_puzzles, guess).valid,
        propagation=Rate(hits=int((nodes == 0).sum()), num=num_puzzles),
        median_nodes=float(np.median(nodes)),
        most_nodes=float(np.quantile(nodes, 0.99)),
    )


def _measure(
    predict: Predictor, puzzles: PuzzleSet, num: int, decoding: DecodingSettings
) -> Any:
    settings = EvaluationSettings(
        num_puzzles=num, fills=EMPTY_GRID, decoding=decoding, batch_size=256
    )
    with torch.no_grad():
        return evaluate(predict, [puzzles], settings)[0]


def _anything(batch: PuzzleBatch) -> torch.Tensor:
    """Rate every rank the same: fp32 [B, L, n]."""
    return torch.zeros(*batch.tokens.shape, batch.size)


def write_record(facts: dict[str, Any], rows: Sequence[Examined], path: Path) -> None:
    """Write facts and rows as JSON, rates with their intervals.

    Raises:
        StorageError: The file cannot be written.
    """
    sets = [{name: _plain(v) for name, v in _fields(row)} for row in rows]
    with replace_file(path) as file:
        file.write((json.dumps({**facts, "sets": sets}, indent=1) + "\n").encode())


def _fields(row: Examined) -> Iterator[tuple[str, Any]]:
    return ((each.name, getattr(row, each.name)) for each in fields(row))


def _plain(value: Any) -> Any:
    if not isinstance(value, Rate):
        return value
    low, high = value.interval
    return {"value": value.value, "interval": [low, high], "num": value.num}


def show(rows: Sequence[Examined], console: Console) -> None:
    """Print the table."""
    table = Table(
        title="frozen test sets: puzzles solved from the empty grid",
        caption="random: legal random filling; fewest: fewest ranks left first; logic: "
        "the exact solver without a trial; trials: its median and 99 %",
    )
    names = ("set", "network", "95 %", "forwards", "random", "fewest", "logic")
    for name in (*names, "trials"):
        justify: JustifyMethod = "left" if name == "set" else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        low, high = row.network.interval
        table.add_row(
            f"{row.size} {row.mode}",
            f"{row.network.value:.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{row.forwards:.1f}",
            f"{row.legal_random.value:.3f}",
            f"{row.fewest_first.value:.3f}",
            f"{row.propagation.value:.3f}",
            f"{row.median_nodes:.0f}, {row.most_nodes:.0f}",
        )
    console.print(table)
