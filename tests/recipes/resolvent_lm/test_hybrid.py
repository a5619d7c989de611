"""`castwise train resolvent_lm --hybrid`: phases in the journal and the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from castwise.cli import root
from castwise.errors import ContradictionError, SettingsError
from castwise.hybrid import HybridSettings
from castwise.training.journal import read_journal

SMALL = """
text: {sequence_length: 24, batch_size: 3, tokenizer: bytes}
model: {dim: 16, num_blocks: 2, num_chains: 5, hidden: 24, num_heads: 2}
training:
  num_steps: 16
  evaluate_every: 8
  num_validation: 6
  checkpoint_every: 4
  log_every: 2
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small config, and settings under which predictions are tried at once."""
    folder = tmp_path_factory.mktemp("lm")
    (folder / "small.yaml").write_text(SMALL)
    settings = HybridSettings(
        warmup_steps=3,
        full_steps=3,
        correct_steps=2,
        confidence_threshold=0.01,
        verification="none",
    )
    (folder / "hybrid.yaml").write_text(settings.to_yaml())
    return folder


def castwise(place: Path, out: str, *more: str) -> object:
    """Run the command line in this process."""
    arguments = [
        *("train", "resolvent_lm", "--config", str(place / "small.yaml")),
        *("--out", str(place / out), "--data", str(place / "data"), "--threads", "1"),
        *more,
    ]
    return root.main(arguments, standalone_mode=False)


def test_a_run_in_phases_tells_what_they_cost(place: Path) -> None:
    """Every phase occurs; islands hold in each; the report has the chapter."""
    assert castwise(place, "run", "--hybrid", str(place / "hybrid.yaml")) == 0
    records = read_journal(place / "run")
    changes = [record.values for record in records if record.event == "phase"]
    assert {"warmup", "full", "predict", "correct"} == {c["source"] for c in changes}
    summary = [record for record in records if record.event == "hybrid"][-1]
    counts = summary.values["statistics"]["phases"]
    assert sum(count["steps"] for count in counts.values()) == 16
    assert counts["predict"]["effective"] == "bf16"
    assert counts["full"]["effective"] == "fp32"
    report = json.loads((place / "run" / "report.json").read_text())
    assert "Phases" in {section["title"] for section in report["sections"]}
    with pytest.raises(ContradictionError, match="full_steps"):
        castwise(place, "run", "--resume", "--hybrid")


def test_a_format_twice_is_refused(place: Path) -> None:
    """By the name of both flags."""
    with pytest.raises(SettingsError, match=r"--hybrid aggressive.*keep one"):
        castwise(place, "twice", "--hybrid", "aggressive", "--dtype", "fp32")
