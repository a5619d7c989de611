"""Puzzles as JSON, for programs: one object, a list of them, or one on each line.

    {"size": 4, "mode": "standard",
     "cages": [{"cells": [[1, 1], [1, 2], [2, 1]], "clue": "6x"}, ...],
     "hints": [[null, null, 3, null], ...]}

Rows and columns count from 1; `mode`, `cages` and `hints` may be missing. Where an
object spans several lines, messages name its first.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from castwise.errors import PuzzleError
from castwise.recipes.kenken.alphabets import Mode
from castwise.recipes.kenken.draft import Draft

if TYPE_CHECKING:
    from collections.abc import Sequence

    from castwise.recipes.kenken.puzzles import Cell, Puzzle

_LONGEST_NUMBER = 12
_SHOWN = 40  # characters of a value that a message repeats


def parse_json(text: str, source: str) -> list[Puzzle]:
    """Read the notation for programs: values one after the other, or in lists."""
    decoder = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)
    puzzles: list[Puzzle] = []
    place = 0
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        line = text.count("\n", 0, place) + 1
        try:
            value, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise PuzzleError(
                f"{source}:{error.lineno}: puzzles must be JSON; got a mistake at "
                f"column {error.colno} ({error.msg}); correct it."
            ) from error
        except (ValueError, RecursionError) as error:
            raise PuzzleError(
                f"{source}:{line}: puzzles must be plain JSON, but {error}; correct it."
            ) from error
        items = value if isinstance(value, list) else [value]
        puzzles += [_parse_object(item, Draft(source, line)) for item in items]
    return puzzles


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that says something twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return result


def _integer(text: str) -> int:
    """Refuse a number that no puzzle can hold."""
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _parse_object(value: object, draft: Draft) -> Puzzle:
    """Read one puzzle from its JSON object."""
    allowed = {"size", "mode", "cages", "hints"}
    if not isinstance(value, dict) or not value.keys() <= allowed:
        draft.refuse(
            "a puzzle is an object of size, mode, cages and hints; got "
            f"{_shown(value)}; use these names."
        )
    size = value.get("size")
    if type(size) is not int:
        draft.refuse(f"a size is a whole number; got {_shown(size)}; give one.")
    draft.read_size(size, draft.line)
    draft.read_mode(value.get("mode", Mode.STANDARD.value), draft.line)
    for cage in _list(draft, value.get("cages", []), "cages"):
        if not isinstance(cage, dict) or cage.keys() != {"cells", "clue"}:
            draft.refuse(
                f"a cage is an object of cells and clue; got {_shown(cage)}; write it "
                "so."
            )
        cells = [_cell(draft, cell) for cell in _list(draft, cage["cells"], "cells")]
        if not isinstance(cage["clue"], str):
            draft.refuse(
                f"a clue is a text such as 12x; got {_shown(cage['clue'])}; put it in "
                "quotes."
            )
        draft.read_clue(cage["clue"].replace(" ", ""), cells, draft.line)
    if value.get("hints") is not None:
        draft.hints = []
        for row in _list(draft, value["hints"], "hints"):
            entries = _list(draft, row, "a row of hints")
            for entry in entries:
                if entry is not None and type(entry) is not int:
                    draft.refuse(
                        "a hint is a whole number, or null for a hidden cell; got "
                        f"{_shown(entry)}; correct it."
                    )
            draft.hints.append(entries)
    return draft.finish()


def _list(draft: Draft, value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        draft.refuse(f"{name} must be a list; got {_shown(value)}; put it in brackets.")
    return value


def _cell(draft: Draft, value: object) -> Cell:
    if not isinstance(value, list) or [type(part) for part in value] != [int, int]:
        draft.refuse(
            f"a cell is [row, column], counted from 1; got {_shown(value)}; write it "
            "so."
        )
    return value[0] - 1, value[1] - 1


def _shown(value: object) -> str:
    """Show a value in a message, cut short."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "something nested too deeply"
    return text if len(text) <= _SHOWN else f"{text[:37]}..."


def puzzles_to_json(puzzles: Sequence[Puzzle]) -> str:
    """Write puzzles in the notation for programs, one on each line."""
    return "".join(json.dumps(_object_of(puzzle)) + "\n" for puzzle in puzzles)


def _object_of(puzzle: Puzzle) -> dict[str, Any]:
    value: dict[str, Any] = {"size": puzzle.size, "mode": puzzle.mode.value}
    if puzzle.cages:
        value["cages"] = [
            {"cells": [[r + 1, c + 1] for r, c in cage.cells], "clue": str(cage)}
            for cage in puzzle.cages
        ]
    if puzzle.hints is not None:
        value["hints"] = [list(row) for row in puzzle.hints]
    return value
