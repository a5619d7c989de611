"""A bench that was stopped goes on where it was, and finished ones are joined."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from castwise.errors import StorageError
from castwise.hybrid.bench.notes import Notes, plain_of


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    """By another process, which has the same header."""
    out = tmp_path / "found.json"
    asked = []

    def measure() -> tuple[float, float]:
        asked.append(1)
        return 1.5, math.inf

    header = {"seeds": 5, "rates": (0.1, 0.2)}
    for _ in range(2):
        assert Notes(out, "race", header).once("seed 0", measure) == [1.5, None]
    assert len(asked) == 1
    Notes(out, "race", {"seeds": 6, "rates": (0.1, 0.2)}).once("seed 0", measure)
    Notes().once("seed 0", measure)
    assert len(asked) == 3


def test_finished_benches_are_joined_and_others_wait(tmp_path: Path) -> None:
    """What stood in the file stays there."""
    out = tmp_path / "found.json"
    one, other, third = (Notes(out, name, {"seeds": 5}) for name in "abc")
    for notes in (one, other, third):
        notes.once("x", lambda: 1)
    one.finish({"gain": 1.0})
    other.finish({"gain": math.nan})
    found = json.loads(out.read_text())
    assert found == {
        "a": {"header": {"seeds": 5}, "record": {"gain": 1.0}},
        "b": {"header": {"seeds": 5}, "record": {"gain": None}},
    }
    (tmp_path / "found.parts" / "a.json").unlink()
    third.finish({})
    assert list(json.loads(out.read_text())) == ["a", "b", "c"]
    assert not list(tmp_path.rglob("*.new"))


@pytest.mark.parametrize("text", ["", "[1]", "\x00"])
def test_a_file_that_is_none_of_ours_is_not_overwritten(
    tmp_path: Path, text: str
) -> None:
    """It is named, and stays."""
    out = tmp_path / "found.json"
    out.write_text(text)
    with pytest.raises(StorageError, match=r"found\.json"):
        Notes(out, "a").finish({})
    assert out.read_text() == text


def test_what_is_not_finite_becomes_null() -> None:
    """Strict JSON knows no infinity."""
    tree = {"a": (math.inf, 1), "b": [math.nan, "x"], 3: range(2)}
    assert plain_of(tree) == {"a": [None, 1], "b": [None, "x"], "3": [0, 1]}
