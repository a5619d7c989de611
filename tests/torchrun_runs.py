"""Commands on two processes over gloo, as a user starts them, for tests of recipes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from castwise.checkpoints.container import read_checkpoint
from castwise.training.journal import Record, read_journal

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
TRAIN = ["-m", "castwise", "train"]
SECONDS = 280
LAST_BITS = 2e-6
"""Of a loss in fp32 after a few steps; measured: 1e-7."""


def started(*words: str, data: Path, ranks: int = 2) -> subprocess.Popen[str]:
    """Start a command, alone or on several processes."""
    launcher = [] if ranks == 1 else [*TORCHRUN, str(ranks)]
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
    """Lines of one kind; none before there is a journal."""
    if not (folder / "metrics.jsonl").exists():
        return []
    return [record for record in read_journal(folder) if record.event == event]


def wait_for_checkpoints(
    process: subprocess.Popen[str], folder: Path, number: int
) -> None:
    """Wait until a run has as many whole checkpoints on its shelf."""
    deadline = time.monotonic() + SECONDS
    while len(list((folder / "checkpoints").glob("0*"))) < number:
        assert process.poll() is None, finished(process)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def send_to_rank(rank: int, torchrun: int, what: signal.Signals) -> None:
    """Send a signal to one process, as the kernel does when memory is short."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text()
    for child in map(int, children.split()):
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            os.kill(child, what)
            return
    raise AssertionError(f"there is no rank {rank}")


def assert_same_end(one: Path, other: Path) -> None:
    """Compare the last checkpoints of two runs: names, and every tensor to its bits.

    Only how long steps took is left out: it stands in the index of a folder of parts,
    and under `position` in a file.
    """
    shelves = [sorted((run / "checkpoints").glob("0*")) for run in (one, other)]
    assert shelves[0][-1].name == shelves[1][-1].name
    last = [shelf[-1] for shelf in shelves]
    if last[0].is_dir():
        for name in ("part-00000.safetensors", "part-00001.safetensors"):
            assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name
        return
    trees = [read_checkpoint(path)[1] for path in last]
    for tree in trees:
        del tree["position"]["train_seconds"]
    assert bits_of(trees[0]) == bits_of(trees[1])


def bits_of(tree: Any) -> Any:
    """A tree whose tensors and arrays are bytes."""
    if isinstance(tree, Mapping):
        return {name: bits_of(each) for name, each in tree.items()}
    if isinstance(tree, list | tuple):
        return [bits_of(each) for each in tree]
    if isinstance(tree, np.ndarray):
        return tree.tobytes()
    if not isinstance(tree, torch.Tensor):
        return tree
    return tree.contiguous().flatten().view(torch.uint8).numpy().tobytes()
