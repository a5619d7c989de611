"""One puzzle as a person thinks of it: cages, clues and hints, checked when it is made.

Cells are (row, column) pairs counted from 0 here; people read and write them counted
from 1. A puzzle that stands has cages that are connected, cover every cell once, and
whose clues can be met by the digits of the mode; whether all of them can be met
together is the exact solver's question.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from castwise.errors import PuzzleError
from castwise.recipes.kenken.alphabets import Mode, digits
from castwise.recipes.kenken.clues import SYMBOLS
from castwise.recipes.kenken.faults import find_faults

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from castwise.recipes.kenken.puzzle_set import PuzzleSet

Cell = tuple[int, int]
Hints = tuple[tuple[int | None, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cage:
    """Cells that share a clue."""

    cells: tuple[Cell, ...]
    """Rows and columns, counted from 0."""

    op: str
    """One of `=`, `+`, `-`, `x`, `/`; `clues.py` says when each holds."""

    target: int
    """What the digits make."""

    def __str__(self) -> str:
        return f"{self.target}{self.op}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Puzzle:
    """A grid to fill, with cages or without."""

    size: int
    """Rows, columns and symbols, 3 to 16."""

    mode: Mode = Mode.STANDARD
    """The alphabet."""

    cages: tuple[Cage, ...] = ()
    """Every cell in one of them, or none at all for a Latin square to complete."""

    hints: Hints | None = None
    """The digit of each revealed cell, None in hidden ones. Default: all hidden."""

    def __post_init__(self) -> None:
        """Refuse what is no puzzle.

        Raises:
            PuzzleError: Naming the first fault.
        """
        for fault in find_faults(self.size, self.mode, self.cages, self.hints):
            raise PuzzleError(fault.sentence)

    @property
    def digits(self) -> list[int]:
        """The digits of the mode, ascending."""
        return [int(digit) for digit in digits(self.size, self.mode)]

    def arrays(self) -> PuzzleArrays:
        """Turn the puzzle into what the solver and the model read."""
        rank = {digit: rank for rank, digit in enumerate(self.digits)}
        cage_id = np.zeros((self.size, self.size), np.uint8)
        for number, cage in enumerate(self.cages):
            for cell in cage.cells:
                cage_id[cell] = number
        hints = np.full((self.size, self.size), -1, np.int8)
        for r, row in enumerate(self.hints or ()):
            for c, digit in enumerate(row):
                if digit is not None:
                    hints[r, c] = rank[digit]
        return PuzzleArrays(
            cage_id=cage_id,
            cage_op=np.array([SYMBOLS.index(c.op) for c in self.cages], np.uint8),
            cage_target=np.array([c.target for c in self.cages], np.int32),
            hints=hints,
        )


class PuzzleArrays(NamedTuple):
    """A puzzle of C cages as arrays."""

    cage_id: NDArray[np.uint8]
    """uint8 [n, n], cage of each cell; zeros without cages."""

    cage_op: NDArray[np.uint8]
    """uint8 [C], operation codes."""

    cage_target: NDArray[np.int32]
    """int32 [C], targets."""

    hints: NDArray[np.int8]
    """int8 [n, n], revealed ranks, -1 in hidden cells."""


def puzzle_at(
    puzzles: PuzzleSet, row: int, revealed: NDArray[np.bool_] | None = None
) -> Puzzle:
    """Take one puzzle out of a set.

    Args:
        puzzles: The set.
        row: Which.
        revealed: bool [n, n], cells of the solution to show as hints. Default: none.

    Returns:
        The puzzle, its cages in the order of the set.
    """
    hints = None
    if revealed is not None:
        shown = puzzles.digits[puzzles.solution[row]]
        hints = tuple(
            tuple(int(d) if show else None for d, show in zip(line, mask, strict=True))
            for line, mask in zip(shown, revealed, strict=True)
        )
    cages = tuple(
        Cage(
            cells=tuple((int(r), int(c)) for r, c in np.argwhere(held == number)),
            op=SYMBOLS[puzzles.cage_op[row, number]],
            target=int(puzzles.cage_target[row, number]),
        )
        for held in (puzzles.cage_id[row],)
        for number in range(puzzles.num_cages[row])
    )
    return Puzzle(size=puzzles.size, mode=puzzles.mode, cages=cages, hints=hints)
