"""A run in phases from the command line: its journal, its report, its resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from castwise.checkpoints import CheckpointShelf
from castwise.cli import root
from castwise.errors import ContradictionError, SettingsError
from castwise.recipes.kenken.solver import KIND
from castwise.training.journal import read_journal
from every_phase import every_phase

STEPS = 36
TRAIN = (
    *("train", "kenken", "--preset", "tiny", "--sizes", "4", "--modes", "standard"),
    *("--threads", "1", "--steps", str(STEPS), "--evaluate-every", "18"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of puzzles for all runs of this file."""
    return tmp_path_factory.mktemp("puzzles")


@pytest.fixture(scope="module")
def settings_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings under which every phase occurs within a few steps."""
    settings = every_phase(observe_formats=True)
    path = tmp_path_factory.mktemp("settings") / "hybrid.yaml"
    path.write_text(settings.to_yaml())
    return path


def castwise(*arguments: str | Path) -> Any:
    """Run the command line in this process."""
    return root.main([str(each) for each in arguments], standalone_mode=False)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, data: Path, settings_file: Path
) -> Path:
    """The folder of a whole run that kept every checkpoint."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    code = castwise(
        *TRAIN, "--out", out, "--data", data, "--hybrid", settings_file,
        "--checkpoint-every", "1", "--keep-last", "100",
    )  # fmt: skip
    assert code == 0
    return out


def phases_of(out: Path) -> dict[int, str]:
    """Step -> the phase in which the run went on after it."""
    phases, now = {}, "warmup"
    changes = {
        record.step: str(record.values["target"])
        for record in read_journal(out)
        if record.event == "phase"
    }
    for step in range(1, STEPS + 1):
        now = changes.get(step, now)
        phases[step] = now
    return phases


def test_the_journal_tells_phases_and_what_they_cost(finished: Path) -> None:
    """Every change with its reason; formats asked, effective and observed; memory."""
    records = read_journal(finished)
    changes = [record.values for record in records if record.event == "phase"]
    assert {"warmup", "full", "predict"} <= {each["source"] for each in changes}
    assert all(each["because"] for each in changes)
    summary = [record for record in records if record.event == "hybrid"][-1]
    counts = summary.values["statistics"]["phases"]
    assert sum(count["steps"] for count in counts.values()) == STEPS
    predict = counts["predict"]
    assert predict["steps"] > 0
    assert predict["backwards"] == 0
    assert predict["asked"] == predict["effective"] == "bf16"
    assert predict["product_formats"] == {"bf16": 1.0}
    assert counts["full"]["product_formats"] == {"fp32": 1.0}
    assert all(count["peak_bytes"] > 0 for count in counts.values() if count["steps"])
    assert summary.values["statistics"]["resting_bytes"] > 0
    lines = [record.values for record in records if record.event == "train"]
    assert {"phase", "confidence", "accepted", "credited_steps"} <= lines[-1].keys()


def test_the_report_has_phases_precision_and_memory(finished: Path) -> None:
    """A time line, and a table each."""
    report = json.loads((finished / "report.json").read_text())
    section = next(each for each in report["sections"] if each["title"] == "Phases")
    titles = [block["title"] for block in section["blocks"]]
    assert {
        "Phases by step",
        "Predictions",
        "Precision and cost by phase",
        "Memory by phase",
        "Why phases changed",
    } <= set(titles)


def assert_same(left: Any, right: Any, path: str = "") -> None:
    """Compare two trees bit for bit, but for times and memory."""
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for name in left:
            if not str(name).endswith(("seconds", "peak_bytes", "held_bytes")):
                assert_same(left[name], right[name], f"{path}/{name}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{path}/{index}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    elif hasattr(left, "tobytes"):
        assert left.tobytes() == right.tobytes(), path
    else:
        assert left == right, path


@pytest.mark.slow
def test_a_run_resumes_bit_by_bit_in_the_middle_of_any_phase(
    finished: Path, tmp_path: Path, data: Path
) -> None:
    """From inside of warmup, full, predict and correct."""
    shelf = CheckpointShelf(folder=finished / "checkpoints", kind=KIND)
    whole = shelf.latest().value
    assert whole is not None
    paths = {int(path.stem.rsplit("-", 1)[1]): path for path in shelf.paths()}
    phases = phases_of(finished)
    inside: dict[str, int] = {}
    for step in range(2, STEPS - 1):
        if phases[step] == phases[step - 1]:  # not at its beginning
            inside.setdefault(phases[step], step)
    assert {"warmup", "full", "predict", "correct"} <= inside.keys()
    for phase, step in inside.items():
        out = tmp_path / phase
        (out / "checkpoints").mkdir(parents=True)
        shutil.copy(paths[step], out / "checkpoints")
        shutil.copy(finished / "metrics.jsonl", out)
        assert castwise(*TRAIN, "--out", out, "--data", data, "--resume") == 0
        again = CheckpointShelf(folder=out / "checkpoints", kind=KIND).latest().value
        assert again is not None
        assert_same(again.tree, whole.tree)


def test_a_resume_in_other_phases_is_refused(finished: Path, data: Path) -> None:
    """And says what the checkpoint has."""
    where = (*TRAIN, "--out", finished, "--data", data, "--resume")
    with pytest.raises(ContradictionError, match="full_steps"):
        castwise(*where, "--hybrid", "conservative")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hybrid", "agressive"), "did you mean aggressive"),
        (("--hybrid", "aggressive", "--dtype", "bf16"), "keep one of them"),
        (("--hybrid", "conservative", "--precision", "bf16-mixed"), "keep one of them"),
        (("--hybrid", "--sentinel"), "keep one of them"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(
    arguments: tuple[str, ...], message: str, tmp_path: Path, data: Path
) -> None:
    """One sentence, before anything is made."""
    with pytest.raises(SettingsError, match=message):
        castwise(*TRAIN, "--out", tmp_path / "run", "--data", data, *arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("confidence_threshold: 1.5", "confidence_threshold"),
        ("full_stepps: 3", "did you mean full_steps"),
        ("- 1", "needs? lines"),
        ("mixed_precision_config: {phase_precisions: {predict: fp8_e4m3}}", "fp8"),
    ],
)
def test_a_settings_file_that_is_wrong_is_named(
    text: str, message: str, tmp_path: Path, data: Path
) -> None:
    """With its path and what is wrong in it."""
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message) as caught:
        castwise(*TRAIN, "--out", tmp_path / "run", "--data", data, "--hybrid", path)
    assert "mine.yaml" in str(caught.value)


def test_a_precision_flag_holds_where_the_phases_are_open(
    tmp_path: Path, data: Path
) -> None:
    """--dtype bf16 makes warmup and full bf16 too."""
    out = tmp_path / "run"
    steps = ("--steps", "6", "--hybrid", "--dtype", "bf16")
    assert castwise(*TRAIN, *steps, "--out", out, "--data", data) == 0
    summary = [each for each in read_journal(out) if each.event == "hybrid"][-1]
    counts = summary.values["statistics"]["phases"]
    assert {count["effective"] for count in counts.values()} == {"bf16"}
