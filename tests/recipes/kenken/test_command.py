"""The commands as a person uses them, and every mistake a person makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from castwise.checkpoints import CheckpointShelf
from castwise.recipes.kenken.solver import KIND

TRAIN = ("train", "kenken", "--preset", "tiny", "--threads", "1")


def castwise(
    *arguments: str,
    text: str | None = None,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the command line in its own process."""
    return subprocess.run(
        [sys.executable, "-m", "castwise", *arguments],
        check=False,
        input=text,
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "100",
            **(environment or {}),
        },
    )


def assert_one_sentence(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2, one line on standard error, no traceback, the words in it."""
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("castwise: ")
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "chess"), ("chess", "--help")),
        ((*TRAIN, "--colour", "red"), ("--colour",)),
        ((*TRAIN, "--dtype", "bf17"), ("bf17", "bf16")),
        ((*TRAIN, "--precision", "bf15-mixed"), ("bf15-mixed", "bf16-mixed")),
        ((*TRAIN, "--dtype", "bf16", "--precision", "32-true"), ("--dtype",)),
        ((*TRAIN, "--policy", "nowhere.yaml"), ("nowhere.yaml",)),
        ((*TRAIN, "--device", "toaster"), ("toaster", "cuda")),
        ((*TRAIN, "--optimizer", "adamw9bit"), ("adamw8bit", "lion")),
        ((*TRAIN, "--storage", "splt"), ("splt", "split", "kahan")),
        ((*TRAIN, "--sizes", "4,x"), ("4,x", "--sizes")),
        ((*TRAIN, "--sizes", "4,99"), ("99",)),
        ((*TRAIN, "--modes", "roman"), ("roman", "negative")),
        ((*TRAIN, "--steps", "0"), ("num_steps",)),
        ((*TRAIN, "--resume"), ("--resume",)),
        ((*TRAIN, "--out", "/proc/castwise"), ("/proc/castwise", "--out")),
        (("kenken", "solve", "nowhere.txt"), ("nowhere.txt",)),
        (("kenken", "make", "--size", "77"), ("77",)),
        (("kenken", "make", "--out", "/proc/x/y.txt"), ("/proc/x",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_sentence(
    arguments: tuple[str, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    """Every wrong flag or place is explained, and nothing is left behind."""
    assert_one_sentence(castwise(*arguments, cwd=tmp_path), *words)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("castwise: 1\ndefault: p=fp33\n", ("policy.yaml:2", "fp33")),
        ("castwise: 1\n  default: [", ("policy.yaml:",)),
        (
            "castwise: 1\ndefault: bf16-mixed-up\n",
            ("policy.yaml:2",),
        ),
        (
            (
                "castwise: 1\ndefault: p=fp32,c=bf16,o=bf16,r=fp32\nrules:\n"
                "  - module: propagator\n    precision: fp32\n"
            ),
            ("policy.yaml:4", "propagator"),
        ),
        ("castwise: 1\ndefault: p=fp32,c=tf32,o=fp32,r=fp32\n", ("tf32", "fp32")),
    ],
)
def test_a_wrong_policy_file_is_one_sentence(
    policy: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    """The sentence names the file and the line, or what the device cannot do."""
    (tmp_path / "policy.yaml").write_text(policy)
    done = castwise(
        *TRAIN, "--policy", "policy.yaml", "--data", str(tmp_path / "d"), cwd=tmp_path
    )
    assert_one_sentence(done, *words)


def test_puzzles_that_are_made_can_be_read_in_both_forms(tmp_path: Path) -> None:
    """`make` writes what `solve` reads; equal seeds make equal puzzles."""
    from castwise.recipes.kenken.notation import read_puzzles

    plain = castwise("kenken", "make", "--size", "4", "--count", "2")
    (tmp_path / "a.txt").write_text(plain.stdout)
    out = tmp_path / "a.json"
    castwise(
        *("kenken", "make", "--size", "4", "--count", "2", "--format", "json"),
        *("--out", str(out)),
    )
    assert read_puzzles(str(tmp_path / "a.txt")) == read_puzzles(str(out))
    assert len(read_puzzles(str(out))) == 2
    json.loads(out.read_text().splitlines()[0])


@pytest.mark.slow
def test_one_run_from_data_to_report_and_a_solved_puzzle(tmp_path: Path) -> None:
    """Train, read the report and the journal, then solve from standard input."""
    done = castwise(
        *(*TRAIN, "--steps", "20", "--sizes", "4", "--dtype", "bf16"),
        *("--data", str(tmp_path / "d")),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "effective" in done.stdout
    run = tmp_path / "runs" / "kenken" / "001"
    report = json.loads((run / "report.json").read_text())
    text = json.dumps(report)
    assert "bf16" in text
    assert "--dtype bf16" in text
    page = (run / "report.html").read_text()
    assert "<svg" in page
    lines = (run / "metrics.jsonl").read_text().splitlines()
    events = {json.loads(line)["event"] for line in lines}
    assert {"train", "epoch", "final"} <= events

    made = castwise("kenken", "make", "--size", "4")
    solved = castwise("kenken", "solve", text=made.stdout, cwd=tmp_path)
    assert solved.returncode in {0, 1}, solved.stderr
    assert "unique solution proved" in solved.stdout

    impossible = made.stdout.replace("a 6x", "a 7x")
    assert impossible != made.stdout
    refused = castwise("kenken", "solve", text=impossible, cwd=tmp_path)
    assert_one_sentence(refused, "7", "<stdin>:9")
    (run / "checkpoints" / "junk.safetensors").write_bytes(b"not a checkpoint")
    foreign = castwise(
        *(
            "kenken",
            "solve",
            "--checkpoint",
            "runs/kenken/001/checkpoints/junk.safetensors",
        ),
        text=made.stdout,
        cwd=tmp_path,
    )
    assert_one_sentence(foreign, "junk.safetensors")


@pytest.mark.slow
def test_the_optimizer_is_recorded_and_a_resumed_run_keeps_it(tmp_path: Path) -> None:
    """A fallback stands in log, checkpoint and report; another one is refused."""
    broken = tmp_path / "packages"
    broken.mkdir()
    (broken / "bitsandbytes.py").write_text("raise ImportError('no CUDA here')")
    out = tmp_path / "run"
    asked = ("--optimizer", "bnb8bit", "--precision", "bf16-true")
    arguments = [*TRAIN, "--steps", "2", "--sizes", "4", "--modes", "standard"]
    arguments += ["--checkpoint-every", "1", "--evaluate-every", "2"]
    arguments += ["--out", str(out), "--data", str(tmp_path / "data"), *asked]
    paths = {"PYTHONPATH": str(broken)}

    refused = castwise(*arguments, environment=paths)
    assert_one_sentence(refused, "--optimizer bnb8bit", "no CUDA here", "fallback")
    done = castwise(*arguments, "--optimizer-fallback", "adamw8bit", environment=paths)
    assert done.returncode == 0, done.stderr
    line = "--optimizer-fallback instead of bnb8bit"
    assert line in " ".join(done.stdout.split())
    assert "stored as split" in " ".join(done.stdout.split())
    found = CheckpointShelf(folder=out / "checkpoints", kind=KIND).latest().value
    assert found is not None
    facts = found.tree["facts"]["optimizer"]
    assert (facts["asked"], facts["in_force"]) == ("bnb8bit", "adamw8bit")
    assert facts["because"].startswith(line)
    assert "bnb8bit" in (out / "report.html").read_text()

    again = [*TRAIN[:2], "--resume", "--out", str(out)]
    other = castwise(*again, "--optimizer", "lion")
    assert_one_sentence(other, "--optimizer is 'bnb8bit' there but 'lion' here")
    stored = castwise(*again, "--storage", "kahan")
    assert_one_sentence(stored, "--storage is 'split' there but 'kahan' here")
