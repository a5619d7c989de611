"""The story of a curriculum: what the picture shows is what the journal says."""

from __future__ import annotations

from castwise.recipes.stage_story import stage_story
from castwise.report import DataTable, Lines
from castwise.training.conditions import parse_condition
from castwise.training.curriculum import Curriculum, Dimension, Stage
from castwise.training.journal import Record

LINE = Dimension(
    name="mode",
    stages=(
        Stage(name="plain", advance=parse_condition("m >= 1"), max_epochs=3),
        Stage(name="all"),
    ),
)


def test_a_run_without_a_curriculum_has_no_story() -> None:
    """Nothing is shown, rather than an empty picture."""
    assert stage_story(Curriculum(()), (), 9) == ()


def test_stages_are_a_staircase_and_every_change_has_its_reason() -> None:
    """The picture goes up where the journal says so."""
    walked = Curriculum((LINE,))
    (change,) = walked.observe(4, {"m": 1.0})
    records = [Record(event="stage", step=4, time=0.0, values=change.record())]
    picture, table = stage_story(Curriculum((LINE,)), records, 9)
    assert isinstance(picture, Lines)
    assert picture.series[0].xs == (0.0, 4.0, 4.0, 9.0)
    assert picture.series[0].ys == (1.0, 1.0, 2.0, 2.0)
    assert picture.caption == "mode: 1 plain, 2 all"
    assert isinstance(table, DataTable)
    assert table.rows == ((4, "mode", "plain", "all", "m >= 1: m 1"),)


def test_before_the_first_change_there_is_a_picture_and_no_table() -> None:
    """The stage in force is shown all the same."""
    (picture,) = stage_story(Curriculum((LINE,)), (), 5)
    assert isinstance(picture, Lines)
    assert picture.series[0].ys == (1.0, 1.0)
