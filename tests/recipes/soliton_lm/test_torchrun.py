"""`torchrun ... castwise train soliton_lm`, by Lightning's DDP and by FSDP2 in it."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from castwise.checkpoints.container import read_checkpoint
from castwise.cli import root
from castwise.decision import Decision
from castwise.errors import SettingsError
from language_runs import LanguageRuns
from torchrun_runs import (
    LAST_BITS,
    TRAIN,
    assert_same_end,
    bits_of,
    finished,
    journal_of,
    send_to_rank,
    started,
    wait_for_checkpoints,
)

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule

from castwise.recipes.language.token_file import TokenBatch
from castwise.recipes.soliton_lm import spread
from castwise.recipes.soliton_lm.model import RECIPE
from castwise.recipes.soliton_lm.module import SolitonModule

SMALL = """
text: {sequence_length: 24, batch_size: 4}
model: {dim: 16, num_blocks: 2, num_heads: 2, hidden: 12, num_propagators: 2}
training: {num_steps: 10, evaluate_every: 6, num_validation: 5, checkpoint_every: 3}
"""
RUNS = LanguageRuns(recipe=RECIPE.name, kind=RECIPE.kind, config=SMALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small config, and a cache of tokens for all runs of this file."""
    return RUNS.prepare(tmp_path_factory.mktemp("lm"))


def words_of(place: Path, out: str, *more: str) -> list[str]:
    """The command of a run."""
    config = str(place / "small.yaml")
    return [
        *(*TRAIN, "soliton_lm", "--config", config, "--out", str(place / out)),
        *("--keep-last", "9", *more),
    ]


def assert_loss_of_one(place: Path, out: str) -> None:
    """Compare a run in fp32 with that of one process, line by line."""
    if not (place / "one").exists():
        RUNS.run(place, "one", "--precision", "32-true")
    for event, name in (("train", "loss"), ("epoch", "validation_loss")):
        both = [
            {each.step: each.values[name] for each in journal_of(place / run, event)}
            for run in ("one", out)
        ]
        assert both[1] == pytest.approx(both[0], rel=LAST_BITS)
        assert both[0]


@pytest.mark.slow
def test_replicas_reach_the_loss_of_one_process(place: Path) -> None:
    """With one display and one report; --devices is torchrun's business."""
    words = words_of(place, "ddp", "--precision", "32-true", "--strategy", "ddp")
    told = finished(started(*words, data=place / "data"))
    assert_loss_of_one(place, "ddp")
    assert told.count("in force") == told.count("report:") == 1
    assert len(re.findall("step 10/10", told)) <= 2  # one display: it ends twice
    assert (place / "ddp" / "report.html").stat().st_size > 10_000
    facts = RUNS.tree_of(place, "ddp")["facts"]
    assert (facts["strategy"], facts["num_ranks"]) == ("ddp", 2)


@pytest.mark.slow
def test_shards_reach_it_and_go_on_from_parts(place: Path) -> None:
    """Under FSDP2 each rank saves its part; both ranks, or one process, go on."""
    words = words_of(place, "fsdp", "--precision", "32-true", "--strategy", "fsdp")
    finished(started(*words, data=place / "data"))
    assert_loss_of_one(place, "fsdp")
    names = sorted(each.name for each in (place / "fsdp" / "checkpoints").iterdir())
    assert [name[4:] for name in names] == [
        f"-step-{step}.sharded" for step in (3, 6, 9, 10)
    ]
    saved = journal_of(place / "fsdp", "saved")
    assert [each.values["checkpoint"] for each in saved] == names
    for out in ("again", "alone"):
        shutil.copytree(place / "fsdp", place / out)
        for name in names[2:]:
            shutil.rmtree(place / out / "checkpoints" / name)
    again = words_of(place, "again", "--resume", "--strategy", "fsdp")
    finished(started(*again, data=place / "data"))
    assert_same_end(place / "fsdp", place / "again")
    told = RUNS.run(place, "alone", "--resume")
    assert "strategy differs from the checkpoint" in told
    assert_loss_of_one(place, "alone")
    sample = ["sample", str(place / "fsdp"), "--tokens", "3"]
    assert CliRunner().invoke(root, sample).exit_code == 0


