from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from castwise.errors import PredictionError
from castwise.hybrid import HybridSettings, HybridTrainer
from castwise.hybrid.agreement import Alone, agreement_of
from castwise.hybrid.verification import judge
from small_task import SmallTask, bits_of, classification_loss
from two_ranks import TwoRanks


def summed(rank: int) -> Any:
    """Sum what each rank sees."""
    task = SmallTask()
    agreement = agreement_of(DistributedDataParallel(task.model))
    return agreement.sums([1.0 + rank, 0.1]), agreement.mean(float(rank))


def trained(rank: int, settings: dict[str, Any], steps: int) -> Any:
    """Train on batches of this rank's own; tell every decision and the weights."""
    torch.manual_seed(0)
    task = SmallTask()
    model = DistributedDataParallel(task.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    trainer = HybridTrainer(
        model, optimizer, classification_loss, settings=HybridSettings(**settings)
    )
    done = [trainer.step(task.batch(2 * step + rank)) for step in range(steps)]
    found = trainer.statistics
    bits = {
        name: value
        for name, value in bits_of(task.model, optimizer).items()
        if "running" not in name and name != "random"  # DDP sends them with a forward
    }
    return (
        [str(change) for change in trainer.transitions],
        [step.confidence for step in done],
        (found.tries, found.accepts, found.refusals, found.credited_steps),
        bits,
        [step.loss for step in done],
    )


SETTINGS: dict[str, Any] = {
    "warmup_steps": 8,
    "full_steps": 4,
    "correct_steps": 3,
    "confidence_threshold": 0.1,
    "max_predict_steps": 12,
}


def test_numbers_are_summed_over_the_group(two_ranks: TwoRanks) -> None:
    """With the same bits on both."""
    for found in two_ranks(summed):
        assert found == ([3.0, 0.2], 0.5)


def test_without_ddp_a_run_agrees_with_itself() -> None:
    """Nothing is sent."""
    assert isinstance(agreement_of(SmallTask().model), Alone)
    assert Alone().sums([2.0, 3.0]) == [2.0, 3.0]


def both_decide_the_same(two_ranks: TwoRanks, **changes: Any) -> Any:
    """Play a run on two ranks; compare all that they decided and the weights."""
    zero, one = two_ranks(trained, {**SETTINGS, **changes}, 60)
    assert zero[:3] == one[:3]
    assert zero[2][0] > 2  # predictions were tried, or the test shows nothing
    for name, value in zero[3].items():
        assert torch.equal(value, one[3][name]), name
    assert zero[4] != one[4]  # the batches were of different losses
    return zero


def test_all_ranks_land_together(two_ranks: TwoRanks) -> None:
    """Each has its own batches and losses; transitions and weights are equal."""
    found = both_decide_the_same(two_ranks)
    assert found[2][1] > 0


def test_all_ranks_refuse_together(two_ranks: TwoRanks) -> None:
    """A momentum held for 300 steps overshoots."""
    found = both_decide_the_same(
        two_ranks, predictor="adam_hold", max_predict_steps=300, min_predict_steps=300
    )
    assert found[2][2] > 0


def test_all_ranks_walk_stepwise_and_stop_together(two_ranks: TwoRanks) -> None:
    """The ceiling on the way is judged by the mean loss."""
    both_decide_the_same(two_ranks, mode="stepwise", max_predict_steps=5)


def test_all_ranks_choose_the_same_arm(two_ranks: TwoRanks) -> None:
    """What an arm has brought is the same number everywhere."""
    both_decide_the_same(two_ranks, phase_length="arms", verification_z=0.0)


def test_a_verdict_over_two_ranks_is_that_of_all_samples(two_ranks: TwoRanks) -> None:
    """Mean and error as if one process had seen them all."""
    zero, one = two_ranks(judged)
    torch.manual_seed(5)
    before, after = torch.randn(2, 17).double(), torch.randn(2, 17).double() - 0.4
    whole = judge(before.flatten(), after.flatten(), z=1.0, fmt="fp32")
    for each in (zero, one):
        assert each[0] == whole.accepted
        for mine, theirs in zip(each[1:], (whole.before, whole.error), strict=True):
            assert abs(mine - theirs) < 1e-12


def judged(rank: int) -> Any:
    """Judge this rank's half of the samples."""
    torch.manual_seed(5)
    before, after = torch.randn(2, 17).double(), torch.randn(2, 17).double() - 0.4
    agreement = agreement_of(DistributedDataParallel(SmallTask().model))
    verdict = judge(before[rank], after[rank], z=1.0, fmt="fp32", agreement=agreement)
    return verdict.accepted, verdict.before, verdict.error


def test_sharded_weights_are_refused_before_anything_is_put_on_the_model(
    tmp_path: Path,
) -> None:
    """One process is enough for FSDP2 to cut; the first weight and a way out are named.

    No hook of ours is on the model: it can be prepared without phases.
    """
    meeting = f"file://{tmp_path}/meet"
    distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        task = SmallTask()
        fully_shard(task.model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = task.adamw()
        hooks = list(task.model._forward_pre_hooks)
        with pytest.raises(
            PredictionError, match=r"cut '0\.weight' over processes.*phases"
        ):
            task.trainer(HybridSettings(), optimizer=optimizer)
        assert list(task.model._forward_pre_hooks) == hooks
    finally:
        distributed.destroy_process_group()
