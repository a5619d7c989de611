from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castwise.errors import PuzzleError, StorageError
from castwise.recipes.kenken.alphabets import Mode, digits
from castwise.recipes.kenken.dataset import generate_puzzle_set, reveal_mask
from castwise.recipes.kenken.notation import (
    parse_puzzles,
    puzzles_to_text,
    read_puzzles,
)
from castwise.recipes.kenken.notation_json import puzzles_to_json
from castwise.recipes.kenken.puzzle_set import Kind
from castwise.recipes.kenken.puzzles import Cage, Puzzle, puzzle_at

PLAIN = """\
# a remark
size: 3
cages:
  aab
  c c b     # rows with spaces or without
  dde
clues:
  a 3+
  b 2 -
  c 6*
  d 3/
  e 2
hints:
  . . .
  ...
  3..
"""


def test_the_documented_example_is_read() -> None:
    """Remarks, spaces, other signs and missing parts are understood."""
    (puzzle,) = parse_puzzles(PLAIN)
    assert puzzle.size == 3
    assert puzzle.mode is Mode.STANDARD
    assert [str(cage) for cage in puzzle.cages] == ["3+", "2-", "6x", "3/", "2="]
    assert puzzle.cages[1].cells == ((0, 2), (1, 2))
    assert puzzle.hints == ((None,) * 3, (None,) * 3, (3, None, None))
    signs = PLAIN.replace("6*", "6\u00d7").replace("3/", "3\u00f7")
    assert parse_puzzles(signs.replace("2 -", "2\u2212")) == [puzzle]
    assert parse_puzzles(f"---\n{PLAIN}---\n---\n{PLAIN}\n---") == [puzzle, puzzle]
    assert parse_puzzles("\r\n".join(PLAIN.split("\n"))) == [puzzle]


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("n", [3, 6, 7])
def test_made_puzzles_survive_both_notations(n: int, mode: Mode, kind: Kind) -> None:
    """Writing and reading returns equal puzzles, with hints and without."""
    puzzles = generate_puzzle_set(n, mode, 10, 1, "train", kind=kind)
    masks = reveal_mask(0, 0, np.arange(10), n, 0.3)
    made = [puzzle_at(puzzles, k, masks[k] if k % 2 else None) for k in range(10)]
    assert parse_puzzles(puzzles_to_text(made)) == made
    lines = puzzles_to_json(made)
    assert parse_puzzles(lines) == made
    assert len(lines.splitlines()) == 10
    together = json.dumps([json.loads(line) for line in lines.splitlines()], indent=2)
    assert parse_puzzles(together) == made


def test_256_cages_have_labels_enough() -> None:
    """The largest puzzle with the most cages survives both notations."""
    square = np.add.outer(np.arange(16), np.arange(16)) % 16
    shown = digits(16, Mode.NEGATIVE)[square]
    cages = tuple(
        Cage(cells=(cell,), op="=", target=int(shown[cell]))
        for cell in np.ndindex(16, 16)
    )
    puzzle = Puzzle(size=16, mode=Mode.NEGATIVE, cages=cages)
    assert parse_puzzles(puzzles_to_text([puzzle])) == [puzzle]
    assert parse_puzzles(puzzles_to_json([puzzle])) == [puzzle]


@pytest.mark.parametrize(
    ("old", "new", "line", "sentence"),
    [
        ("size: 3", "size: 33", 2, "size in 3..16; got 33"),
        ("size: 3", "size: three", 2, "a size is a whole number; got 'three'"),
        ("size: 3", "mode: standard", 2, "a puzzle needs its size; got none"),
        ("size: 3", "size: 3\nmode: hex", 3, "standard, zero, negative; got 'hex'"),
        ("size: 3", "size: 3\nsize: 3", 3, "got size: again"),
        ("size: 3", "colour: 3", 2, "got 'colour'"),
        ("  aab", "  aabb", 4, "a row of cages needs 3 entries; got 1"),
        ("  aab", "  a ? b", 4, "labelled by a letter"),
        ("  aab", "  . a b", 8, "needs two cells or more"),
        ("  dde\n", "", 5, "the cages need 3 rows; got 2"),
        ("  a 3+", "  a 9+", 8, "make the clue 9+"),
        ("  a 3+", "  a 3%", 8, "got '3%'"),
        ("  a 3+", "  z 3+", 8, "the label 'z'"),
        ("  a 3+\n", "", 4, "each cage needs a clue; got none for 'a'"),
        ("  b 2 -", "  b 2 -\n  b 2 -", 10, "has a clue already"),
        ("  3..", "  3x.", 16, "got 'x'"),
        ("  3..", "  4..", 16, "one of the digits 1 2 3; got 4"),
        ("  3..", "  3.3", 16, "3 twice in row 3"),
        ("  3..", "  2..", 16, "agree with the clue 3/"),
    ],
)
def test_mistakes_are_named_with_their_line(
    old: str, new: str, line: int, sentence: str
) -> None:
    """Source, line, need, got and remedy stand in one sentence."""
    assert PLAIN.count(old) == 1
    with pytest.raises(PuzzleError) as raised:
        parse_puzzles(PLAIN.replace(old, new), "my.txt")
    message = str(raised.value)
    assert sentence in message
    assert message.split(":")[:2] == ["my.txt", str(line)]
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "x:1: a puzzle is needed; got an empty text"),
        ("# only a remark\n---\n", "x:1: a puzzle is needed"),
        ("[]", "x:1: a puzzle is needed"),
        ("\n\n[1]", "x:3: a puzzle is an object"),
        ('{"size": 3}\n{"size": }', "x:2: puzzles must be JSON; got a mistake at col"),
        ('{"size": 3, "size": 4}', "a name stands twice"),
        ('{"size": 3.0}', "a size is a whole number; got 3.0"),
        ('{"size": true}', "a size is a whole number; got true"),
        ('{"size": 3, "colour": 1}', "use these names"),
        ('{"size": 3, "mode": ["zero"]}', "a mode is one of"),
        ('{"size": 3, "cages": 3}', "cages must be a list; got 3"),
        ('{"size": 3, "cages": [{"cells": [[1, 1]]}]}', "an object of cells and clue"),
        (
            '{"size": 3, "cages": [{"cells": [[1]], "clue": "1"}]}',
            r"a cell is [row, column], counted from 1; got [1]",
        ),
        (
            '{"size": 3, "cages": [{"cells": [[0, 1]], "clue": "1"}]}',
            "got row 0, column 1",
        ),
        ('{"size": 3, "cages": [{"cells": [[1, 1]], "clue": 1}]}', "put it in quotes"),
        (
            '{"size": 3, "cages": [{"cells": [[1, 1], [1, 1]], "clue": "2+"}]}',
            "a second time",
        ),
        ('{"size": 3, "hints": [[1.5]]}', "or null for a hidden cell; got 1.5"),
        ('{"size": ' + "9" * 5000 + "}", "a number has 5000 digits"),
        ("[" * 100_000, "x:1: puzzles must be"),
    ],
)
def test_mistakes_in_json_are_named(text: str, sentence: str) -> None:
    """Also what json reads without complaint: repeated names, floats, booleans."""
    with pytest.raises(PuzzleError) as raised:
        parse_puzzles(text, "x")
    assert sentence in str(raised.value)