@pytest.mark.slow
def test_gradients_travel_as_the_flag_says_and_what_is_owed_is_saved(
    place: Path,
) -> None:
    """Lightning's DDP sums by `castwise.replicate`; a resumed run has the same bits."""
    how = ("--strategy", "ddp", "--compress", "powersgd:rank=2,start=2", "--steps", "6")
    more = ("--precision", "bf16-mixed", *how)
    finished(started(*words_of(place, "owed", *more), data=place / "data"))
    shutil.copytree(place / "owed", place / "resumed")
    (last,) = (place / "resumed" / "checkpoints").glob("*-step-6.*")
    last.unlink()
    again = words_of(place, "resumed", "--resume", *how)
    finished(started(*again, data=place / "data"))
    trees = [RUNS.tree_of(place, out) for out in ("owed", "resumed")]
    for part in ("not_sent", "lightning"):
        states = [bits_of(tree[part]) for tree in trees]
        for tree in states:
            tree.pop("loops", None)  # how long each of them took
        assert states[0] == states[1]
    assert any(each.any() for each in trees[0]["not_sent"]["errors"].values())
    assert trees[0]["facts"]["compress"] == "powersgd:rank=2,start=2"


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_same_step(place: Path) -> None:
    """Weights in 16 bits and their remainders, in parts; the checkpoint is whole."""
    more = ("--precision", "bf16-true", "--strategy", "fsdp", "--steps", "3000")
    process = started(*words_of(place, "stopped", *more), data=place / "data")
    wait_for_checkpoints(process, place / "stopped", 1)
    send_to_rank(1, process.pid, signal.SIGTERM)
    told = finished(process, code=1)
    assert told.count("Stopped by SIGTERM after step") == 1
    last = max((place / "stopped" / "checkpoints").glob("0*"))
    step = int(re.search(r"after step (\d+)", told)[1])  # type: ignore[index]
    assert last.name.endswith(f"-step-{step}.sharded")
    states = read_checkpoint(last)[1]["lightning"]["state_dict"]
    assert {each.dtype for each in states.values()} >= {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_share_a_batch_and_its_measures(num_ranks: int) -> None:
    """Every window once; where a last batch is too short, some ranks count nothing."""
    rows = torch.arange(4 * 7).reshape(4, 7)
    batch = TokenBatch(tokens=rows, targets=rows + 1)
    short = TokenBatch(tokens=rows[:2], targets=rows[:2] + 1)
    seen, counted = [], []
    for rank in range(num_ranks):
        module = SolitonModule.__new__(SolitonModule)
        LightningModule.__init__(module)
        trainer: Any = SimpleNamespace(global_rank=rank, world_size=num_ranks)
        module._trainer = trainer
        seen.append(module.share_of(batch)[0])
        tokens, targets, num_tokens = module._measured_of(short)
        assert len(tokens) == len(targets) > 0
        counted.append(int(num_tokens))
    together = torch.cat(seen)
    assert torch.equal(together[together[:, 0].argsort()], rows)
    assert sum(counted) == short.targets.numel()


def torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process be rank 0 of two."""
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "castwise",
    }.items():
        monkeypatch.setenv(name, value)


def test_torchrun_says_how_many_devices_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And another number is refused, as it is elsewhere when it is none."""
    assert spread.shape_for_trainer(None) == {"devices": 1}
    assert spread.shape_for_trainer("auto") == {"devices": "auto"}
    torchrun_says(monkeypatch)
    for asked in (None, "auto", "2"):
        assert spread.shape_for_trainer(asked) == {"devices": 2, "num_nodes": 1}
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert spread.shape_for_trainer(None) == {"devices": 2, "num_nodes": 3}
    with pytest.raises(SettingsError, match=r"started 2 processes.*--devices 3"):
        spread.shape_for_trainer("3")


def test_strategies_that_cannot_be_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FSDP2 needs torchrun, which leaves no other strategy of Lightning to choose."""
    device = Decision(torch.device("cpu"), "test")
    for words in (("fsdp", device), ("ddp", device, "powersgd:rank=4")):
        with (
            pytest.raises(SettingsError, match="torchrun --nproc-per-node"),
            spread.open_spread(*words),
        ):
            pass
    torchrun_says(monkeypatch)
    with (
        pytest.raises(SettingsError, match=r"auto, ddp, fsdp, got 'ddp_spawn'"),
        spread.open_spread("ddp_spawn", device),
    ):
        pass
