"""A killed run ends as the run that was never killed, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from castwise.checkpoints import CheckpointShelf
from castwise.recipes.kenken.solver import KIND
from castwise.training.journal import read_journal

STEPS = 24
COMMAND = [
    *(sys.executable, "-m", "castwise", "train", "kenken", "--preset", "tiny"),
    *("--steps", str(STEPS), "--evaluate-every", "12", "--checkpoint-every", "4"),
    *("--sizes", "4", "--modes", "standard", "--threads", "1"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of puzzles for all runs of this file."""
    return tmp_path_factory.mktemp("puzzles")


def start(out: Path, data: Path, *more: str) -> subprocess.Popen[str]:
    """Start a run in its own process."""
    return subprocess.Popen(
        [*COMMAND, "--out", str(out), "--data", str(data), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the end, which must be a good one."""
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return text


def kill_when(process: subprocess.Popen[str], reached: Any) -> None:
    """SIGKILL as soon as a condition holds, which must be before the end."""
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def shelf_of(out: Path) -> CheckpointShelf:
    """The checkpoints of a run."""
    return CheckpointShelf(folder=out / "checkpoints", kind=KIND)


def last_step(out: Path) -> int:
    """The step of the newest checkpoint by name, 0 for none."""
    names = [path.stem for path in shelf_of(out).paths()]
    return int(names[0].rsplit("-", 1)[1]) if names else 0


def assert_same(left: Any, right: Any, path: str = "") -> None:
    """Compare two trees bit for bit."""
    assert type(left) is type(right), path
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for name in left:
            assert_same(left[name], right[name], f"{path}/{name}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{path}/{index}")
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, path
        assert left.shape == right.shape, path
        bits = [each.reshape(-1).view(torch.uint8) for each in (left, right)]
        assert torch.equal(*bits), path
    elif hasattr(left, "tobytes"):
        assert left.tobytes() == right.tobytes(), path
    else:
        assert left == right, path


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_killed_three_times_ends_as_the_run_that_was_never_killed(
    tmp_path: Path, data: Path, dtype: str
) -> None:
    """SIGKILL after a checkpoint, between two, and within an evaluation."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, data, "--dtype", dtype))

    first = start(killed, data, "--dtype", dtype)
    kill_when(first, lambda: last_step(killed) >= 4)
    second = start(killed, data, "--resume")
    journal = killed / "metrics.jsonl"
    kill_when(
        second,
        lambda: journal.exists() and b'"step": 10,' in journal.read_bytes(),
    )
    third = start(killed, data, "--resume")
    kill_when(third, lambda: last_step(killed) >= 16)
    finish(start(killed, data, "--resume"))

    ours = shelf_of(killed).latest().value
    theirs = shelf_of(whole).latest().value
    assert ours is not None
    assert theirs is not None
    assert ours.step == theirs.step == STEPS
    for part in ("model", "optimizer", "averages", "run", "task", "random", "schedule"):
        assert_same(ours.tree[part], theirs.tree[part], part)

    lines, expected = (
        [(r.event, r.step, r.values.get("loss")) for r in read_journal(out)]
        for out in (killed, whole)
    )
    assert lines == expected


@pytest.mark.slow
def test_sigterm_saves_and_a_contradicting_flag_is_named(
    tmp_path: Path, data: Path
) -> None:
    """SIGTERM leaves a checkpoint and exit code 143; --dtype fp16 then contradicts."""
    out = tmp_path / "run"
    process = start(out, data, "--dtype", "bf16")
    deadline = time.monotonic() + 120
    while last_step(out) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 143, text
    assert "--resume" in text
    stopped = last_step(out)
    assert 4 <= stopped <= STEPS

    refused = start(out, data, "--resume", "--dtype", "fp16", "--seed", "9")
    text, _ = refused.communicate(timeout=120)
    assert refused.returncode == 2
    assert "Traceback" not in text
    for word in ("--dtype", "16-mixed", "bf16-mixed", "--seed", "9"):
        assert word in text
    assert last_step(out) == stopped
