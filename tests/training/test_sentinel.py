"""The sentinel: bad steps are taken back, modules go up with a reason and come back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import castwise as cw
from castwise.checkpoints import CheckpointShelf
from castwise.errors import SettingsError, StepError
from castwise.memory.monitor import MemoryMonitor
from castwise.training.averages import NoAverages
from castwise.training.display import NullDisplay
from castwise.training.journal import Journal, read_journal
from castwise.training.random_state import capture_random_states, seed_everything
from castwise.training.rollback import Rollback
from castwise.training.schedule import WarmupStableDecay
from castwise.training.sentinel import RolledBack, Sentinel, SentinelSettings
from castwise.training.trainer import BatchLoss, Task, Trainer, TrainerSettings
from two_ranks import TwoRanks


class Square(nn.Module):
    """Overflows fp16 from 256 on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Square."""
        return x * x


class Far(nn.Module):
    """Loses most digits of bf16 on the way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """There and back."""
        return (x + 100.0) - 100.0


def make_model(middle: nn.Module) -> nn.Sequential:
    """A planted module between two usual ones, with buffers and dropout."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(5, 7), middle, nn.BatchNorm1d(7), nn.Dropout(0.1), nn.Linear(7, 2)
    )


def make_run(policy: str, middle: nn.Module | None = None, **more: Any) -> cw.Run:
    """A run of that model."""
    model = make_model(middle or Square())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return cw.prepare(model, optimizer, cw.preset(policy), **more)


def batch(step: int, size: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A function of the step; a large size makes hidden values large."""
    chance = torch.Generator().manual_seed(step)
    x = size * torch.randn(9, 5, generator=chance)
    return x, torch.randn(9, 2, generator=chance)


def guarded(guard: Sentinel, run: cw.Run, step: int, size: float = 1.0) -> Any:
    """One step of a squared error."""
    x, y = batch(step, size)
    return guard.step(lambda: functional.mse_loss(run.model(x), y))


def plain(run: cw.Run, step: int, size: float = 1.0) -> Any:
    """The same without a sentinel."""
    x, y = batch(step, size)
    with run.step() as open_step:
        open_step.backward(functional.mse_loss(run.model(x), y))
    return open_step.outcome


def bits(run: cw.Run) -> dict[str, Any]:
    """Everything that a step changes, copied."""
    return copy.deepcopy(
        {
            "model": run.model.state_dict(),
            "moments": run.optimizer.state_dict()["state"],
            "scale": run.loss_scale.state_dict(),
            "counters": (run.num_stepped, run.num_skipped),
            "random": capture_random_states(),
        }
    )


