"""The record of the `hour` preset is what the runs left and what the exam gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kenken_hour
import pytest
from click.testing import CliRunner

from castwise.cli import root
from castwise.errors import CheckpointError

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seconds, of one size that has a goal."""
    place = tmp_path_factory.mktemp("runs")
    flags = ("--preset", "tiny", "--sizes", "4", "--steps", str(STEPS), "--seed", "3")
    more = ("--evaluate-every", "2", "--out", str(place / "3"), "--threads", "1")
    made = CliRunner().invoke(
        root,
        ["train", "kenken", *flags, *more, "--data", str(place / "data")],
        catch_exceptions=False,
    )
    assert made.exit_code == 0, made.output
    return place / "3"


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    """A record of that one run."""
    run = kenken_hour.watched(folder, 5)
    return {"date": "a day", "torch": "one", "note": "noted", "runs": [run]}


def test_a_run_is_read_with_its_growth_and_its_exam(record: dict[str, Any]) -> None:
    """Every epoch is a point; every alphabet of a size a frozen set."""
    (run,) = record["runs"]
    assert run["seed"] == 3
    assert [point["step"] for point in run["growth"]] == [2, 4]
    assert all(0 <= point["4"] <= 1 for point in run["growth"])
    assert [each["mode"] for each in run["sets"]] == ["standard", "zero", "negative"]
    assert {each["num"] for each in run["sets"]} == {5}
    assert run["seconds"] > 0


def test_goals_are_those_of_standard_and_of_time(record: dict[str, Any]) -> None:
    """A model of four steps misses; one that solves all in an hour does not."""
    (run,) = record["runs"]
    (told,) = kenken_hour.missed(record)
    assert told.startswith("seed 3: ")
    assert "**missed**" in kenken_hour.table(record)
    solved = [
        {**each, "network": 0.995 if each["mode"] == "standard" else 0.1}
        for each in run["sets"]
    ]
    good = {**record, "runs": [{**run, "sets": solved}]}
    assert kenken_hour.missed(good) == []
    assert "| 4 x 4 standard | 1 | 0.9950 |" in kenken_hour.table(good)
    slow = {**record, "runs": [{**run, "sets": solved, "seconds": 4000.0}]}
    assert kenken_hour.missed(slow) == ["seed 3 took 4000 s"]


def test_the_same_record_draws_the_same_picture(
    record: dict[str, Any], tmp_path: Path
) -> None:
    """A picture in the repository changes only with its record."""
    pytest.importorskip("matplotlib")
    paths = [tmp_path / name for name in ("a.svg", "b.svg")]
    for path in paths:
        kenken_hour.draw(record, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    """The message names the folder."""
    with pytest.raises(CheckpointError, match="needs a checkpoint"):
        kenken_hour.watched(tmp_path, 5)
