"""Recipes on two processes over gloo, as a user starts them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from castwise.checkpoints.container import read_checkpoint
from castwise.cli import root
from castwise.training.journal import Record
from torchrun_runs import (
    LAST_BITS,
    SECONDS,
    TRAIN,
    assert_same_end,
    bits_of,
    finished,
    journal_of,
    send_to_rank,
    started,
    wait_for_checkpoints,
)

LANGUAGE = """
text: {sequence_length: 24, batch_size: 4}
model: {dim: 16, num_blocks: 2, num_chains: 5, hidden: 24, num_heads: 2}
training: {num_validation: 6, log_every: 2}
"""
STEPS = {"kenken": 20, "resolvent_lm": 80}
FIRST = {"kenken": [10, 20], "resolvent_lm": [2, 4]}
"""Lines in which runs are compared; AdamW makes more of a last bit with every step."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where puzzles and tokens are cached for all runs, and a config stands."""
    place = tmp_path_factory.mktemp("data")
    (place / "small.yaml").write_text(LANGUAGE)
    return place


def words_of(recipe: str, data: Path, out: Path, *more: str) -> list[str]:
    """A run in fp32 that saves five times."""
    steps = STEPS[recipe]
    size = {
        "kenken": ("--preset", "tiny"),
        "resolvent_lm": ("--config", str(data / "small.yaml")),
    }[recipe]
    return [
        *(recipe, *size, "--precision", "32-true", "--out", str(out)),
        *("--steps", str(steps), "--evaluate-every", str(steps)),
        *("--checkpoint-every", str(steps // 5), "--keep-last", "9", *more),
    ]


Replicas = Callable[[str], tuple[Path, str]]


@pytest.fixture(scope="module")
def replicas(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Replicas:
    """Runs under DDP that nobody disturbs, one for each recipe, and what they said."""

    @cache
    def run(recipe: str) -> tuple[Path, str]:
        out = tmp_path_factory.mktemp("replicas") / recipe
        words = words_of(recipe, data, out, "--strategy", "ddp")
        return out, finished(started(*TRAIN, *words, data=data))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("recipe", STEPS)
def test_two_processes_reach_the_loss_of_one(
    replicas: Replicas, data: Path, tmp_path: Path, recipe: str
) -> None:
    """By DDP, in fp32, to the last bits: one display, one report, one journal."""
    folder, told = replicas(recipe)
    words = words_of(recipe, data, tmp_path / "one", "--threads", "1")
    alone = ["train", *words, "--data", str(data)]
    assert root.main(alone, standalone_mode=False) == 0
    for step in FIRST[recipe]:
        (one,), (two,) = (
            [each for each in journal_of(run, "train") if each.step == step]
            for run in (tmp_path / "one", folder)
        )
        assert two.values["loss"] == pytest.approx(one.values["loss"], rel=LAST_BITS)
    steps = STEPS[recipe]
    assert told.count("in force") == told.count("report:") == 1
    assert len(re.findall(rf"step {steps}/{steps} 100%", told)) == 2  # and validation
    assert len(journal_of(folder, "epoch")) == 1
    assert (folder / "report.html").stat().st_size > 10_000
    (last,) = (folder / "checkpoints").glob(f"*-step-{steps}.*")
    assert read_checkpoint(last)[1]["facts"]["num_ranks"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", STEPS)
def test_a_killed_replica_costs_no_bit(
    replicas: Replicas, data: Path, tmp_path: Path, recipe: str
) -> None:
    """The rank that writes is killed; torchrun starts all of them again."""
    words = words_of(recipe, data, tmp_path / "killed", "--strategy", "ddp")
    process = started("--max-restarts", "1", *TRAIN, *words, data=data)
    wait_for_checkpoints(process, tmp_path / "killed", 2)
    send_to_rank(0, process.pid, signal.SIGKILL)
    assert "exitcode: -9" in finished(process)
    whole, _ = replicas(recipe)
    assert_same_end(whole, tmp_path / "killed")
    names = [
        [path.name for path in sorted((run / "checkpoints").glob("0*"))]
        for run in (whole, tmp_path / "killed")
    ]
    assert names[0] == names[1]  # had it begun anew, their numbers would have gone on
    assert len(names[0]) == 5


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
        reported = journal_of(killed, "saved")
    send_to_rank(1, process.pid, signal.SIGKILL)
    for record in reported:
        read_checkpoint(killed / "checkpoints" / record.values["checkpoint"])
    assert "exitcode: -9" in finished(process)
    names = [path.name for path in sorted((whole / "checkpoints").glob("0*"))]
    assert names == [path.name for path in sorted((killed / "checkpoints").glob("0*"))]
    assert names[-1] == "0008-step-24.sharded"
    assert_same_end(whole, killed)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("kenken",), "2 processes were started and would each train the same"),
        (
            ("resolvent_lm", "--config", "odd.yaml", "--strategy", "fsdp"),
            "got text.batch_size 3",
        ),
        (
            ("soliton_lm", "--strategy", "ddp", "--devices", "3"),
            "torchrun has started 2 processes on this machine",
        ),
        (("kenken", "--strategy", "ddp", "--steps", "0"), "num_steps"),
    ],
)
def test_mistakes_are_told_once(
    data: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    """By one of the processes, with the remedy; and nobody waits for anybody."""
    odd = tmp_path / "odd.yaml"
    odd.write_text("text: {batch_size: 3, sequence_length: 33}\n")
    named = [str(odd) if word == "odd.yaml" else word for word in words]
    place = ("--out", str(tmp_path / "x"))
    told = finished(started(*TRAIN, *named, *place, data=data), code=1)
    assert told.count(said) == told.count("castwise: ") == 1


def test_one_process_cannot_be_replicas(data: Path) -> None:
    """Who starts them is named."""
    words = (*TRAIN, "kenken", "--preset", "tiny", "--strategy", "ddp")
    told = finished(started(*words, data=data, ranks=1), code=2)
    assert "start them by torchrun --nproc-per-node N" in told


ODD_ONE = """
import os, sys
import castwise
own = {own!r} if os.environ["RANK"] == "1" else []
if own == ["another version"]:
    castwise.__version__, own = "0.0.0", []
from castwise.cli import main
main(["train", "kenken", "--preset", "tiny", "--strategy", "ddp", *own, *sys.argv[1:]])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "said"),
    [
        (["another version"], "rank 1 has 'castwise 0.0.0' where rank 0 has"),
        (["--precision", "16-mixed"], "rank 1 has 'default: p=fp32,c=fp16"),
        (["--seed", "3"], "rank 1 has 'seed = 3' where rank 0 has 'seed = 0'"),
    ],
)
def test_a_rank_that_was_started_otherwise_is_named(
    data: Path, tmp_path: Path, own: list[str], said: str
) -> None:
    """Version, policy and settings; rank 0 says it, and all end."""
    script = tmp_path / "odd_one.py"
    script.write_text(ODD_ONE.format(own=own))
    words = (str(script), "--out", str(tmp_path / "x"))
    told = finished(started(*words, data=data), code=1)
    assert told.count(said) == 1
    assert told.count("this rank stops too") == 1
    assert not list(tmp_path.glob("x/checkpoints/*"))


def test_a_missing_rank_is_named_in_time(tmp_path: Path) -> None:
    """Two were announced and one came; it does not wait for ever."""
    with_no_one = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",  # any that is free
        "CASTWISE_MEET_SECONDS": "0.2",
    }
    words = ["kenken", "--preset", "tiny", "--strategy", "ddp"]
    found = subprocess.run(
        [sys.executable, *TRAIN, *words, "--out", str(tmp_path / "x")],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
        env={**os.environ, **with_no_one, "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 2
    assert "2 ranks must be there within 0.2 s and rank 1 is missing" in found.stderr