PIECES = st.sampled_from(
    [
        *("size: 3\n", "size: 4", "mode: zero\n", "mode:", "cages:\n", "clues:\n"),
        *("hints:\n", "aab\nccb\ndde\n", "a a b\n", "a 3+\n", "b 2-\nc 6x\n"),
        *("---\n", "#", "\n", " ", "e 2\n", "-1", "0x", "9" * 20, "\u00d7", "\ud800"),
        *('{"size": 3}', "{", "}", "[", "]", '"cages": ', '"hints": ', ",", "null"),
        *('{"size": 3, "cages": [', '{"cells": [[1, 1]], "clue": "3="}'),
        *("1e999", "NaN", ". . .\n"),
    ]
)


def outcome_of(text: str) -> list[Puzzle] | str:
    """Parse a text that may be anything; a refusal is its sentence."""
    try:
        return parse_puzzles(text, "fuzz")
    except PuzzleError as error:
        return str(error)


@settings(max_examples=2000, deadline=None)
@given(st.one_of(st.lists(PIECES, max_size=14).map("".join), st.text(max_size=80)))
def test_no_text_raises_anything_else(text: str) -> None:
    """Whatever is written, it is puzzles or one clear sentence."""
    outcome = outcome_of(text)
    if isinstance(outcome, str):
        assert outcome.startswith("fuzz:")
    else:
        assert parse_puzzles(puzzles_to_text(outcome)) == outcome


@settings(max_examples=1500, deadline=None)
@given(
    st.integers(0, len(PLAIN) - 1),
    st.integers(0, 6),
    st.text(alphabet="abcde 0123-+x/=.:#\n{[", max_size=4),
)
def test_no_edit_of_a_sound_file_raises_anything_else(
    place: int, removed: int, added: str
) -> None:
    """Deleting and inserting a few characters anywhere gives puzzles or a sentence."""
    text = PLAIN[:place] + added + PLAIN[place + removed :]
    outcome = outcome_of(text)
    if isinstance(outcome, str):
        assert outcome.startswith("fuzz:")
    else:
        assert parse_puzzles(puzzles_to_json(outcome)) == outcome


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 20), st.floats(), st.text()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["size", "mode", "cages", "hints", "cells", "clue"]),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


@settings(max_examples=1500, deadline=None)
@given(JSON)
def test_no_json_value_raises_anything_else(value: object) -> None:
    """Values of any type in any place are refused by name."""
    text = json.dumps([value, {"size": 3, "cages": value, "hints": value}])
    with pytest.raises(PuzzleError, match=r"^fuzz:1: "):
        parse_puzzles(text, "fuzz")


def test_files_and_standard_input_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path, or - for standard input; a mark of byte order is ignored."""
    path = tmp_path / "puzzle.txt"
    path.write_bytes(b"\xef\xbb\xbf" + PLAIN.encode())
    assert read_puzzles(str(path)) == parse_puzzles(PLAIN)
    stdin = io.TextIOWrapper(io.BytesIO(PLAIN.encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    assert read_puzzles("-") == parse_puzzles(PLAIN)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    """Missing, a folder, no text, an impossible name: each in one sentence."""
    with pytest.raises(StorageError, match="No such file"):
        read_puzzles(str(tmp_path / "missing"))
    with pytest.raises(StorageError, match="directory"):
        read_puzzles(str(tmp_path))
    with pytest.raises(StorageError, match="check the path"):
        read_puzzles("a\0b")
    (tmp_path / "binary").write_bytes(b"size: 3\xff")
    with pytest.raises(PuzzleError, match="UTF-8 text; got the byte 0xff at offset 7"):
        read_puzzles(str(tmp_path / "binary"))
