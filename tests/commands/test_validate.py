"""castwise validate and castwise diagnose on a user's file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from castwise.report import read_report
from command_line import Run

GOOD = """
import torch
from torch import nn
from torch.nn import functional


class Cancels(nn.Module):
    def forward(self, x):
        return (x + 500.0) - 500.0


class Unrounded(nn.Module):
    def forward(self, x):
        return x + torch.ops.castwise_test.narrow(x.detach())


class Divides(nn.Module):
    def forward(self, x):
        return x / (x - x)


@torch.library.custom_op("castwise_test::narrow", mutates_args=())
def narrow(x: torch.Tensor) -> torch.Tensor:
    if x.dtype == torch.float64:
        raise RuntimeError('"narrow" not implemented for Double')
    return x.clone()


def made(middle):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(15, 15), middle, nn.Linear(15, 5))
    batches = [(torch.randn(9, 15), torch.randn(9, 5))]
    return model, batches, functional.mse_loss


def good():
    return made(nn.GELU())


def cancels():
    return made(Cancels())


def unrounded():
    return made(Unrounded())


def divides():
    return made(Divides())


def without_gradient():
    model, batches, _ = good()
    return model, batches, lambda output, target: output.detach().sum()
"""

LOW = """
castwise: 1
name: all-low
default: p=bf16,c=bf16,o=bf16,r=fp32
rules:
  - {op: add, category: low}
  - {op: sub, category: low}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with good and bad targets, and a policy beside it."""
    (tmp_path / "low.yaml").write_text(LOW)
    found = tmp_path / "mine.py"
    found.write_text(GOOD)
    return found


def test_a_policy_that_holds_leaves_with_0_and_a_report(
    path: Path, run: Run, tmp_path: Path
) -> None:
    """Table, one line, JSON and page say the same."""
    page, record = tmp_path / "report.html", tmp_path / "record.json"
    code, out, _ = run("validate", f"{path}:good", "--modules", "--seeds", 2,
        "--report", page, "--json", record,
    )  # fmt: skip
    assert code == 0
    assert "validation of bf16-mixed holds" in out
    assert "2 seeds" in out
    assert re.search(r"output +│ \d\.\de-03", out)
    found = json.loads(record.read_text())
    assert found["holds"]
    assert found["seeds"] == [0, 1]
    report = read_report(page.with_suffix(".json"))
    assert report.verdict.mark == "good"
    assert [each.title for each in report.sections][1] == "Modules"
    assert "<svg" in page.read_text()


def test_a_broken_budget_leaves_with_1_and_names_who_is_at_fault(
    path: Path, run: Run, tmp_path: Path
) -> None:
    """The module that cancels, its operator and its line; the page shows it red."""
    page = tmp_path / "report.html"
    policy = path.with_name("low.yaml")
    code, out, _ = run(
        "validate", f"{path}:cancels", "--policy", policy, "--report", page
    )
    assert code == 1
    assert "validation of all-low broken" in out
    assert re.search(r"1 in bf16: own: .*sub in forward at .*mine.py:\d+", out)
    assert read_report(page.with_suffix(".json")).verdict.mark == "bad"
    tight = run("validate", f"{path}:good", "--tolerance", "1e-9")
    assert tight[0] == 1
    same = run("validate", f"{path}:good", "--preset", "64-true")
    assert same[0] == 1
    assert "nothing was compared" in same[1]


def test_what_does_not_run_in_float64_is_named(path: Path, run: Run) -> None:
    """Operator, line and remedy, in one sentence and without a traceback."""
    for command in ("validate", "diagnose"):
        code, _, err = run(command, f"{path}:unrounded")
        assert code == 2
        assert re.search(r"run in fp64, and narrow at .*mine.py:\d+ does not", err)
        assert "Traceback" not in err


def test_mistakes_are_one_sentence(path: Path, run: Run) -> None:
    """A loss without gradient, a bad target, a tolerance below zero."""
    code, _, err = run("validate", f"{path}:without_gradient")
    assert (code, "got no gradient" in err) == (2, True)
    code, _, err = run("diagnose", f"{path}:nothing")
    assert (code, "has no function 'nothing'" in err) == (2, True)
    code, _, err = run("validate", f"{path}:good", "--tolerance", "-1")
    assert (code, "finite number from 0 on" in err) == (2, True)
    code, _, err = run("validate", f"{path}:good", "--seeds", 0)
    assert (code, "at least one seed" in err) == (2, True)


def test_a_diagnosis_names_cause_and_line(path: Path, run: Run, tmp_path: Path) -> None:
    """Rounding where it cancels, the algorithm where it divides by zero."""
    page, record = tmp_path / "report.html", tmp_path / "record.json"
    policy = path.with_name("low.yaml")
    code, out, _ = run("diagnose", f"{path}:cancels", "--policy", policy,
        "--report", page, "--json", record,
    )  # fmt: skip
    assert code == 1
    assert "cause: rounding" in out
    assert re.search(r"at: sub in 1 \(forward\) at .*mine.py:\d+", out)
    assert json.loads(record.read_text())["cause"] == "rounding"
    assert read_report(page.with_suffix(".json")).verdict.text == "Rounding"
    code, out, _ = run("diagnose", f"{path}:divides")
    assert code == 1
    assert "cause: algorithm" in out
    assert "at: div in 1" in out


def test_a_sound_model_leaves_with_0(path: Path, run: Run, tmp_path: Path) -> None:
    """With its errors by format; and a limit makes the algorithm answerable for it."""
    page = tmp_path / "report.html"
    code, out, _ = run("diagnose", f"{path}:good", "--report", page)
    assert code == 0
    assert "cause: none" in out
    report = read_report(page.with_suffix(".json"))
    assert report.verdict.text == "Nothing is wrong"
    (bars, _) = report.sections[1].blocks
    assert bars.names == ("bf16-mixed", "fp32", "fp64")
    assert 1e-3 < bars.values[0].value < 6e-2
    assert bars.values[2].value == 0
    code, out, _ = run("diagnose", f"{path}:good", "--limit", "1e-3")
    assert code == 1
    assert "cause: algorithm" in out
