"""A puzzle drawn for people: in a terminal, and as SVG for a report.

Borders between cages are thick, inside a cage thin; the clue stands in the first cell
of its cage and the digit below it. Terminals without box characters get ASCII, where
thin borders are blank, so that cages still stand out:

    +-------+-------+-------+
    |7+             |2-     |
    |   3       4!  |   1   |
    +       +-------+-------+

With the right answer to compare to, wrong cells carry a `!` (and red where there is
colour); revealed cells are bold.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cache
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.text import Text

    from castwise.recipes.kenken.puzzles import Puzzle

    Grid = Sequence[Sequence[int | None]]
    Weights = tuple[int, int, int, int]

_THIN, _THICK = 1, 2
_NARROWEST = 7  # columns of a cell
_SIGNS = {"x": "\u00d7", "/": "\u00f7", "-": "\u2212", "+": "+", "=": ""}
_ASCII_SIGNS = {"x": "x", "/": "/", "-": "-", "+": "+", "=": ""}
_STYLES = {"border": "dim", "clue": "cyan", "hint": "bold", "answer": "green"}
_STYLES["wrong"] = "bold red"


@dataclass(frozen=True, slots=True)
class _Cell:
    """What stands in one cell."""

    clue: str
    digit: str
    kind: str
    """One of hint, answer, wrong."""


def can_draw_boxes(encoding: str | None) -> bool:
    """Say whether a terminal of this encoding has the characters of a drawing."""
    needed = "".join({*_boxes().values(), *_SIGNS.values()})
    try:
        needed.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def draw_text(
    puzzle: Puzzle,
    answer: Grid | None = None,
    *,
    right: Grid | None = None,
    ascii_only: bool = False,
) -> str:
    """Draw a puzzle as plain text.

    Args:
        puzzle: The puzzle.
        answer: Digits to show, None for an open cell. Default: the hints alone.
        right: The solution; digits of the answer that differ are marked.
        ascii_only: Whether to do without box characters.

    Returns:
        Lines, each ended by a newline.
    """
    spans = _draw(puzzle, answer, right, ascii_only=ascii_only)
    return "".join(text for text, _ in spans)


def draw_rich(
    puzzle: Puzzle,
    answer: Grid | None = None,
    *,
    right: Grid | None = None,
    ascii_only: bool = False,
) -> Text:
    """Draw a puzzle in colour, for a rich console; arguments as for `draw_text`."""
    from rich.text import Text  # noqa: PLC0415 -- plain drawings need no rich

    drawing = Text()
    for text, kind in _draw(puzzle, answer, right, ascii_only=ascii_only):
        drawing.append(text, style=_STYLES.get(kind, ""))
    return drawing


def _draw(
    puzzle: Puzzle, answer: Grid | None, right: Grid | None, *, ascii_only: bool
) -> Iterator[tuple[str, str]]:
    """Draw as pieces of text, each with the kind of thing it is."""
    n = puzzle.size
    cells = _cells(puzzle, answer, right, _ASCII_SIGNS if ascii_only else _SIGNS)
    width = max(_NARROWEST, *(len(cell.clue) + 1 for row in cells for cell in row))
    weight = _border_weights(puzzle)
    joint = _ascii_joint if ascii_only else _box_joint
    for r in range(n + 1):
        yield _rule(weight, r, n, width, joint), "border"
        yield "\n", "border"
        if r == n:
            break
        sides = [joint((w, 0, w, 0)) for w in (weight(r, c, 1) for c in range(n + 1))]
        for line in range(2):
            for c in range(n):
                yield sides[c], "border"
                cell = cells[r][c]
                if line == 0:
                    yield cell.clue.ljust(width), "clue"
                else:
                    mark = "!" if cell.kind == "wrong" else " "
                    yield (cell.digit + mark).center(width), cell.kind
            yield sides[n], "border"
            yield "\n", "border"


def _cells(
    puzzle: Puzzle, answer: Grid | None, right: Grid | None, signs: dict[str, str]
) -> list[list[_Cell]]:
    """Lay out what stands in each cell."""

    def written(number: int) -> str:
        return str(number).replace("-", signs["-"])

    clues = {
        min(cage.cells): written(cage.target) + signs[cage.op] for cage in puzzle.cages
    }
    rows = []
    for r in range(puzzle.size):
        row = []
        for c in range(puzzle.size):
            hint = None if puzzle.hints is None else puzzle.hints[r][c]
            digit = hint if answer is None else answer[r][c]
            kind = "answer" if hint is None else "hint"
            if right is not None and digit is not None and digit != right[r][c]:
                kind = "wrong"
            text = "" if digit is None else written(digit)
            row.append(_Cell(clues.get((r, c), ""), text, kind))
        rows.append(row)
    return rows


def _border_weights(puzzle: Puzzle) -> Callable[[int, int, int], int]:
    """Return how thick the border above (0) or left (1) of a cell is."""
    n = puzzle.size
    cage_of = {
        cell: number for number, cage in enumerate(puzzle.cages) for cell in cage.cells
    }

    def weight(r: int, c: int, side: int) -> int:
        before = (r - 1, c) if side == 0 else (r, c - 1)
        if not (0 <= r < n and 0 <= c < n):  # right of or below the grid
            across = c if side == 0 else r
            return _THICK if 0 <= across < n else 0
        if min(before) < 0 or cage_of.get(before) != cage_of.get((r, c)):
            return _THICK
        return _THIN

    return weight


def _rule(
    weight: Callable[[int, int, int], int],
    r: int,
    n: int,
    width: int,
    joint: Callable[[Weights], str],
) -> str:
    """Draw the horizontal line above row r."""
    pieces = []
    for c in range(n + 1):
        up = weight(r - 1, c, 1) if r > 0 else 0
        down = weight(r, c, 1) if r < n else 0
        ahead = weight(r, c, 0) if c < n else 0
        behind = weight(r, c - 1, 0) if c > 0 else 0
        pieces.append(joint((up, ahead, down, behind)))
        if c < n:
            pieces.append(joint((0, ahead, 0, ahead)) * width)
    return "".join(pieces)


def _ascii_joint(arms: Weights) -> str:
    """Draw a crossing in ASCII; thin arms are blank."""
    up, ahead, down, behind = (arm == _THICK for arm in arms)
    if (ahead or behind) and (up or down):
        return "+"
    if ahead or behind:
        return "-"
    return "|" if up or down else " "


def _box_joint(arms: Weights) -> str:
    """Draw a crossing with the box character of these arms."""
    return _boxes()[arms]


@cache
def _boxes() -> dict[Weights, str]:
    """Read the box characters by their arms out of their Unicode names.

    A name gives one weight to all arms (`HEAVY DOWN AND RIGHT`) or one to each group
    (`DOWN LIGHT AND RIGHT UP HEAVY`). Arms are up, right, down, left.
    """
    order: dict[str, tuple[int, ...]] = {
        "UP": (0,),
        "RIGHT": (1,),
        "DOWN": (2,),
        "LEFT": (3,),
    }
    order |= {"VERTICAL": (0, 2), "HORIZONTAL": (1, 3)}
    weights = {"LIGHT": _THIN, "HEAVY": _THICK}
    boxes: dict[Weights, str] = {}
    for code in range(0x2500, 0x2580):
        words = unicodedata.name(chr(code)).removeprefix("BOX DRAWINGS ").split()
        words = [word for word in words if word != "AND"]
        if not {*words} <= {*order, *weights}:
            continue  # dashed, double, rounded, diagonal
        arms = [0, 0, 0, 0]
        if words[0] in weights:
            words = [*words[1:], words[0]]
        waiting: list[int] = []
        for word in words:
            waiting += order.get(word, ())
            if word in weights:
                for arm in waiting:
                    arms[arm] = weights[word]
                waiting = []
        boxes[arms[0], arms[1], arms[2], arms[3]] = chr(code)
    return boxes


_STEP = 56  # SVG units of a cell
_MARGIN = 3
_COLOURS = {"hint": "#111111", "answer": "#1c7c3c", "wrong": "#c62828"}


def draw_svg(
    puzzle: Puzzle, answer: Grid | None = None, *, right: Grid | None = None
) -> str:
    """Draw a puzzle as an SVG element that stands alone.

    Args:
        puzzle: The puzzle.
        answer: Digits to show, None for an open cell. Default: the hints alone.
        right: The solution; digits of the answer that differ are marked.

    Returns:
        The element, to be put into a page or written to a file.
    """
    n = puzzle.size
    side = n * _STEP + 2 * _MARGIN
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}" '
            f'width="{side}" height="{side}" role="img" '
            'font-family="Helvetica, Arial, sans-serif">'
        ),
        f"<title>{escape(_title(puzzle))}</title>",
        f'<rect width="{side}" height="{side}" fill="#ffffff"/>',
    ]
    for r, row in enumerate(_cells(puzzle, answer, right, _SIGNS)):
        for c, cell in enumerate(row):
            parts += _svg_cell(cell, c * _STEP + _MARGIN, r * _STEP + _MARGIN)
    parts += _svg_borders(puzzle)
    return "\n".join([*parts, "</svg>\n"])


def _title(puzzle: Puzzle) -> str:
    kind = "KenKen puzzle" if puzzle.cages else "Latin square"
    return f"{kind}, {puzzle.size} by {puzzle.size}, {puzzle.mode} digits"


def _svg_cell(cell: _Cell, x: int, y: int) -> list[str]:
    parts = []
    if cell.kind == "wrong":
        parts.append(
            f'<rect x="{x}" y="{y}" width="{_STEP}" height="{_STEP}" fill="#fde0de"/>'
        )
    if cell.clue:
        parts.append(
            f'<text x="{x + 5}" y="{y + 15}" font-size="13" fill="#333333">'
            f"{escape(cell.clue)}</text>"
        )
    if cell.digit:
        weight = "bold" if cell.kind == "hint" else "normal"
        parts.append(
            f'<text x="{x + _STEP // 2}" y="{y + _STEP - 13}" font-size="24" '
            f'text-anchor="middle" font-weight="{weight}" '
            f'fill="{_COLOURS[cell.kind]}">{escape(cell.digit)}</text>'
        )
    return parts


def _svg_borders(puzzle: Puzzle) -> list[str]:
    """Draw thin borders first, so that thick ones lie over their ends."""
    n, weight = puzzle.size, _border_weights(puzzle)
    paths: dict[int, list[str]] = {_THIN: [], _THICK: []}
    for r in range(n + 1):
        for c in range(n + 1):
            x, y = c * _STEP + _MARGIN, r * _STEP + _MARGIN
            if c < n:
                paths[weight(r, c, 0)].append(f"M{x} {y}h{_STEP}")
            if r < n:
                paths[weight(r, c, 1)].append(f"M{x} {y}v{_STEP}")
    looks = {_THIN: 'stroke="#b5b5b5" stroke-width="1"'}
    looks[_THICK] = 'stroke="#111111" stroke-width="3" stroke-linecap="square"'
    return [
        f'<path d="{"".join(paths[kind])}" fill="none" {look}/>'
        for kind, look in looks.items()
    ]
