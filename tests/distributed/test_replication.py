from __future__ import annotations

from typing import Any

import pytest
import torch

import castwise as cw
from castwise.distributed.replication import replicate
from castwise.distributed.sharding import shard
from castwise.errors import SettingsError
from shared_net import (
    LAST_BITS,
    ROWS,
    Messages,
    assert_close,
    loss_of,
    net,
    policy_of,
    train,
    whole_run,
)
from two_ranks import TwoRanks


def replicated_run(
    rank: int, name: str, recomputed: str = "", clip_norm: float | None = None
) -> dict[str, Any]:
    """What a process finds that sees one of two batches."""
    model, policy = net(recomputed), policy_of(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = cw.prepare(model, optimizer, policy, clip_norm=clip_norm)
    ddp = replicate(model, policy)
    return train(model, run, lambda: [loss_of(ddp(ROWS[rank]))])


@pytest.mark.parametrize(
    "name",
    [
        "bf16-mixed fp32",
        "bf16-mixed fp64",
        "bf16-mixed c=fp8_e4m3",
        "bf16-mixed backward",  # a block whose backward runs in fp32
        "16-mixed fp32",
        "bf16-true fp32",
    ],
)
def test_two_processes_compute_what_one_would(two_ranks: TwoRanks, name: str) -> None:
    """Gradients and weights after three steps; 16-bit weights were 16 bits before."""
    expected = whole_run(name)
    for found in two_ranks(replicated_run, name):
        assert_close(found, expected, LAST_BITS)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert found["formats"] == expected["formats"]


def test_clipping_and_recomputed_blocks(two_ranks: TwoRanks) -> None:
    """Gradients are whole everywhere, so every process clips by the same norm."""
    expected = whole_run("bf16-mixed fp32", 0.05)
    for found in two_ranks(replicated_run, "bf16-mixed fp32", "not reentrant", 0.05):
        assert_close(found, expected, LAST_BITS)
        assert min(found["norms"]) > 0.05


def backward_of(rank: int, name: str) -> tuple[set[str], dict[str, torch.Tensor]]:
    """One backward: the formats of what was sent, and the gradients."""
    model, policy = net(), policy_of(name)
    run = cw.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), policy)
    ddp = replicate(model, policy)
    with Messages() as noted, run.step() as step:
        noted.sent.clear()  # DDP compares the models first
        step.backward(loss_of(ddp(ROWS[rank])))
        gradients = {n: w.grad.clone() for n, w in model.named_parameters()}
    sent = {dtype for op, dtype, _ in noted.sent if op.startswith("allreduce")}
    return sent, gradients


def compiled_run(rank: int) -> dict[str, Any]:
    """DDP in front, compiled; its messages are traced or not, as Dynamo likes."""
    torch.compiler.reset()
    model, policy = net(), policy_of("bf16-mixed fp32")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = cw.prepare(model, optimizer, policy)
    ddp = torch.compile(replicate(model, policy), backend="aot_eager")
    found = train(model, run, lambda: [loss_of(ddp(ROWS[rank]))])
    torch.compiler.reset()
    return found


@pytest.mark.slow
def test_the_replicated_model_may_be_compiled(two_ranks: TwoRanks) -> None:
    """In the formats of eager code."""
    expected = whole_run("bf16-mixed fp32")
    for found in two_ranks(compiled_run):
        assert_close(found, expected, LAST_BITS)


