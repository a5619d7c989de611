"""castwise lint on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from castwise import cli
from castwise.report import read_report

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


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run a command as a person does; return code, output and error."""
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def test_a_clean_model_leaves_with_0(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The usual policy finds nothing in a usual model."""
    code, out, _ = run(capsys, "lint", target)
    assert code == 0
    assert "lint of bf16-mixed found nothing" in out


def test_findings_leave_with_1_a_record_and_a_report(
    target: str,
    plain: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Text, JSON and page say the same."""
    record, page = tmp_path / "found.json", tmp_path / "lint.html"
    flags = (*plain, "--json", str(record), "--report", str(page))
    code, out, _ = run(capsys, "lint", target, *flags)
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
    target: str, plain: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """What is silenced is still said, with its reason."""
    flags = [
        "--silence",
        "lost-decay=a schedule raises the rate",
        "--silence",
        "lost-update@1.*=norms stay at 1 here",
    ]
    code, out, _ = run(capsys, "lint", target, *plain, *flags)
    assert code == 0
    assert "silenced, norms stay at 1 here: lost-update" in out


@pytest.mark.parametrize("text", ["lost-update", "lost-update=", "nothing=why"])
def test_a_silence_without_check_or_reason_is_a_mistake(
    target: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence and exit code 2."""
    code, _, err = run(capsys, "lint", target, "--silence", text)
    assert code == 2
    assert err.count("\n") == 1
