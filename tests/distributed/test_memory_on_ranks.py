"""Recompute and derived saves under DDP and FSDP2: the same bits as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import castwise as cw
from castwise.distributed.replication import replicate
from castwise.distributed.sharding import shard
from shared_net import ROWS, loss_of, net, policy_of, train
from two_ranks import TwoRanks


def wrapped_run(rank: int, how: str, name: str, spare: bool) -> dict[str, Any]:
    """What a process finds that sees one of two batches."""
    model, policy = net(""), policy_of(name)
    if spare:
        cw.recompute(model)
    if how == "fsdp2":
        shard(model, policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = cw.prepare(model, optimizer, policy)
    wrapped = replicate(model, policy) if how == "ddp" else model
    if spare:
        cw.store_saves(model, derive=True)
    return train(model, run, lambda: [loss_of(wrapped(ROWS[rank]))])


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    "name",
    ["bf16-mixed fp32", pytest.param("bf16-mixed backward", marks=pytest.mark.slow)],
)
def test_two_processes_compute_the_same_bits(
    two_ranks: TwoRanks, how: str, name: str
) -> None:
    """Gradients, weights and norms after three steps."""
    plain = two_ranks(wrapped_run, how, name, False)
    spared = two_ranks(wrapped_run, how, name, True)
    for found, expected in zip(spared, plain, strict=True):
        assert found["norms"] == expected["norms"]
        for part in ("gradients", "weights"):
            for key, value in expected[part].items():
                assert torch.equal(found[part][key], value), (part, key)
