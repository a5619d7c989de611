"""Tables of the documentation that are written from records stand there as recorded."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import graph_page
import pytest
from page_tables import filled, markdown

RECORDS = Path(__file__).parents[2] / "docs" / "accepted"


@pytest.mark.parametrize(
    "name",
    [
        "compiled_saves",
        "compression",
        "estimate",
        "fused_kernels",
        "kenken_hour",
        "recompute",
        "saves",
        "static_scale",
    ],
)
def test_a_page_says_what_the_record_says(name: str) -> None:
    """Whoever changes one of the two changes both."""
    bench = importlib.import_module(name)
    record = json.loads((RECORDS / f"{name}.json").read_text())
    page = bench.PAGE.read_text()
    assert filled(page, {name: bench.table(record)}) == page


def test_the_tables_of_plans_are_those_of_their_record() -> None:
    """Several tables of one page are made from one record."""
    record = json.loads((RECORDS / "graph.json").read_text())
    page = graph_page.PAGE.read_text()
    assert filled(page, graph_page.tables(record)) == page


@pytest.mark.parametrize("recipe", ["resolvent_lm", "soliton_lm"])
def test_the_pages_of_language_models_say_what_their_record_says(recipe: str) -> None:
    """One record, a table on the page of each recipe."""
    bench = importlib.import_module("accept_lm")
    record = json.loads((RECORDS / "lm.json").read_text())
    page = bench.PAGES[recipe].read_text()
    assert filled(page, {"lm": bench.table(record[recipe])}) == page


def test_a_table_takes_the_place_of_the_one_before() -> None:
    """Everything around it stays; a page without the place is an error."""
    page = "words\n<!-- table a -->\nold\n<!-- end of table -->\nmore\n"
    new = markdown(("x", "y"), [("1", r"\2")])
    found = filled(page, {"a": new})
    assert found.startswith("words\n<!-- table a -->")
    assert found.endswith("<!-- end of table -->\nmore\n")
    assert r"| 1 | \2 |" in found
    assert "old" not in found
    assert filled(found, {"a": new}) == found
    with pytest.raises(ValueError, match="one place for the table 'b'"):
        filled(page, {"b": new})
