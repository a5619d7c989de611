"""The page on peers quotes its record, and the record still holds for castwise."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from castwise.autocast import uninstall

ROOT = Path(__file__).resolve().parents[2]
RECORD = json.loads((ROOT / "docs" / "accepted" / "peers.json").read_text())
PAGE = (ROOT / "docs" / "peers.md").read_text()
ROWS = RECORD["features"]["rows"]


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The benchmark itself."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import peers

    yield peers
    uninstall()
    torch.compiler.reset()


def test_the_tables_of_the_page_are_those_of_the_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A figure is changed by measuring, never by hand."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from peer_page import tables

    made = tables(RECORD)
    places = re.findall(r"<!-- ((?!end)\w+) -->\n", PAGE)
    assert set(places) >= set(made)
    for name in places:
        assert f"<!-- {name} -->\n{made.get(name, '')}<!-- end -->" in PAGE, name


def test_the_record_answers_every_question_of_the_benchmark(peers: Any) -> None:
    """No feature was added or dropped after the record was taken."""
    assert [row["feature"] for row in ROWS] == [f.title for f in peers.FEATURES]
    for row, feature in zip(ROWS, peers.FEATURES, strict=True):
        assert row["test"] == feature.test
        assert set(row["answers"]) == {*peers.TOOLS, "paddle.amp"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["feature"])
def test_each_feature_is_held_by_a_test(row: dict[str, Any]) -> None:
    """The test that a row names exists."""
    file, _, name = row["test"].partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE)


@pytest.mark.filterwarnings("ignore")
def test_what_the_record_says_of_castwise_is_true_today(peers: Any) -> None:
    """Verdicts and figures of castwise are measured again here."""
    pytest.importorskip("expecttest")
    tool = peers.TOOLS["castwise"]()
    for row, feature in zip(ROWS, peers.FEATURES, strict=True):
        kept = row["answers"]["castwise"]
        found = peers.answer(feature, tool)
        assert found.verdict == kept["verdict"], f"{feature.title}: {found.figure}"


def test_no_operator_crashes_under_castwise_in_the_record() -> None:
    """The claim of the page, row by row."""
    rows = [row for row in RECORD["crashes"]["rows"] if row["tool"] == "castwise"]
    assert {row["format"] for row in rows} == {"bf16", "fp16"}
    assert len(rows) == 8
    assert all(row["forward"] == row["backward"] == 0 for row in rows)


def test_the_cost_of_the_table_is_that_of_its_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """docs/operator_table.md quotes docs/accepted/autocast.json."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from peer_page import cost

    page = (ROOT / "docs" / "operator_table.md").read_text()
    record = json.loads((ROOT / "docs" / "accepted" / "autocast.json").read_text())
    assert f"<!-- cost -->\n{cost(record)}<!-- end -->" in page
    idle = record["eager"]["idle"]
    for words in (
        f"no region: {idle['installed, step in fp32']:.2f} of an fp32 step",
        f"{idle['installed, step in torch.autocast']:.2f} of its step",
    ):
        assert words in page


def test_the_crashes_of_both_pages_are_those_of_the_record() -> None:
    """docs/operator_table.md tells the bf16 half again."""
    page = (ROOT / "docs" / "operator_table.md").read_text().replace("**", "")
    names = {"all": "all", "first": "only the first", "second": "only the second"}
    for row in RECORD["crashes"]["rows"]:
        if row["format"] == "bf16":
            case = names.get(row["inputs"], "all but the first")
            region = row["tool"].replace("torch.autocast", "`torch.autocast`")
            forward = f"{row['forward']} of {row['forward_of']}"
            backward = f"{row['backward']} of {row['backward_of']}"
            assert f"| {case} | {region} | {forward} | {backward} |" in page
