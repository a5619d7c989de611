"""`castwise kenken solve`: read puzzles, solve them with a checkpoint, draw, check."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from castwise.checkpoints import CheckpointShelf
from castwise.errors import CheckpointError
from castwise.recipes.kenken.decoding import DecodingSettings, Order
from castwise.recipes.kenken.drawing import can_draw_boxes, draw_rich
from castwise.recipes.kenken.exact import Outcome
from castwise.recipes.kenken.notation import read_puzzles
from castwise.recipes.kenken.puzzles import Puzzle
from castwise.recipes.kenken.solver import KIND, Answer, answer, load_solver
from castwise.training.run_folder import newest_run

WRONG = 1


def solve(
    *,
    source: str,
    checkpoint: Path | None,
    runs: Path,
    order: str,
    num_loops: int | None,
) -> int:
    """Solve the puzzles of a file; return 0 when every answer is right, else 1.

    Args:
        source: A file, or `-` for standard input.
        checkpoint: Weights to solve with; None for the best of the newest run.
        runs: Where numbered runs stand.
        order: Name of a decoding order.
        num_loops: Loops of the model; None for as many as the run measured with.

    Raises:
        PuzzleError: If a puzzle is malformed or impossible.
        CheckpointError: If there is no usable checkpoint.
    """
    puzzles = read_puzzles(source)
    path = checkpoint if checkpoint is not None else newest_checkpoint(runs)
    solver = load_solver(path, num_loops=num_loops)
    decoding = DecodingSettings(order=Order(order))
    console = Console(highlight=False)
    answers = answer(solver.predict, puzzles, decoding)
    for number, (puzzle, found) in enumerate(zip(puzzles, answers, strict=True), 1):
        if len(puzzles) > 1:
            console.print(f"Puzzle {number} of {len(puzzles)}")
        show(puzzle, found, console)
    num_right = sum(found.is_right for found in answers)
    if len(answers) > 1:
        console.print(f"{num_right} of {len(answers)} solved with {path}")
    return 0 if num_right == len(answers) else WRONG


def show(puzzle: Puzzle, found: Answer, console: Console) -> None:
    """Draw a filled puzzle and say what the exact solver thinks of it."""
    right = found.solution if found.outcome is Outcome.UNIQUE else None
    console.print(
        draw_rich(
            puzzle,
            found.grid,
            right=right,
            ascii_only=not can_draw_boxes(sys.stdout.encoding),
        )
    )
    console.print(sentence(found))


def sentence(found: Answer) -> str:
    """Say in words whether an answer is right and how hard the puzzle was."""
    effort = f"{found.num_forwards} forward{'s' if found.num_forwards != 1 else ''}"
    proof = {
        Outcome.UNIQUE: f"unique solution proved in {found.num_nodes} trials",
        Outcome.MULTIPLE: "the puzzle has more than one solution",
        Outcome.IMPOSSIBLE: "the puzzle has no solution",
        Outcome.UNKNOWN: "the exact solver gave up before it could decide",
    }[found.outcome]
    word = "Right" if found.is_right else "Wrong"
    return f"{word}: {effort} of the network, no search; {proof}."


def newest_checkpoint(runs: Path) -> Path:
    """Return the best checkpoint of the newest run, or its latest.

    Raises:
        CheckpointError: There is none.
    """
    newest = newest_run(runs)
    if newest is None:
        raise CheckpointError(
            f"Solving needs a checkpoint, and {runs} holds no run; train one with "
            "`castwise train kenken`, or name one with --checkpoint."
        )
    shelf = CheckpointShelf(folder=newest / "checkpoints", kind=KIND)
    found = shelf.best().value or shelf.latest().value
    if found is None:
        raise CheckpointError(
            f"Solving needs a checkpoint, and {newest} holds none; name one with "
            "--checkpoint."
        )
    return found.path
