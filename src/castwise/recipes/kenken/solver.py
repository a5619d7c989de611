"""A trained model as a solver of puzzles: puzzles in, grids of digits out.

The network fills a grid and never searches; `exact.py` proves and never guesses. This
room joins the two: what the network says, and whether that is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from castwise.checkpoints import load_checkpoint
from castwise.errors import ForeignCheckpointError
from castwise.recipes.kenken.alphabets import digits
from castwise.recipes.kenken.batches import PuzzleBatch, assemble
from castwise.recipes.kenken.decoding import DecodingSettings, decode, predictor_of
from castwise.recipes.kenken.exact import Outcome, solve
from castwise.recipes.kenken.measures import is_valid
from castwise.recipes.kenken.model import KenKenModel, model_settings
from castwise.recipes.kenken.puzzles import Puzzle
from castwise.recipes.kenken.relations import MODES
from castwise.recipes.kenken.settings import KenKenSettings

if TYPE_CHECKING:
    from castwise.recipes.kenken.decoding import Predictor

KIND = "kenken run"

Grid = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the network said about one puzzle, and what the exact solver says."""

    grid: Grid
    """Digits of the network."""

    solution: Grid | None
    """Digits of a solution; None where there is none or it was not found."""

    outcome: Outcome
    """How many solutions the exact solver found."""

    num_nodes: int
    """Trials of the exact solver: the difficulty."""

    num_forwards: int
    """Forwards of the network."""

    is_right: bool
    """Whether the grid keeps the hints and satisfies rows, columns and cages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Solver:
    """A model ready to solve, in fp32 on the CPU."""

    predict: Predictor
    """From batch to logits of ranks."""

    settings: KenKenSettings
    """Of the run that trained it."""

    step: int
    """Updates that it has had."""


def load_solver(path: Path, *, num_loops: int | None = None) -> Solver:
    """Load the averaged weights of a checkpoint.

    Args:
        path: A checkpoint of `castwise train kenken`.
        num_loops: Loops of the model; None for as many as the run measured with.

    Raises:
        CheckpointError: If the file cannot be used.
    """
    tree = load_checkpoint(path, kind=KIND)
    settings = KenKenSettings.from_description(tree["facts"]["settings"])
    model = KenKenModel(model_settings(settings.model))
    weights = dict(tree["model"])
    weights.update(tree["averages"].get("averages", {}))
    weights = {name: weight.float() for name, weight in weights.items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ForeignCheckpointError(
            f"{path} holds weights of another version of this model; use the version "
            "of castwise that wrote it, or train anew."
        ) from error
    model.eval()
    loops = num_loops if num_loops is not None else settings.num_loops
    return Solver(
        predict=predictor_of(model, loops),
        settings=settings,
        step=tree["position"]["step"],
    )


def answer(
    predict: Predictor, puzzles: Sequence[Puzzle], decoding: DecodingSettings
) -> list[Answer]:
    """Solve puzzles one after another and check each with the exact solver.

    Args:
        predict: The network.
        puzzles: Of any sizes and modes.
        decoding: In which order cells are committed to.
    """
    return [
        _answer_one(predict, puzzle, decoding, index)
        for index, puzzle in enumerate(puzzles)
    ]


@torch.no_grad()
def _answer_one(
    predict: Predictor, puzzle: Puzzle, decoding: DecodingSettings, index: int
) -> Answer:
    batch = as_batch(puzzle)
    decoded = decode(predict, batch, decoding, first_index=index)
    arrays = puzzle.arrays()
    verdict = solve(
        puzzle.mode,
        arrays.cage_id,
        arrays.cage_op,
        arrays.cage_target,
        hints=arrays.hints,
    )
    ranks = (decoded.tokens[0, :, None] == batch.alphabet[0]).int().argmax(dim=-1)
    found = len(verdict.solutions) > 0
    return Answer(
        grid=_grid(puzzle, ranks.numpy()),
        solution=_grid(puzzle, verdict.solutions[0]) if found else None,
        outcome=verdict.outcome,
        num_nodes=verdict.num_nodes,
        num_forwards=int(decoded.num_forwards[0]),
        is_right=bool(is_valid(decoded.tokens, batch)[0]),
    )


def as_batch(puzzle: Puzzle) -> PuzzleBatch:
    """Return a batch of one puzzle whose answer nobody has given."""
    arrays = puzzle.arrays()
    length = puzzle.size**2
    room = max(1, len(puzzle.cages))
    ops, targets = np.zeros((1, room), np.int64), np.zeros((1, room), np.int64)
    ops[0, : len(puzzle.cages)] = arrays.cage_op
    targets[0, : len(puzzle.cages)] = arrays.cage_target
    return assemble(
        modes=np.array([MODES.index(puzzle.mode)]),
        hints=arrays.hints.reshape(1, length).astype(np.int64),
        cage_ids=arrays.cage_id.reshape(1, length).astype(np.int64),
        cage_ops=ops,
        cage_targets=targets,
    )


def _grid(puzzle: Puzzle, ranks: NDArray[Any]) -> Grid:
    """Turn ranks, in reading order or as a square, into digits of the puzzle."""
    values = digits(puzzle.size, puzzle.mode)[ranks.reshape(puzzle.size, puzzle.size)]
    return tuple(tuple(int(value) for value in row) for row in values)