def same(one: Any, other: Any) -> bool:
    """Whether two trees are equal bit by bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype is other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return all(map(same, one, other))
    return bool((one == other).all()) if hasattr(one, "all") else bool(one == other)


def test_a_planted_overflow_is_taken_back_cured_and_told() -> None:
    """The module is promoted with its reason, and the step ends as if it had been."""
    run = make_run("16-mixed", loss_scale=cw.DynamicScale(initial=2.0**8))
    guard = Sentinel(run, SentinelSettings(probe_every=0))
    for step in range(3):
        assert isinstance(guarded(guard, run, step), cw.Stepped)
    reference = make_run("16-mixed")
    reference.model.load_state_dict(run.model.state_dict())
    reference.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    reference.load_state_dict(run.state_dict())
    reference.override("1", "c=fp32,o=fp32", because="from the start")
    torch.manual_seed(11)
    outcome = guarded(guard, run, 3, size=1000.0)
    torch.manual_seed(11)
    plain(reference, 3, size=1000.0)
    assert isinstance(outcome, cw.Stepped)
    assert guard.num_rollbacks == 1
    (change,) = run.changes
    assert (change.step, change.module) == (3, "1")
    assert change.precision == "c=fp32,o=fp32"
    assert "overflows fp16" in change.because
    assert same(bits(run), bits(reference))
    assert "because" in run.applied.bound.explain("1")


def test_without_a_sentinel_the_same_step_is_lost() -> None:
    """The plant is real: the step is skipped at every scale."""
    run = make_run("16-mixed")
    outcome = plain(run, 3, size=1000.0)
    assert isinstance(outcome, cw.Skipped)
    assert outcome.module == "1"
    assert outcome.gone_at is None


def test_a_clean_run_is_not_touched() -> None:
    """No promotion, no rollback, and the bits of a run that nobody guards."""
    bare, run = make_run("bf16-mixed"), make_run("bf16-mixed")
    guard = Sentinel(run, SentinelSettings(probe_every=2))
    for each, step_of in ((bare, plain), (run, None)):
        torch.manual_seed(7)
        for step in range(7):
            if step_of is None:
                guarded(guard, each, step)
            else:
                step_of(each, step)
    assert run.changes == ()
    assert guard.num_rollbacks == 0
    assert 0 < max(guard.errors.values()) < 0.02
    assert same(bits(run), bits(bare))


def test_overflowing_gradients_are_left_to_the_loss_scale() -> None:
    """A scale that is too high at first backs off, and no module is promoted."""
    run = make_run("16-mixed", loss_scale=cw.DynamicScale(initial=2.0**24))
    guard = Sentinel(run, SentinelSettings(probe_every=0))
    outcomes = [guarded(guard, run, step) for step in range(12)]
    assert isinstance(outcomes[0], cw.Skipped)
    assert isinstance(outcomes[-1], cw.Stepped)
    assert run.loss_scale.scale < 2.0**24
    assert run.changes == ()


def test_a_module_comes_back_when_it_is_calm() -> None:
    """After two probes in a row; the way back is an entry of the history too."""
    run = make_run("16-mixed")
    guard = Sentinel(run, SentinelSettings(probe_every=2, calm_probes=2))
    guarded(guard, run, 0, size=1000.0)
    assert [change.module for change in run.changes] == ["1"]
    for step in range(1, 4):  # a probe before step 2 sees large numbers and is not calm
        guarded(guard, run, step, size=1000.0)
    assert len(run.changes) == 1
    for step in range(4, 8):
        guarded(guard, run, step)
    promoted, back = run.changes
    assert back.module == promoted.module
    assert back.precision is None
    assert "calm in 2 probes" in back.because
    assert run.applied.bound.precision_of("1").compute == "fp16"
    outcome = guarded(guard, run, 8, size=1000.0)
    assert isinstance(outcome, cw.Stepped)
    assert len(run.changes) == 3


def test_a_module_whose_error_crosses_the_line_is_promoted() -> None:
    """Adding 100 and taking it away keeps one digit in bf16; others keep theirs."""
    run = make_run("bf16-mixed", Far())
    guard = Sentinel(run, SentinelSettings(probe_every=4))
    for step in range(2):
        guarded(guard, run, step)
    (change,) = run.changes
    assert change.module == "1"
    assert "the line is 0.1" in change.because
    assert guard.errors["1"] > 0.1
    assert max(guard.errors["0"], guard.errors["4"]) < 0.02


def test_promotions_survive_checkpoint_and_resume(tmp_path: Path) -> None:
    """The resumed run has the same history and ends with the same bits."""
    run = make_run("16-mixed")
    guard = Sentinel(run, SentinelSettings(probe_every=3, calm_probes=2))
    for step in range(4):
        guarded(guard, run, step, size=1000.0 if step == 2 else 1.0)
    assert len(run.changes) == 1
    tree = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "run": run.state_dict(),
        "sentinel": guard.state_dict(),
    }
    path = tmp_path / "state.safetensors"
    cw.save_checkpoint(path, tree, kind="test")
    torch.manual_seed(5)
    for step in range(4, 12):
        guarded(guard, run, step)
    found = cw.load_checkpoint(path, kind="test")
    fresh = make_run("16-mixed")
    other = Sentinel(fresh, SentinelSettings(probe_every=3, calm_probes=2))
    fresh.model.load_state_dict(found["model"])
    fresh.optimizer.load_state_dict(found["optimizer"])
    fresh.load_state_dict(found["run"])
    other.load_state_dict(found["sentinel"])
    assert fresh.applied.bound.precision_of("1").compute == "fp32"
    torch.manual_seed(5)
    for step in range(4, 12):
        guarded(other, fresh, step)
    assert len(run.changes) == 2
    assert fresh.changes == run.changes
    assert same(bits(fresh), bits(run))


@pytest.mark.parametrize("policy", ["bf16-mixed", "bf16-true"])
def test_a_rollback_is_exact(policy: str) -> None:
    """Weights, buffers, moments, scale, counters, random states; the storage too."""
    run = make_run(policy)
    plain(run, 0)
    back = Rollback(run)
    back.keep()
    before = bits(run)
    after = []
    for _ in range(2):
        plain(run, 1)
        torch.rand(3)
        after.append(bits(run))
        assert not same(before["model"], after[-1]["model"])
        back.restore()
        assert same(before, bits(run))
    assert same(*after)


def test_the_first_step_is_taken_back_to_no_moments() -> None:
    """What the optimizer did not have before, it does not have afterwards."""
    run = make_run("32-true")
    back = Rollback(run)
    back.keep()
    plain(run, 0)
    assert run.optimizer.state
    back.restore()
    assert not run.optimizer.state


def test_an_update_that_makes_a_weight_infinite_is_taken_back() -> None:
    """The gradient was finite, so the step went through; nothing is left of it."""
    model = make_model(nn.Identity())
    optimizer = torch.optim.SGD(model.parameters(), lr=3e38)
    run = cw.prepare(model, optimizer, cw.preset("32-true"))
    guard = Sentinel(run, SentinelSettings(probe_every=0))
    before = bits(run)
    x, y = batch(0)
    outcome = guard.step(lambda: 1e3 * functional.mse_loss(run.model(x), y))
    assert isinstance(outcome, RolledBack)
    assert "hold inf" in outcome.because
    assert same(before, bits(run))


def test_what_no_precision_cures_is_told_and_left_alone() -> None:
    """0 / 0 is no matter of range; the step is skipped as ever."""
    run = make_run("16-mixed")
    guard = Sentinel(run, SentinelSettings(probe_every=0))
    x, _ = batch(0)
    outcome = guard.step(lambda: run.model(x).sum() * torch.zeros(()) / torch.zeros(()))
    assert isinstance(outcome, cw.Skipped)
    assert run.changes == ()


def test_a_policy_changes_only_between_steps() -> None:
    """And a module that does not exist leaves everything as it was."""
    run = make_run("bf16-mixed")
    with pytest.raises(StepError, match="between two steps"), run.step():
        run.override("1", "fp32", because="too late")
    with pytest.raises(cw.CastwiseError, match="matches none"):
        run.override("nowhere", "c=fp32", because="a slip")
    assert run.changes == ()
    assert isinstance(plain(run, 0), cw.Stepped)


def overflow_on_one_rank(rank: int) -> dict[str, Any]:
    """The fourth batch of rank 1 overflows; rank 0 sees nothing but its gradient."""
    run = make_run("16-mixed", loss_scale=cw.DynamicScale(initial=2.0**8))
    together = cw.replicate(run.model, cw.preset("16-mixed"))
    guard = Sentinel(run, SentinelSettings(probe_every=2, error_limit=0.5))
    kinds = []
    for step in range(5):
        x, y = batch(10 * step + rank, 1000.0 if (step, rank) == (3, 1) else 1.0)
        outcome = guard.step(lambda x=x, y=y: functional.mse_loss(together(x), y))
        kinds.append(type(outcome).__name__)
    return told_of(run, guard, kinds)


def weight_lost_on_one_rank(rank: int) -> dict[str, Any]:
    """The update of rank 0 alone leaves a weight that is infinite."""
    run = make_run("32-true", nn.Tanh())
    guard = Sentinel(run, SentinelSettings(probe_every=0))
    step = run.optimizer.step

    def breaks() -> None:
        step()
        if rank == 0:
            with torch.no_grad():
                run.model[0].weight[0, 0] = torch.inf

    before = run.model[4].weight.detach().clone()
    run.optimizer.step = breaks
    outcome = guarded(guard, run, 0)
    assert isinstance(outcome, RolledBack)
    assert torch.equal(run.model[4].weight, before)
    return told_of(run, guard, [outcome.because])


def error_on_one_rank(rank: int) -> dict[str, Any]:
    """Only the batches of rank 1 lose their digits."""
    run = make_run("bf16-mixed", Far())
    together = cw.replicate(run.model, cw.preset("bf16-mixed"))
    guard = Sentinel(run, SentinelSettings(probe_every=1, error_limit=0.1))
    x, y = batch(rank, 1.0 if rank else 1e6)
    outcome = guard.step(lambda: functional.mse_loss(together(x), y))
    return told_of(run, guard, [type(outcome).__name__])


def told_of(run: cw.Run, guard: Sentinel, kinds: list[str]) -> dict[str, Any]:
    """What must be the same on all ranks."""
    return {
        "kinds": kinds,
        "changes": [str(change) for change in run.changes],
        "errors": guard.errors,
        "num_rollbacks": guard.num_rollbacks,
        "weights": [weight.detach().clone() for weight in run.model.parameters()],
        "scale": run.loss_scale.state_dict(),
        "guard": guard.state_dict(),
    }


def sharded(rank: int) -> str:
    """FSDP2 holds a part of each weight, and gathers them when a module runs."""
    del rank
    model, policy = nn.Sequential(nn.Linear(6, 8)), cw.preset("16-mixed")
    cw.shard(model, policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(SettingsError) as error:
        Sentinel(cw.prepare(model, optimizer, policy))
    return str(error.value)


def test_sharded_weights_are_refused(two_ranks: TwoRanks) -> None:
    """A rollback and a probe would need them whole."""
    for told in two_ranks(sharded):
        assert "needs whole weights" in told


def test_what_one_rank_sees_is_cured_on_all(two_ranks: TwoRanks) -> None:
    """Same rollback, same promotion with the same reason, same weights afterwards."""
    zero, one = two_ranks(overflow_on_one_rank)
    assert zero["kinds"] == ["Stepped"] * 5
    assert zero["num_rollbacks"] == 1
    (change,) = zero["changes"]
    assert change.startswith("step 3: 1 to c=fp32,o=fp32: mul")
    assert same(zero, one)


def test_a_weight_that_is_lost_on_one_rank_is_taken_back_on_all(
    two_ranks: TwoRanks,
) -> None:
    """Both say why, and hold what they held."""
    zero, one = two_ranks(weight_lost_on_one_rank)
    assert "'0.weight' hold inf" in zero["kinds"][0]
    assert same(zero, one)


def test_the_largest_error_of_any_rank_decides(two_ranks: TwoRanks) -> None:
    """The module is promoted on both, although one alone is off."""
    zero, one = two_ranks(error_on_one_rank)
    (change,) = zero["changes"]
    assert "1 to c=fp32,o=fp32: its output is off by" in change
    assert same(zero, one)


@pytest.mark.parametrize(
    "values",
    [{"tries": 0}, {"error_limit": 0.0}, {"calm_share": 2.0}, {"probe_every": -1}],
)
def test_lines_that_make_no_sense_are_refused(values: dict[str, Any]) -> None:
    """One sentence."""
    with pytest.raises(SettingsError, match="a sentinel needs"):
        SentinelSettings(**values)


class Planted(Task):
    """Batches whose hidden values overflow fp16 at step 5."""

    unit = "rows"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A function of the step."""
        return batch(step, 1000.0 if step == 5 else 1.0)

    def loss(self, batch: tuple[torch.Tensor, torch.Tensor]) -> BatchLoss:
        """Squared error."""
        x, y = batch
        value = functional.mse_loss(self.model(x), y)
        return BatchLoss(value=value, measures={}, num_units=len(x))


