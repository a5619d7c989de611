"""A puzzle while it is being read, with the lines that its parts came from.

Both notations fill one of these; when it is finished, whatever is wrong is raised as a
`PuzzleError` that begins with the source and the line to blame.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from castwise.errors import PuzzleError
from castwise.recipes.kenken.alphabets import Mode
from castwise.recipes.kenken.faults import find_faults
from castwise.recipes.kenken.puzzles import Cage, Puzzle

if TYPE_CHECKING:
    from collections.abc import Sequence

    from castwise.recipes.kenken.puzzles import Cell

_CLUE = re.compile(r"(-?[0-9]{1,12})([-+x/=*\u00d7\u00f7\u2212]?)")
_SPELLINGS = {"": "=", "*": "x", "\u00d7": "x", "\u00f7": "/", "\u2212": "-"}


@dataclass(slots=True)
class Draft:
    """A puzzle being read, and the lines that its parts came from."""

    source: str
    line: int
    size: int | None = None
    mode: Mode = Mode.STANDARD
    cages: list[Cage] = field(default_factory=list)
    cage_lines: list[int] = field(default_factory=list)
    hints: list[list[int | None]] | None = None
    hint_lines: list[int] = field(default_factory=list)

    def refuse(self, sentence: str, line: int | None = None) -> NoReturn:
        """Raise a fault with its place in front."""
        raise PuzzleError(f"{self.source}:{line or self.line}: {sentence}")

    def read_size(self, size: int, line: int) -> None:
        """Set the size, refused at once if it is none, for grids depend on it."""
        for fault in find_faults(size, self.mode, (), None):
            self.refuse(fault.sentence, line)
        self.size = size

    def read_clue(self, text: str, cells: Sequence[Cell], line: int) -> None:
        """Add a cage from its clue."""
        match = _CLUE.fullmatch(text)
        if match is None:
            self.refuse(
                "a clue is a target and one of = + - x /, such as 12x or -2/; got "
                f"{text[:40]!r}; write it so.",
                line,
            )
        op = _SPELLINGS.get(match[2], match[2])
        self.cages.append(Cage(cells=tuple(cells), op=op, target=int(match[1])))
        self.cage_lines.append(line)

    def read_mode(self, name: object, line: int) -> None:
        """Set the mode by its name."""
        names = [mode.value for mode in Mode]
        if name not in names:
            self.refuse(
                f"a mode is one of {', '.join(names)}; got {str(name)[:40]!r}; use one "
                "of these.",
                line,
            )
        self.mode = Mode(str(name))

    def finish(self) -> Puzzle:
        """Check what was read and make it a puzzle."""
        if self.size is None:
            self.refuse("a puzzle needs its size; got none; add one, such as size: 6.")
        hints = None if self.hints is None else tuple(map(tuple, self.hints))
        cages = tuple(self.cages)
        for fault in find_faults(self.size, self.mode, cages, hints):
            line = None
            if fault.hint is not None and self.hint_lines:
                line = self.hint_lines[fault.hint[0]]
            elif fault.cage is not None:
                line = self.cage_lines[fault.cage]
            self.refuse(fault.sentence, line)
        return Puzzle(size=self.size, mode=self.mode, cages=cages, hints=hints)
