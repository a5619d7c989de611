"""castwise gradients on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from castwise.graph import GradientFlow
from castwise.report import read_report
from command_line import Run

TARGET = """
import torch
from torch import nn
from torch.nn import functional


def model_of(size):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    batches = [(torch.randn(5, 6), torch.randint(3, (5,)))]
    return model, batches, lambda y, t: size * functional.cross_entropy(y, t)


def build():
    return model_of(1.0)


def spread():
    model, batches, loss_fn = model_of(1.0)
    with torch.no_grad():
        model[2].weight[:, ::2] *= 1e-12  # their gradients cannot share a scale
    return model, batches, loss_fn


def broken():
    return model_of(float("inf"))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A usual model, one with gradients far apart, and one that overflows in fp32."""
    found = tmp_path / "mine.py"
    found.write_text(TARGET)
    return found


def test_a_scale_is_suggested_with_a_record_and_a_page(
    path: Path, tmp_path: Path, run: Run
) -> None:
    """The JSON answers what the page answers, and the model is not edited."""
    record, page = tmp_path / "flow.json", tmp_path / "page.html"
    flags = ("--preset", "16-mixed", "--json", str(record), "--report", str(page))
    code, out, _ = run("gradients", f"{path}:build", *flags)
    assert code == 0
    flow = GradientFlow.from_record(json.loads(record.read_text()))
    scale = flow.suggest_scale()
    assert f"static loss scale 2^{scale.value.hex().partition('p+')[2]}:" in out
    assert scale.because in out
    assert {"0.weight", "2.bias"} <= {node.name for node in flow.nodes}
    found = read_report(page.with_suffix(".json"))
    assert found.tiles[0].value in out
    assert [section.title for section in found.sections] == [
        "Gradients by module",
        "Loss scales",
        "Every gradient",
    ]


def test_gradients_too_far_apart_leave_with_1(path: Path, run: Run) -> None:
    """No static scale holds them all, and the worst are named."""
    code, out, _ = run("gradients", f"{path}:spread", "--preset", "16-mixed")
    assert code == 1
    assert "% lost of 0: 0.weight" in out
    flags = ("--preset", "bf16-mixed", "--format", "bf16", "--sample", "0")
    code, _, _ = run("gradients", f"{path}:spread", *flags)
    assert code == 0


def test_a_model_that_overflows_in_fp32_is_a_mistake(path: Path, run: Run) -> None:
    """There is nothing to suggest, and the message says what to do."""
    code, _, err = run("gradients", f"{path}:broken")
    assert code == 2
    assert "need finite gradients" in err
    assert "diagnose" in err
