"""castwise estimate on the command line, and --dry-run of the recipe."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from castwise.commands.estimate import OPTIMIZERS, resized
from castwise.distributed.rank_estimate import RankEstimate
from castwise.errors import SettingsError
from castwise.memory.estimate import Estimate
from command_line import Run

TARGET = """
import torch
from torch import nn
from torch.nn import functional


def build():
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3))
    batches = [(torch.randn(5, 6), torch.randint(3, (5,)))]
    return model, batches, functional.cross_entropy


def unborn():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(60_000, 60_000), nn.Linear(60_000, 3))
        batch = torch.empty(5, 60_000), torch.empty(5, dtype=torch.int64)
    return model, [batch], functional.cross_entropy


def reading():
    model, batches, _ = build()
    return model, batches, lambda out, _: out.sum() * float(out.sum())
"""


@pytest.fixture
def target(tmp_path: Path) -> str:
    """A file with three targets."""
    path = tmp_path / "net.py"
    path.write_text(TARGET)
    return str(path)


def test_table_and_record_tell_the_same(run: Run, target: str, tmp_path: Path) -> None:
    """The table is printed, the record written, and nothing fails."""
    record = tmp_path / "estimate.json"
    code, out, _ = run("estimate", f"{target}:build", "--json", record)
    told = Estimate.from_record(json.loads(record.read_text()))
    assert code == 0
    assert "195 parameters, bf16-mixed, optimizer AdamW" in out
    assert told.num_bytes("states") == 8 * 195 + 4 * 6
    for kind in told.by_kind():
        assert kind in out


def test_flags_reach_the_estimate(run: Run, target: str, tmp_path: Path) -> None:
    """Policy, optimizer, storage, batch size and recompute change what they should."""
    record = tmp_path / "estimate.json"
    words = ("--preset", "bf16-true", "--optimizer", "lion", "--storage", "master")
    more = ("--batch-size", 50, "--recompute", "0", "--json", record)
    assert run("estimate", f"{target}:build", *words, *more)[0] == 0
    told = Estimate.from_record(json.loads(record.read_text()))
    assert told.num_bytes("states") == 4 * 195
    assert told.num_bytes("storage") == 4 * 195
    assert told.num_bytes("batch") == 50 * (4 * 6 + 8)
    assert told.recompute == ("0",)


def test_a_model_that_fits_nowhere_is_told(
    run: Run, target: str, tmp_path: Path
) -> None:
    """14.4 GB of weights with their states are walked through on the meta device."""
    record = tmp_path / "estimate.json"
    words = ("--preset", "32-true", "--optimizer", "adamw", "--json", record)
    code, out, _ = run("estimate", f"{target}:unborn", *words)
    told = Estimate.from_record(json.loads(record.read_text()))
    assert code == 0
    assert "3,600,240,003 parameters" in out
    assert 16 * 3_600_240_003 < told.peak_bytes < 16.1 * 3_600_240_003


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_named_optimizer_works(run: Run, target: str, name: str) -> None:
    """Each name of the list can be asked about."""
    assert run("estimate", f"{target}:build", "--optimizer", name)[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--optimizer", "admw"), "did you mean adamw"),
        (("--storage", "split"), "holds none"),
        (("--preset", "bf16-true", "--storage", "spilt"), "storage"),
        (("--recompute", "nine"), "finds no module"),
        (("--batch-size", 0), "0 is not in the range"),
    ],
)
def test_mistakes_leave_with_2(
    run: Run, target: str, words: tuple[str, ...], said: str
) -> None:
    """Every wrong flag is one sentence with its remedy."""
    code, _, err = run("estimate", f"{target}:build", *words)
    assert code == 2
    assert said in err


def test_ranks_are_told_with_what_they_send(
    run: Run, target: str, tmp_path: Path
) -> None:
    """The table is that of one rank, and a sentence tells the messages."""
    record = tmp_path / "ranks.json"
    words = ("--ranks", 4, "--strategy", "ddp", "--json", record)
    code, out, _ = run("estimate", f"{target}:build", *words)
    told = RankEstimate.from_record(json.loads(record.read_text()))
    assert code == 0
    assert (told.num_ranks, told.strategy) == (4, "ddp")
    assert told.bytes_sent == round(2 * 3 / 4 * 4 * 195)
    assert "each of 4 ranks under ddp" in out
    code, _, err = run("estimate", f"{target}:build", "--strategy", "fsdp")
    assert code == 2
    assert "--ranks" in err


def test_a_loss_that_reads_numbers_is_told(run: Run, target: str) -> None:
    """Nothing has numbers here, and the message says what to do."""
    code, _, err = run("estimate", f"{target}:reading")
    assert code == 2
    assert "branch on shapes" in err


def test_only_what_has_rows_is_resized() -> None:
    """Tensors with as many rows as the first get the new number, others stay."""
    table = torch.ones(7, 2)
    x, pair, y = resized((torch.ones(5, 3), {"a": torch.ones(5), "b": table}, 3), 9)
    assert (x.shape, pair["a"].shape, pair["b"] is table, y) == ((9, 3), (9,), True, 3)
    with pytest.raises(SettingsError, match="has rows"):
        resized((1, 2), 3)


def peak_of(out: str) -> float:
    """The peak in MiB that a dry run prints for batches of size 4."""
    return float(re.search(r"batches of size 4: peak ([\d.]+) MiB", out)[1])


def test_a_dry_run_of_the_recipe_tells_and_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest size is shown, the exit code is 0, and no folder was made."""
    monkeypatch.chdir(tmp_path)
    words = ("train", "kenken", "--dry-run", "--preset", "tiny")
    code, out, _ = run(*words)
    assert code == 0
    assert "batches of size 4: peak" in out
    code, again, _ = run(*words, "--grad-checkpoint")
    assert code == 0
    assert peak_of(again) < 0.8 * peak_of(out)
    assert "averages" not in out
    assert not list(tmp_path.iterdir())
    code, _, err = run(*words, "--hybrid")
    assert code == 2
    assert "leave one of them out" in err
