"""Puzzles as text, for people to read and write.

Several puzzles divided by lines of dashes, `#` before a remark:

    size: 4
    mode: standard
    cages:
      a a b b
      a c c d
      e e f d
      g g f h
    clues:
      a 6x
      b 3-
      ...
    hints:
      . . 3 .
      ...

`mode` may be missing (standard), so may `hints`, and for a plain Latin square `cages`
and `clues`. Rows may be written without spaces when every entry is one character.

For programs there is JSON (`notation_json.py`), which is told by its first character.
Rows and columns count from 1 in both. Whatever is wrong is a `PuzzleError` that begins
with the source and the line; nothing else is raised, whatever the text.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from string import ascii_letters
from typing import TYPE_CHECKING

from castwise.errors import PuzzleError, StorageError
from castwise.recipes.kenken.draft import Draft
from castwise.recipes.kenken.notation_json import parse_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from castwise.recipes.kenken.puzzles import Cell, Puzzle

_LABEL = re.compile(r"[A-Za-z][A-Za-z0-9]*")
_DIGIT = re.compile(r"-?[0-9]{1,4}")
_SIZE = re.compile(r"[0-9]{1,4}")
_DIVIDER = re.compile(r"-{3,}")
_HEADER = re.compile(r"([a-z]+)\s*:\s*(.*)")
_HIDDEN = "."


def parse_puzzles(text: str, source: str = "<text>") -> list[Puzzle]:
    """Read every puzzle of a text in either notation.

    Args:
        text: What was written.
        source: Name that messages call it by.

    Returns:
        The puzzles, at least one.

    Raises:
        PuzzleError: Naming source, line and remedy of the first mistake.
    """
    if text.lstrip()[:1] in {"{", "["}:
        puzzles = parse_json(text, source)
    else:
        puzzles = _parse_plain(text, source)
    if not puzzles:
        raise PuzzleError(
            f"{source}:1: a puzzle is needed; got an empty text; write one, or make "
            "one with `castwise kenken make`."
        )
    return puzzles


def read_puzzles(source: str) -> list[Puzzle]:
    """Read every puzzle of a file, or of standard input.

    Args:
        source: A path, or `-` for standard input.

    Returns:
        The puzzles, at least one.
    """
    name = "<stdin>" if source == "-" else source
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PuzzleError(
            f"{name}:1: a puzzle file must be UTF-8 text; got the byte "
            f"{error.object[error.start]:#04x} at offset {error.start}; save it as "
            "UTF-8."
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(
            f"{name} must be a readable puzzle file, but {reason}; check the path."
        ) from error
    return parse_puzzles(text, name)


def _parse_plain(text: str, source: str) -> list[Puzzle]:
    """Read the notation for people."""
    puzzles: list[Puzzle] = []
    lines: list[tuple[int, str]] = []
    for number, line in enumerate([*text.split("\n"), "---"], start=1):
        content = line.partition("#")[0].strip()
        if _DIVIDER.fullmatch(content):
            if lines:
                puzzles.append(_parse_sections(lines, source))
            lines = []
        elif content:
            lines.append((number, content))
    return puzzles


def _parse_sections(lines: list[tuple[int, str]], source: str) -> Puzzle:
    """Read one puzzle from its lines that are not empty."""
    draft = Draft(source=source, line=lines[0][0])
    bodies: dict[str, list[tuple[int, str]]] = {}
    section = ""
    for number, content in lines:
        header = _HEADER.fullmatch(content)
        if header is None and section in {"cages", "clues", "hints"}:
            bodies[section].append((number, content))
            continue
        section = header[1] if header else content[:40]
        if section not in {"size", "mode", "cages", "clues", "hints"}:
            draft.refuse(
                "a part of a puzzle begins with size:, mode:, cages:, clues: or "
                f"hints:; got {section!r}; begin it with one of these.",
                number,
            )
        if section in bodies:
            draft.refuse(
                f"each part may stand once in a puzzle; got {section}: again; remove "
                "one, or divide puzzles by a line of ---.",
                number,
            )
        bodies[section] = [(number, header[2])] if header and header[2] else []
    _read_size_and_mode(draft, bodies)
    _read_cages(draft, bodies)
    _read_hints(draft, bodies)
    return draft.finish()


def _read_size_and_mode(draft: Draft, bodies: dict[str, list[tuple[int, str]]]) -> None:
    for number, content in bodies.get("size", []):
        if _SIZE.fullmatch(content) is None:
            draft.refuse(
                f"a size is a whole number; got {content[:40]!r}; write size: 6.",
                number,
            )
        draft.read_size(int(content), number)
    for number, content in bodies.get("mode", []):
        draft.read_mode(content, number)


def _rows(draft: Draft, body: list[tuple[int, str]], part: str) -> list[list[str]]:
    """Cut the rows of a grid into as many entries as the size says."""
    n = draft.size or 0
    rows = [content.split() for _, content in body]
    for (number, _), row in zip(body, rows, strict=True):
        if len(row) == 1 and len(row[0]) == n:
            row[:] = row[0]
        if len(row) != n:
            draft.refuse(
                f"a row of {part} needs {n} entries; got {len(row)}; write one for "
                "each cell, divided by spaces.",
                number,
            )
    if len(rows) != n:
        draft.refuse(
            f"the {part} need {n} rows; got {len(rows)}; write one for each row of the "
            "grid.",
            body[-1][0] if body else None,
        )
    return rows


def _read_cages(draft: Draft, bodies: dict[str, list[tuple[int, str]]]) -> None:
    """Put the grid of labels and the list of clues together."""
    if "cages" not in bodies and "clues" not in bodies:
        return
    if draft.size is None:
        draft.finish()
    cells: dict[str, list[Cell]] = {}
    rows = _rows(draft, bodies.get("cages", []), "cages")
    for r, row in enumerate(rows):
        for c, label in enumerate(row):
            if _LABEL.fullmatch(label):
                cells.setdefault(label, []).append((r, c))
            elif label != _HIDDEN:
                draft.refuse(
                    "a cage is labelled by a letter, then letters or numbers; got "
                    f"{label[:40]!r}; write a label such as a or b2.",
                    bodies["cages"][r][0],
                )
    for number, content in bodies.get("clues", []):
        label, *clue = content.split()
        if label not in cells:
            draft.refuse(
                f"a clue needs a cage; got the label {label[:40]!r}, which the grid of "
                "cages does not hold or which has a clue already; correct it.",
                number,
            )
        draft.read_clue("".join(clue), cells.pop(label), number)
    if cells:
        label = next(iter(cells))
        draft.refuse(
            f"each cage needs a clue; got none for {label!r}; add a line such as "
            f"`{label} 3+` under clues:.",
            bodies["cages"][cells[label][0][0]][0],
        )


def _read_hints(draft: Draft, bodies: dict[str, list[tuple[int, str]]]) -> None:
    """Read the grid of revealed digits."""
    if "hints" not in bodies or draft.size is None:
        return
    draft.hints = []
    draft.hint_lines = [number for number, _ in bodies["hints"]]
    rows = _rows(draft, bodies["hints"], "hints")
    for number, row in zip(draft.hint_lines, rows, strict=True):
        for entry in row:
            if entry != _HIDDEN and _DIGIT.fullmatch(entry) is None:
                draft.refuse(
                    f"a hint is a digit, or . for a hidden cell; got {entry[:40]!r}; "
                    "correct it.",
                    number,
                )
        draft.hints.append([None if e == _HIDDEN else int(e) for e in row])


def label_cages(puzzle: Puzzle) -> list[str]:
    """Choose a short label for each cage: a, b, ..., z, A, ..., Z, a1, b1, ..."""
    letters = ascii_letters
    return [
        letters[i % len(letters)]
        + (str(i // len(letters)) if i >= len(letters) else "")
        for i in range(len(puzzle.cages))
    ]


def puzzles_to_text(puzzles: Sequence[Puzzle]) -> str:
    """Write puzzles in the notation for people."""
    return "---\n".join(map(_plain, puzzles))


def _plain(puzzle: Puzzle) -> str:
    n = puzzle.size
    lines = [f"size: {n}", f"mode: {puzzle.mode}"]
    labels = label_cages(puzzle)
    if puzzle.cages:
        grid = [[""] * n for _ in range(n)]
        for label, cage in zip(labels, puzzle.cages, strict=True):
            for r, c in cage.cells:
                grid[r][c] = label
        lines += ["cages:", *_aligned(grid), "clues:"]
        lines += [f"  {a} {cage}" for a, cage in zip(labels, puzzle.cages, strict=True)]
    if puzzle.hints is not None:
        shown = [
            [_HIDDEN if d is None else str(d) for d in row] for row in puzzle.hints
        ]
        lines += ["hints:", *_aligned(shown)]
    return "\n".join(lines) + "\n"


def _aligned(grid: list[list[str]]) -> list[str]:
    width = max(len(entry) for row in grid for entry in row)
    return ["  " + " ".join(entry.rjust(width) for entry in row) for row in grid]
