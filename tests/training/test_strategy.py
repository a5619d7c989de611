from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import castwise as cw
from castwise.checkpoints import CheckpointShelf
from castwise.decision import Decision
from castwise.distributed.ranks import Ranks
from castwise.errors import SettingsError
from castwise.recipes.launch import open_launch
from castwise.training.journal import Journal
from castwise.training.run_folder import open_run_folder
from castwise.training.strategy import Strategy

CPU = Decision(torch.device("cpu"), "the test says so")


def test_several_processes_need_a_strategy() -> None:
    """Or each would train the same, into the same folder."""
    with pytest.raises(SettingsError, match="3 processes were started"):
        Strategy(ranks=Ranks(rank=1, num_ranks=3))
    with pytest.raises(SettingsError, match="one, ddp, fsdp, got 'dp'"):
        Strategy(name="dp")  # type: ignore[arg-type]


def test_one_process_does_what_it_always_did(tmp_path: Path) -> None:
    """No wrapper, no sum, and the file stands when `begin` returns."""
    strategy, model = Strategy(), nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = cw.prepare(model, optimizer, cw.preset("32-true"))
    assert strategy.forward_of(model, run) is model
    assert strategy.means({"loss": 2.5}) == {"loss": 2.5}
    assert strategy.gathered("mine") == ["mine"]
    shelf = CheckpointShelf(folder=tmp_path, kind="k")
    saves = strategy.saves(shelf)
    assert saves.begin(7, {"w": torch.arange(5)}, 0.5) == saves.wait() == []
    found = shelf.best().value
    assert found is not None
    assert found.step == 7


def test_other_ranks_of_ddp_write_nothing(tmp_path: Path) -> None:
    """Neither a checkpoint nor a line."""
    second = Strategy(name="ddp", ranks=Ranks(rank=1, num_ranks=2))
    shelf = CheckpointShelf(folder=tmp_path / "checkpoints", kind="k")
    second.saves(shelf).begin(7, {}, None)
    journal = Journal(tmp_path, writes=second.ranks.is_first)
    journal.write("train", 1, {"loss": 2.0})
    journal.rewind(0)
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_is_started_again_finds_its_run(tmp_path: Path) -> None:
    """From a whole checkpoint on; what was killed half-way is none."""
    run = tmp_path / "run"
    shelf = CheckpointShelf(folder=run / "checkpoints", kind="k")
    first = open_run_folder(out=run, parent=tmp_path, resume=False)
    assert not first.resuming
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / ".0001-step-3.sharded.part").mkdir()
    with Journal(run, tensorboard=False) as journal:
        journal.write("train", 1, {})
    with pytest.raises(SettingsError, match="holds a run already"):
        open_run_folder(out=run, parent=tmp_path, resume=False)
    again = open_run_folder(out=run, parent=tmp_path, resume=False, again=True)
    assert not again.resuming
    shelf.save(3, {})
    again = open_run_folder(out=run, parent=tmp_path, resume=False, again=True)
    assert again.resuming


def test_a_run_that_may_be_restarted_needs_its_folder_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command has to find it."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    with (
        open_launch(asked=None, device=CPU) as launch,
        pytest.raises(SettingsError, match="name its folder with --out"),
    ):
        launch.open_folder(out=None, parent=tmp_path, resume=False)


def test_a_strategy_needs_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that starts them."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with (
        pytest.raises(SettingsError, match="torchrun --nproc-per-node N"),
        open_launch(asked="fsdp", device=CPU),
    ):
        raise AssertionError("this was to be refused")
