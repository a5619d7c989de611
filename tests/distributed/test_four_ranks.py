"""Four processes on what two were tried on: more neighbours, and replicas of shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed

import castwise as cw
from castwise.distributed.likeness import watch_ranks
from castwise.distributed.replication import feedback_of, replicate
from castwise.distributed.sharding import shard
from castwise.errors import RanksError
from shared_net import (
    LAST_BITS,
    assert_close,
    loss_of,
    net,
    policy_of,
    proof_on,
    train,
)
from two_ranks import TwoRanks

ROWS = torch.linspace(-1, 1, 4 * 3 * 5).reshape(4, 3, 5).sin()
KINDS = ("ddp", "fsdp", "replicas of shards")


def run_of(kind: str, name: str, rows: list[torch.Tensor]) -> dict[str, Any]:
    """Three steps of one kind; "" is one process that sees all rows."""
    model, policy = net(), policy_of(name)
    if kind == "fsdp":
        shard(model, policy)
    if kind == "replicas of shards":
        names = ("replicas", "shards")
        mesh = distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        shard(model, policy, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = cw.prepare(model, optimizer, policy)
    forward = replicate(model, policy) if kind == "ddp" else model
    if kind:
        watch_ranks(run, every=2)
    return train(model, run, lambda: [loss_of(forward(each)) for each in rows])


def breaches(rank: int, kind: str, name: str) -> list[str]:
    """What the contract of this rank says."""
    return [*map(str, proof_on(rank, kind, name, ROWS).breaches)]


def played(rank: int, name: str) -> dict[str, Any]:
    """Every kind on this rank, and its contracts."""
    found: dict[str, Any] = {kind: run_of(kind, name, [ROWS[rank]]) for kind in KINDS}
    found["breaches"] = [*breaches(rank, "ddp", name), *breaches(rank, "fsdp", name)]
    return found


def whole_state(rank: int) -> Any:
    """Factors of four ranks, all in the state that the first one gathers."""
    torch.manual_seed(0)
    model, policy = torch.nn.Linear(40, 30), cw.preset("bf16-mixed")
    run = cw.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), policy)
    ddp = replicate(model, policy, compress="powersgd:rank=2,start=0")
    watching = watch_ranks(run, every=1)
    for number in range(2):
        with run.step() as step:
            draws = torch.Generator().manual_seed(9 * number + rank)
            x = torch.randn(9, 40, generator=draws)
            step.backward(loss_of(ddp(x)))
    feedback = feedback_of(ddp)
    assert feedback is not None
    own = feedback.state_dict()["errors"]["weight"]
    errors = feedback.whole_state_dict()["errors"]
    if rank == 2:
        model.bias.data[0] += 1
    try:
        watching.compare()
    except RanksError as error:
        return own, errors, str(error)
    return own, errors, "alike"


@pytest.mark.slow
def test_four_processes_compute_what_one_would() -> None:
    """DDP, FSDP2 and both, with islands in fp32 and fp64; the odd one is named."""
    four_ranks = TwoRanks(4)
    try:
        for name in ("bf16-mixed fp32", "bf16-mixed fp64"):
            expected = run_of("", name, [*ROWS])
            for found in four_ranks(played, name):
                assert found["breaches"] == []
                for kind in KINDS:
                    assert_close(found[kind], expected, 2 * LAST_BITS)
                    assert found[kind]["formats"] == expected["formats"]
        states = four_ranks(whole_state)
    finally:
        four_ranks.stop()
    errors = states[0][1]["weight"]
    assert torch.equal(errors, torch.stack([own for own, _, _ in states]))
    assert all(not each for _, each, _ in states[1:])
    assert "rank 2 holds another 'bias' than rank 0 (1 of 2 weights" in states[0][2]
    assert {said for _, _, said in states[1:]} == {
        "rank 0 says in what the ranks differ; this rank stops too"
    }
