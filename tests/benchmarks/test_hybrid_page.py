"""The page of the hybrid trainer says what the record of its benches says."""

from __future__ import annotations

from typing import Any

import hybrid_page
from hybrid_page import PAGE, RECORD, tables
from page_tables import filled

from castwise.hybrid.bench.notes import plain_of, read_notes


def test_the_page_says_what_the_record_says() -> None:
    """Whoever changes one of the two changes both."""
    record = read_notes(RECORD) if RECORD.exists() else {}
    page = PAGE.read_text("utf-8")
    assert filled(page, tables(record)) == page


def race(*, edge: bool = False, **changes: Any) -> dict[str, Any]:
    """What a bench keeps of one method."""
    run = {"seconds": 2.0, "backwards": 100, "clock_seconds": 2.5, "final": 0.1}
    point = {"rate": 0.004, "momentum": 0.9, "decay": 300}
    return {"point": point, "edge": edge, "runs": [run | changes] * 5}


def test_a_record_becomes_tables() -> None:
    """Ratios over plain, bold where they are gains; what was not reached says so."""
    runs = {
        "plain": race(),
        "bare": race(seconds=1.5),
        "rna": race(seconds=1.0, backwards=50, edge=True),
        "lookahead": race(seconds=float("inf"), backwards=float("inf")),
    }
    controls = [
        {"name": "rna over plain, passes", "value": 0.5, "least": None, "most": 0.65}
    ]
    arms = {
        "vanilla": {"phases": {"warmup": 4 << 20}},
        "all": {"phases": {"warmup": 1 << 20, "correct": 3 << 20}},
    }
    record = {
        "physics": {"record": plain_of({"runs": runs, "controls": controls})},
        "stacking": {"record": plain_of({"runs": arms, "controls": []})},
    }
    made = tables(record)
    assert "| `plain` | 100 passes, 2.00 s |" in made["races"]
    assert "| `rna` | 0.50, **0.50** |" in made["races"]
    assert "| `lookahead` | not reached |" in made["races"]
    assert "| `rna` | 0.004*, 0.9, falls over 300 |" in made["points"]
    assert made["conclusions"].startswith("- *physics-informed*: a gain of 1.3 times")
    row = "| physics | rna over plain, passes | 0.5 | at most 0.65 | holds |"
    assert row in made["controls"]
    assert "| all | 1 |  |  | 3 | 0.75 |" in made["stacking"]
    assert set(tables({}).values()) == {"Not measured yet.\n"}
    assert hybrid_page.RACES.keys() >= {"softmax", "late_training"}
