"""castwise watch on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from castwise.numerics.watch.windows import WatchWindow
from castwise.report import read_report
from command_line import Run

TARGET = """
import torch
from torch import nn
from torch.nn import functional


class Square(nn.Module):
    def forward(self, x):
        return x * x


def model_of(size):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 9), Square(),
        nn.LayerNorm(9), nn.Linear(9, 3),
    )
    with torch.no_grad():
        model[2].weight *= size
    batches = [(torch.randn(5, 6), torch.randint(3, (5,))) for _ in range(3)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, batches, functional.cross_entropy, optimizer


def build():
    return model_of(1.0)


def large():
    return model_of(3000.0)


def without():
    return build()[:3]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A usual model, and one with a planted overflow of fp16."""
    found = tmp_path / "mine.py"
    found.write_text(TARGET)
    return found


def test_a_healthy_run_leaves_with_0_a_record_and_a_report(
    path: Path, tmp_path: Path, run: Run
) -> None:
    """The last step is always looked at, and the JSON answers what the page answers."""
    record, page = tmp_path / "windows.json", tmp_path / "watch.html"
    flags = ("--steps", "8", "--every", "3", "--json", str(record))
    code, out, _ = run("watch", f"{path}:build", *flags, "--report", str(page))
    assert code == 0
    assert "after step 8, all numbers are finite" in out
    assert "gradients that underflow in fp16" in out
    found = json.loads(record.read_text())
    windows = [WatchWindow.from_record(each) for each in found["windows"]]
    assert [window.last_step for window in windows] == [1, 4, 7]
    assert found["stepped"] == 8
    titles = [
        section.title for section in read_report(page.with_suffix(".json")).sections
    ]
    assert titles == ["Numbers by exponent", "Over time", "Every tensor"]


def test_an_overflow_leaves_with_1_and_the_sentinel_cures_it(
    path: Path, tmp_path: Path, run: Run
) -> None:
    """The promotion is told, with its reason, in text, JSON and page."""
    flags = ("--preset", "16-mixed", "--steps", "4", "--every", "2")
    code, out, _ = run("watch", f"{path}:large", *flags)
    assert code == 1
    assert "not finite" in out
    record = tmp_path / "windows.json"
    code, out, _ = run(
        "watch", f"{path}:large", *flags, "--sentinel", "--json", str(record)
    )
    assert code == 0
    assert "changed: step 0: 3 to c=fp32,o=fp32" in out
    assert json.loads(record.read_text())["changes"][0]["module"] == "3"


def test_a_target_without_an_optimizer_is_a_mistake(path: Path, run: Run) -> None:
    """Nothing can be trained without one."""
    code, _, err = run("watch", f"{path}:without")
    assert code == 2
    assert "return it fourth" in err
