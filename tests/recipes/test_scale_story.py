from __future__ import annotations

from typing import Any

from castwise.recipes.scale_story import scale_story
from castwise.report import DataTable, Lines
from castwise.training.journal import Record


def line(event: str, step: int, **values: Any) -> Record:
    """One line of a journal."""
    return Record(event=event, step=step, time=0.0, values=values)


def skip(step: int, scale: float, **values: Any) -> Record:
    """One skipped step, of a known operator unless told otherwise."""
    known = {"op": "exp", "module": "gate", "stage": "backward", "kind": "overflow"}
    known |= {"where": "m.py:3", "parameter": "w", "because": "b", "gone_at": None}
    return line("skip", step, scale=scale, **(known | values))


def test_a_quiet_run_has_a_line_and_no_table() -> None:
    """The course alone, and a sentence that says that nothing happened."""
    blocks = scale_story([line("train", step, scale=64.0) for step in (10, 20)])
    (picture,) = blocks
    assert isinstance(picture, Lines)
    assert picture.series[0].xs == (10.0, 20.0)
    assert picture.caption == "No step was skipped."
    assert picture.markers == ()


def test_equal_causes_are_one_row_with_their_span() -> None:
    """Counted over all skips, most frequent first, the lowest scale told."""
    records = [
        line("train", 10, scale=64.0),
        skip(11, 64.0, gone_at=16.0),
        line("scale", 11, scale=32.0),
        skip(12, 32.0, gone_at=16.0),
        line("scale", 12, scale=16.0),
        skip(13, 16.0, op=None, module=None, where=None, kind="nan", stage=None),
        line("train", 20, scale=16.0),
    ]
    picture, table = scale_story(records)
    assert isinstance(picture, Lines)
    assert isinstance(table, DataTable)
    assert picture.series[0].xs == (10.0, 11.0, 12.0, 13.0, 20.0)
    assert picture.series[0].ys == (64.0, 32.0, 16.0, 16.0, 16.0)
    assert picture.markers[0].name == "skipped: overflow in exp (gate, backward)"
    assert picture.markers[2].name == "skipped: nan in the gradient of w"
    assert [marker.x for marker in picture.markers] == [11.0, 12.0, 13.0]
    first, second = table.rows
    assert first == (
        "overflow", "exp", "gate", "backward", "m.py:3", 2.0, 11.0, 12.0, 32.0, 16.0,
    )  # fmt: skip
    assert second[:5] == ("nan", "gradient of w", "", "", "")


def test_many_skips_are_marked_in_part_and_counted_in_full() -> None:
    """A picture has room for some marks; the caption says so."""
    picture, table = scale_story([skip(step, 2.0, module=None) for step in range(30)])
    assert isinstance(picture, Lines)
    assert isinstance(table, DataTable)
    assert len(picture.markers) == 20
    assert "The first 20 are marked." in picture.caption
    assert table.rows[0][2] == "the loss"
    assert table.rows[0][5] == 30.0
