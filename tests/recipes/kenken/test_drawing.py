# ruff: noqa: RUF001 -- the drawings hold the signs that people read
from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from castwise.recipes.kenken.alphabets import Mode
from castwise.recipes.kenken.dataset import generate_puzzle_set
from castwise.recipes.kenken.drawing import (
    can_draw_boxes,
    draw_rich,
    draw_svg,
    draw_text,
)
from castwise.recipes.kenken.puzzles import Cage, Puzzle, puzzle_at

PUZZLE = Puzzle(
    size=3,
    mode=Mode.NEGATIVE,
    cages=(
        Cage(cells=((0, 0), (0, 1)), op="+", target=-1),
        Cage(cells=((0, 2), (1, 2)), op="-", target=1),
        Cage(cells=((1, 0), (1, 1), (2, 0), (2, 1)), op="x", target=0),
        Cage(cells=((2, 2),), op="=", target=-1),
    ),
    hints=((-1, None, None), (None, None, None), (None, None, None)),
)
RIGHT = [[-1, 0, 1], [1, -1, 0], [0, 1, -1]]

BOXES = """\
┏━━━━━━━┯━━━━━━━┳━━━━━━━┓
┃−1+    │       ┃1−     ┃
┃  −1   │   0   ┃   1   ┃
┣━━━━━━━┿━━━━━━━╉───────┨
┃0×     │       ┃       ┃
┃   0!  │  −1   ┃   0   ┃
┠───────┼───────╊━━━━━━━┫
┃       │       ┃−1     ┃
┃       │   1   ┃  −1   ┃
┗━━━━━━━┷━━━━━━━┻━━━━━━━┛
"""

ASCII = """\
+---------------+-------+
|-1+            |1-     |
|  -1       0   |   1   |
+---------------+       |
|0x             |       |
|   0!     -1   |   0   |
|               +-------+
|               |-1     |
|           1   |  -1   |
+---------------+-------+
"""


def answer() -> list[list[int | None]]:
    """One cell wrong, one open."""
    return [[-1, 0, 1], [0, -1, 0], [None, 1, -1]]


def test_cages_clues_digits_and_mistakes_are_drawn() -> None:
    """Thick borders between cages, thin ones inside, the clue in the first cell."""
    assert draw_text(PUZZLE, answer(), right=RIGHT) == BOXES
    assert draw_text(PUZZLE, answer(), right=RIGHT, ascii_only=True) == ASCII


def test_hints_alone_are_drawn_without_an_answer() -> None:
    """An unsolved puzzle shows its revealed cells and nothing else."""
    digits = [c for c in draw_text(PUZZLE, ascii_only=True).splitlines()[2] if c > " "]
    assert "".join(digits) == "|-1||"
    assert "!" not in draw_text(PUZZLE)


def test_the_ascii_drawing_needs_no_other_characters() -> None:
    """Every size and mode survives a terminal that knows ASCII alone."""
    for mode in Mode:
        puzzles = generate_puzzle_set(7, mode, 3, 0, "test")
        for k in range(3):
            shown = puzzles.digits[puzzles.solution[k]].tolist()
            text = draw_text(puzzle_at(puzzles, k), shown, ascii_only=True)
            assert text.isascii()
            assert len({len(line) for line in text.splitlines()}) == 1


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", True),
        ("UTF-16", True),
        ("ascii", False),
        ("cp437", False),
        ("latin-1", False),
        ("no such codec", False),
        (None, False),
    ],
)
def test_terminals_without_box_characters_are_recognised(
    encoding: str | None, expected: bool
) -> None:
    """Also those that have some of the characters, but not all."""
    assert can_draw_boxes(encoding) is expected


def test_colours_change_no_character() -> None:
    """The rich drawing is the plain one with styles; the wrong cell is red."""
    drawing = draw_rich(PUZZLE, answer(), right=RIGHT)
    assert drawing.plain == BOXES
    styles = {
        drawing.plain[span.start : span.end].strip(): str(span.style)
        for span in drawing.spans
    }
    assert styles["0!"] == "bold red"
    assert styles["\u22121+"] == "cyan"


def test_a_square_without_cages_has_thin_borders_inside() -> None:
    """A Latin square is a grid with a frame, and wide clues widen the cells."""
    text = draw_text(Puzzle(size=3))
    assert text.splitlines()[3] == "┠───────┼───────┼───────┨"
    everywhere = tuple((r, c) for r in range(9) for c in range(9))
    cage = Cage(cells=everywhere, op="x", target=362880)
    wide = draw_text(Puzzle(size=9, cages=(cage,)))
    assert len(wide.splitlines()[0]) == 9 * (len("362880x") + 1) + 10


def test_the_svg_stands_alone_and_shows_the_same() -> None:
    """Well-formed, nothing fetched, each clue and digit once, the wrong cell marked."""
    text = draw_svg(PUZZLE, answer(), right=RIGHT)
    root = ET.fromstring(text)  # noqa: S314 -- our own text
    assert "href" not in text
    assert "url(" not in text
    space = "{http://www.w3.org/2000/svg}"
    shown = sorted(str(node.text) for node in root.iter(f"{space}text"))
    clues = ["\u22121+", "1\u2212", "0\u00d7", "\u22121"]
    digits = ["\u22121", "0", "1", "0", "\u22121", "0", "1", "\u22121"]
    assert shown == sorted(clues + digits)
    wrong = [n for n in root.iter(f"{space}rect") if n.get("fill") == "#fde0de"]
    assert len(wrong) == 1
    thin, thick = (str(node.get("d")) for node in root.iter(f"{space}path"))
    assert (thin.count("M"), thick.count("M")) == (6, 12 + 6)
    side = float(str(root.get("width")))
    places = [float(str(n.get(k))) for n in root.iter(f"{space}text") for k in "xy"]
    assert 0 < min(places) < max(places) < side


def test_large_puzzles_are_drawn() -> None:
    """A 16x16 square has 16 columns and no character out of place."""
    square = np.add.outer(np.arange(16), np.arange(16)) % 16 + 1
    lines = draw_text(Puzzle(size=16), square.tolist()).splitlines()
    assert len(lines) == 16 * 3 + 1
    assert {len(line) for line in lines} == {16 * 8 + 1}
