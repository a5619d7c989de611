"""--grad-checkpoint and --profile change no bit of a run; a resume may drop them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from castwise.checkpoints import CheckpointShelf
from castwise.recipes.kenken.solver import KIND
from castwise.training.journal import read_journal
from command_line import runner

STEPS = 12
COMMAND = (
    *("train", "kenken", "--preset", "tiny", "--threads", "1", "--device", "cpu"),
    *("--evaluate-every", "6", "--checkpoint-every", "6", "--keep-last", "9"),
    *("--sizes", "4", "--modes", "standard", "--dtype", "bf16"),
)


def weights_of(out: Path) -> dict[str, Any]:
    """Model and optimizer of the newest checkpoint, every tensor by its path."""
    found = CheckpointShelf(folder=out / "checkpoints", kind=KIND).latest().value
    assert found is not None
    assert found.step == STEPS
    flat: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for name, each in value.items():
                walk(each, f"{path}/{name}")
        elif isinstance(value, torch.Tensor):
            flat[path] = value

    walk({name: found.tree[name] for name in ("model", "optimizer")}, "")
    return flat


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Bit by bit."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.slow
def test_no_bit_depends_on_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run with both ends as one without; so does one that was resumed without."""
    run = runner(capsys)
    data = ("--data", tmp_path / "puzzles")
    plain, both = tmp_path / "plain", tmp_path / "both"
    steps = ("--steps", STEPS)
    assert run(*COMMAND, *steps, *data, "--out", plain)[0] == 0
    flags = ("--grad-checkpoint", "--profile", "2:3")
    code, out, _ = run(*COMMAND, *steps, *data, "--out", both, *flags)
    assert code == 0
    assert_same(weights_of(both), weights_of(plain))

    assert "recompute blocks.0" in out
    assert "3 steps, " in out
    assert "waiting for data" in out
    table = json.loads((both / "profile" / "profile.json").read_text())
    assert {"blocks.0.up", "(data)", "(update)"} <= {
        m["name"] for m in table["modules"]
    }
    assert {f["name"] for f in table["formats"]} >= {"bf16", "fp32"}
    assert (both / "profile" / "trace.json.gz").exists()
    lines = {r.event: r for r in read_journal(both)}
    assert lines["profile"].step == 5
    assert lines["profile"].values["num_casts"] > 0
    assert 0 < lines["train"].values["data_share"] < 1

    newest = sorted((both / "checkpoints").iterdir())
    for path in newest:
        if f"{STEPS:08d}" in path.name or path.stem.endswith(str(STEPS)):
            path.unlink()
    assert run("train", "kenken", "--resume", *data, "--out", both)[0] == 0
    assert_same(weights_of(both), weights_of(plain))


def test_a_wrong_window_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything is made."""
    out = tmp_path / "run"
    code, _, complaint = runner(capsys)(*COMMAND, "--profile", "ten", "--out", out)
    assert code == 2
    assert "--profile 10:3" in complaint
    assert not out.exists()
