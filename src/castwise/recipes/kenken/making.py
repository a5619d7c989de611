"""`castwise kenken make`: write puzzles, each with one solution, proved."""

from __future__ import annotations

from pathlib import Path

import click

from castwise.checkpoints import replace_file
from castwise.recipes.kenken.alphabets import parse_mode
from castwise.recipes.kenken.dataset import generate_puzzle_set
from castwise.recipes.kenken.notation import puzzles_to_text
from castwise.recipes.kenken.notation_json import puzzles_to_json
from castwise.recipes.kenken.puzzle_set import Split
from castwise.recipes.kenken.puzzles import puzzle_at


def make(
    *, size: int, mode: str, count: int, seed: int, form: str, out: Path | None
) -> int:
    """Write puzzles of the test split, which no run trains on.

    Args:
        size: Rows.
        mode: Name of the alphabet.
        count: How many.
        seed: Another seed, other puzzles.
        form: `text` or `json`.
        out: A file; None for standard output.

    Raises:
        DataError: If so many different puzzles do not exist.
        StorageError: If the file cannot be written.
    """
    made = generate_puzzle_set(size, parse_mode(mode), count, seed, Split.TEST)
    puzzles = [puzzle_at(made, row) for row in range(len(made))]
    text = puzzles_to_json(puzzles) if form == "json" else puzzles_to_text(puzzles)
    if out is None:
        click.echo(text, nl=False)
    else:
        with replace_file(out) as file:
            file.write(text.encode())
    return 0
