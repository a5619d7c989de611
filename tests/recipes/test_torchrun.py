"""Recipes on two processes over gloo, as a user starts them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from castwise.checkpoints.container import read_checkpoint
from castwise.training.journal import Record, read_journal

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TRAIN = ["-m", "castwise", "train"]
SECONDS = 280
LAST_BITS = 2e-6
"""Of a loss in fp32 after a few steps; measured: 1e-7."""


def started(*words: str, data: Path, ranks: int = 2) -> subprocess.Popen[str]:
    """Start a command, alone or on two processes."""
    launcher = TORCHRUN if ranks == 2 else []
    return subprocess.Popen(
        [sys.executable, *launcher, *words, "--threads", "1", "--data", str(data)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for a process, and return what it said."""
    try:
        told, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert (process.returncode == 0) == (code == 0), told
    return told


def journal_of(folder: Path, event: str) -> list[Record]:
    """Lines of one kind."""
    return [record for record in read_journal(folder) if record.event == event]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where puzzles are cached for all runs."""
    return tmp_path_factory.mktemp("data")


@pytest.mark.slow
def test_two_processes_reach_the_loss_of_one(data: Path, tmp_path: Path) -> None:
    """By DDP, in fp32, to the last bits: one display, one report, one journal."""
    words = [*TRAIN, "kenken", "--preset", "tiny", "--dtype", "fp32", "--steps", "20"]
    alone = started(*words, "--out", str(tmp_path / "1"), data=data, ranks=1)
    finished(alone)
    told = finished(
        started(*words, "--strategy", "ddp", "--out", str(tmp_path / "2"), data=data)
    )
    expected = journal_of(tmp_path / "1", "train")
    found = journal_of(tmp_path / "2", "train")
    assert [record.step for record in found] == [10, 20]
    for one, other in zip(expected, found, strict=True):
        for name in ("loss", "accuracy"):
            assert other.values[name] == pytest.approx(one.values[name], rel=LAST_BITS)
    (epoch,) = journal_of(tmp_path / "2", "epoch")
    assert epoch.values["validation_loss"] == pytest.approx(
        journal_of(tmp_path / "1", "epoch")[0].values["validation_loss"], rel=1e-5
    )
    assert told.count("in force") == told.count("step 20/20 100%") - 1 == 1
    assert told.count("report:") == 1
    assert (tmp_path / "2" / "report.html").stat().st_size > 10_000
    (last,) = (tmp_path / "2" / "checkpoints").glob("*-step-20.*")
    assert read_checkpoint(last)[1]["facts"]["num_ranks"] == 2


def kill_rank_one(torchrun: int) -> None:
    """SIGKILL, as the kernel does when memory is short."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text()
    for child in map(int, children.split()):
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if b"RANK=1" in environment:
            os.kill(child, signal.SIGKILL)
            return
    raise AssertionError("there is no rank 1")


@pytest.mark.slow
def test_a_killed_rank_costs_nothing_that_was_reported_saved(
    data: Path, tmp_path: Path
) -> None:
    """FSDP2 with weights in 16 bits and their remainders, started again by torchrun.

    The run goes on by itself from the last checkpoint, and ends with the bits of a run
    that nobody disturbed.
    """
    words = [
        *("--max-restarts", "1", *TRAIN, "kenken", "--preset", "tiny"),
        *("--precision", "bf16-true", "--steps", "24", "--checkpoint-every", "3"),
        *("--evaluate-every", "24", "--keep-last", "9", "--strategy", "fsdp"),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished(started(*words, "--out", str(whole), data=data))
    process = started(*words, "--out", str(killed), data=data)
    deadline = time.monotonic() + SECONDS
    reported: list[Record] = []
    while len(reported) < 2:
        assert process.poll() is None, finished(process)
        assert time.monotonic() < deadline
        time.sleep(0.01)
        if (killed / "metrics.jsonl").exists():
            reported = journal_of(killed, "saved")
    kill_rank_one(process.pid)
    for record in reported:
        read_checkpoint(killed / "checkpoints" / record.values["checkpoint"])
    told = finished(process)
    assert "exitcode: -9" in told
    names = [path.name for path in sorted((whole / "checkpoints").glob("0*"))]
    # had it begun anew, the numbers in front would have gone on
    assert names == [path.name for path in sorted((killed / "checkpoints").glob("0*"))]
    assert names[-1] == "0008-step-24.sharded"
    for part in ("part-00000.safetensors", "part-00001.safetensors"):
        one, other = (
            (run / "checkpoints" / names[-1] / part).read_bytes()
            for run in (whole, killed)
        )
        assert one == other
    steps = [record.step for record in journal_of(killed, "train")]
    assert steps == [10, 20]


@pytest.mark.slow
def test_what_compression_owes_is_in_the_checkpoint(data: Path, tmp_path: Path) -> None:
    """A run that goes on from the middle ends with the bits of one without a stop."""
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    words = [
        *(*TRAIN, "kenken", "--preset", "tiny", "--steps", "6", "--strategy", "ddp"),
        *("--compress", "powersgd:rank=2,start=2", "--keep-last", "9"),
        *("--checkpoint-every", "3", "--evaluate-every", "6"),
    ]
    finished(started(*words, "--out", str(whole), data=data))
    shutil.copytree(whole, halted)
    (last,) = (halted / "checkpoints").glob("*-step-6.*")
    last.unlink()
    finished(started(*words, "--out", str(halted), "--resume", data=data))
    trees = [
        read_checkpoint(next((run / "checkpoints").glob("*-step-6.*")))[1]
        for run in (whole, halted)
    ]
    for part in ("model", "not_sent"):
        assert bits_of(trees[0][part]) == bits_of(trees[1][part])
    owed = trees[0]["not_sent"]["errors"]
    assert owed
    assert all(each.shape[0] == 2 and each.any() for each in owed.values())
    assert trees[0]["facts"]["compress"] == "powersgd:rank=2,start=2"


def bits_of(tree: Any) -> Any:
    """A tree whose tensors are bytes."""
    if isinstance(tree, Mapping):
        return {name: bits_of(each) for name, each in tree.items()}
    return tree.numpy().tobytes() if isinstance(tree, torch.Tensor) else tree


@pytest.mark.slow
def test_mistakes_are_told_once(data: Path, tmp_path: Path) -> None:
    """By rank 0, with the remedy; and nobody waits for anybody."""
    words = [*TRAIN, "kenken", "--preset", "tiny", "--out", str(tmp_path / "x")]
    told = finished(started(*words, data=data), code=1)
    assert told.count("2 processes were started and would each train the same") == 1
    alone = started(*words, "--strategy", "ddp", data=data, ranks=1)
    assert "start them by torchrun --nproc-per-node N" in finished(alone, code=2)
    config = tmp_path / "odd.yaml"
    config.write_text("text: {batch_size: 3, sequence_length: 33}\n")
    words = [*TRAIN, "resolvent_lm", "--config", str(config), "--strategy", "fsdp"]
    told = finished(started(*words, "--out", str(tmp_path / "y"), data=data), code=1)
    assert told.count("got text.batch_size 3") == 1
