"""castwise lint on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from castwise.report import read_report
from command_line import Run

TARGET = """
import torch
from torch import nn
from torch.nn import functional


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3))
    batches = [(torch.randn(5, 6), torch.randint(3, (5,)))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, batches, functional.cross_entropy, optimizer
"""


PLAIN = """castwise: 1
name: plain
default: bf16
storage: plain
"""


@pytest.fixture
def plain(tmp_path: Path) -> tuple[str, str]:
    """A policy under which updates are lost."""
    path = tmp_path / "plain.yaml"
    path.write_text(PLAIN)
    return "--policy", str(path)


@pytest.fixture
def target(tmp_path: Path) -> str:
    """A model that is clean in bf16-mixed and not in bf16-true."""
    path = tmp_path / "mine.py"
    path.write_text(TARGET)
    return f"{path}:build"


def test_a_clean_model_leaves_with_0(target: str, run: Run) -> None:
    """The usual policy finds nothing in a usual model."""
    code, out, _ = run("lint", target)
    assert code == 0
    assert "lint of bf16-mixed found nothing" in out


def test_findings_leave_with_1_a_record_and_a_report(
    target: str,
    plain: tuple[str, str],
    tmp_path: Path,
    run: Run,
) -> None:
    """Text, JSON and page say the same."""
    record, page = tmp_path / "found.json", tmp_path / "lint.html"
    flags = (*plain, "--json", str(record), "--report", str(page))
    code, out, _ = run("lint", target, *flags)
    assert code == 1
    assert "lost-update: parameter 1.weight (bf16)" in out
    found = json.loads(record.read_text())["findings"]
    assert {each["check"] for each in found} == {"lost-update", "lost-decay"}
    titles = [
        block.title
        for block in read_report(page.with_suffix(".json")).sections[0].blocks
    ]
    assert titles == [each["check"] for each in found]


def test_a_silence_with_a_reason_turns_the_verdict(
    target: str, plain: tuple[str, str], run: Run
) -> None:
    """What is silenced is still said, with its reason."""
    flags = [
        "--silence",
        "lost-decay=a schedule raises the rate",
        "--silence",
        "lost-update@1.*=norms stay at 1 here",
    ]
    code, out, _ = run("lint", target, *plain, *flags)
    assert code == 0
    assert "silenced, norms stay at 1 here: lost-update" in out


def test_a_silence_in_the_policy_file_turns_the_verdict(
    target: str, tmp_path: Path, run: Run
) -> None:
    """Nothing is repeated on the command line; what covers nothing is told."""
    path = tmp_path / "silenced.yaml"
    path.write_text(
        f"{PLAIN}silences:\n"
        "  - {check: lost-decay, because: a schedule raises the rate}\n"
        '  - {check: lost-update, at: "1.*", because: norms stay at 1 here}\n'
        "  - {check: low-loss, because: it is tiny}\n"
    )
    page = tmp_path / "lint.html"
    code, out, _ = run("lint", target, "--policy", path, "--report", page)
    assert code == 0
    assert "silenced, norms stay at 1 here: lost-update" in out
    assert "the silence low-loss covered nothing: it can go" in out
    assert "The silence low-loss covered nothing" in page.read_text()


@pytest.mark.parametrize("text", ["lost-update", "lost-update=", "nothing=why"])
def test_a_silence_without_check_or_reason_is_a_mistake(
    target: str, text: str, run: Run
) -> None:
    """One sentence and exit code 2."""
    code, _, err = run("lint", target, "--silence", text)
    assert code == 2
    assert err.count("\n") == 1