def alone(name: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of one batch."""
    model, policy = net(), policy_of(name)
    run = cw.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), policy)
    with run.step() as step:
        step.backward(loss_of(model(rows)))
        return {n: w.grad.clone() for n, w in model.named_parameters()}


def test_gradients_travel_as_the_policy_says(two_ranks: TwoRanks) -> None:
    """Sums in bf16 where r=bf16, and in fp32 for the island in the same bucket."""
    sent, gradients = two_ranks(backward_of, "bf16-sums fp32")[0]
    assert sent == {"torch.bfloat16", "torch.float32"}
    ours = [alone("bf16-sums fp32", rows) for rows in ROWS]
    for name, gradient in gradients.items():
        halves = [each[name] / 2 for each in ours]
        if name.startswith("delicate"):
            expected = halves[0] + halves[1]
        else:
            expected = (halves[0].bfloat16() + halves[1].bfloat16()).float()
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
        assert gradient.dtype is torch.float32


def test_bf16_weights_may_be_summed_in_fp32(two_ranks: TwoRanks) -> None:
    """r=fp32 over weights in bf16 sends twice the bytes, as it was asked for."""
    sent, gradients = two_ranks(backward_of, "bf16-true r=fp32")[0]
    assert sent == {"torch.bfloat16", "torch.float32"}  # the rule names one module
    assert gradients["delicate.weight"].dtype is torch.bfloat16


def accumulated(rank: int) -> dict[str, torch.Tensor]:
    """Two micro-batches, of which only the second one sends."""
    model, policy = net(), policy_of("bf16-sums fp32")
    run = cw.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), policy)
    ddp = replicate(model, policy)
    with run.step() as step:
        with ddp.no_sync():
            step.backward(loss_of(ddp(ROWS[rank])) / 2)
        step.backward(loss_of(ddp(ROWS[rank].flip(0) * 2)) / 2)
    return {name: weight.detach() for name, weight in model.named_parameters()}


def test_gradients_accumulate_before_they_are_sent(two_ranks: TwoRanks) -> None:
    """One message for two micro-batches, rounded once."""
    model, policy = net(), policy_of("bf16-mixed fp32")
    run = cw.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), policy)
    with run.step() as step:
        for rows in ROWS:
            for x in (rows, rows.flip(0) * 2):
                step.backward(loss_of(model(x)) / 4)
    zero, one = two_ranks(accumulated)
    for name, weight in model.named_parameters():
        assert torch.equal(zero[name], one[name])
        torch.testing.assert_close(zero[name], weight, rtol=2.0**-8, atol=1e-4)


def overflowing(rank: int, kind: str) -> dict[str, Any]:
    """The second of three steps overflows on rank 1, in the backward or forward."""
    model, policy = net(), policy_of("16-mixed fp32")
    if kind == "fsdp forward":
        shard(model, policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = cw.prepare(model, optimizer, policy)
    ddp = model if "fsdp" in kind else replicate(model, policy)
    outcomes = []
    for number in range(3):
        bad = rank == number == 1
        with run.step() as step:
            rows = ROWS[rank] * (1e6 if bad and "forward" in kind else 1)
            factor = 1e6 if bad and kind == "backward" else 1
            step.backward(loss_of(ddp(rows)) * factor)
        outcomes.append(step.outcome)
    skipped = outcomes[1]
    assert isinstance(skipped, cw.Skipped)
    return {
        "kinds": [type(each).__name__ for each in outcomes],
        "skipped": (skipped.op, skipped.stage, skipped.rank, skipped.module),
        "because": skipped.because,
        "scale": run.loss_scale.scale,
    }


def test_a_skipped_step_names_the_rank_that_overflowed(two_ranks: TwoRanks) -> None:
    """Gradients are the same everywhere; only a replay tells whose they were."""
    for kind in ("backward", "forward", "fsdp forward"):
        zero, one = two_ranks(overflowing, kind)
        assert zero["kinds"] == one["kinds"] == ["Stepped", "Skipped", "Stepped"]
        assert zero["skipped"] == one["skipped"]
        assert zero["scale"] == one["scale"] == 2.0**15
        for found in (zero, one):
            assert found["skipped"][2] == 1
            assert "on rank 1: " in found["because"]
        if kind == "forward":
            assert zero["skipped"][1:] == ("forward", 1, "enter")
        if kind == "backward":
            assert zero["skipped"][1] == "backward"


def refusals(_rank: int) -> list[str]:
    """What replicate says to weights that will change their format."""
    said = []
    for name in ("bf16-true fp32", "bf16-mixed fp64"):
        try:
            replicate(net(), policy_of(name))
        except SettingsError as error:
            said.append(str(error))
    return said


def test_weights_have_their_format_before(two_ranks: TwoRanks) -> None:
    """The buckets of DDP cannot follow a change; without processes there are none."""
    true, mixed = two_ranks(refusals)[0]
    assert "'enter.weight' is held in torch.float32" in true
    assert "'delicate.weight'" in mixed
    assert "call prepare before" in mixed
    with pytest.raises(SettingsError, match="init_process_group"):
        replicate(net(), cw.preset("bf16-mixed"))