def make_trainer(folder: Path) -> tuple[Trainer, cw.Run, CheckpointShelf]:
    """A guarded trainer of 12 steps with a checkpoint after 4 and 8."""
    seed_everything(3)
    run = make_run("16-mixed", loss_scale=cw.DynamicScale(initial=2.0**8))
    shelf = CheckpointShelf(folder=folder / "checkpoints", kind="toy")
    trainer = Trainer(
        run=run,
        task=Planted(run.model),
        schedule=WarmupStableDecay(num_steps=12, num_warmup=2),
        averages=NoAverages(),
        settings=TrainerSettings(num_steps=12, evaluate_every=12, checkpoint_every=4),
        shelf=shelf,
        journal=Journal(folder, tensorboard=False),
        display=NullDisplay(),
        monitor=MemoryMonitor("cpu"),
        facts={},
        sentinel=Sentinel(run, SentinelSettings(probe_every=3, calm_probes=2)),
    )
    return trainer, run, shelf


def test_a_guarded_trainer_tells_its_promotions_and_resumes_exactly(
    tmp_path: Path,
) -> None:
    """Promoted at step 5, back at step 9; resumed at 8, in between."""
    trainer, run, shelf = make_trainer(tmp_path / "whole")
    result = trainer.fit()
    assert result.finished
    assert run.num_skipped == 0
    assert [change.precision for change in run.changes] == ["c=fp32,o=fp32", None]
    trainer._journal.close()
    records = read_journal(tmp_path / "whole" / "metrics.jsonl")
    lines = [record for record in records if record.event == "policy"]
    assert [line.values["module"] for line in lines] == ["1", "1"]
    assert lines[0].step == 6
    middle = next(path for path in shelf.paths() if "-step-8." in path.name)
    again, other, _ = make_trainer(tmp_path / "resumed")
    again.resume(cw.load_checkpoint(middle, kind="toy"))
    assert other.applied.bound.precision_of("1").compute == "fp32"
    again.fit()
    again._journal.close()
    assert other.changes == run.changes
    assert same(bits(other), bits(run))
