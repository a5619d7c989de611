"""pytorch#148831: fully_shard and checkpoint under autocast recompute other formats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointError, checkpoint

import castwise as cw
from castwise.distributed.sharding import shard
from shared_net import (
    LAST_BITS,
    ROWS,
    assert_close,
    loss_of,
    net,
    policy_of,
    train,
    whole_run,
)
from two_ranks import TwoRanks
from upstream import note_unless


class Recomputed(nn.Module):
    """The module of the issue: its product is recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As a user writes it."""
        y: torch.Tensor = checkpoint(self.product, x, use_reentrant=False)
        return y


def stock(_rank: int) -> str:
    """What PyTorch alone says to it."""
    mesh = distributed.init_device_mesh("cpu", (2,))
    model = nn.Sequential(Recomputed(), Recomputed())
    words = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for each in model.modules():
        if isinstance(each, nn.Linear):
            fully_shard(each, mesh=mesh, mp_policy=words)
    fully_shard(model, mesh=mesh, mp_policy=words)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.ones(3, 5)).square().sum()
    try:
        loss.backward()
    except (CheckpointError, RuntimeError) as error:
        return str(error)
    return ""


def ours(rank: int, recomputed: str, gather: Any) -> dict[str, Any]:
    """Sharded by a policy, with an island between recomputed blocks."""
    model, policy = net(recomputed), policy_of("bf16-mixed fp32")
    shard(model, policy, gather=gather)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = cw.prepare(model, optimizer, policy)
    return train(model, run, lambda: [loss_of(model(ROWS[rank]))])


def test_the_model_of_the_issue(two_ranks: TwoRanks) -> None:
    """Without castwise: fp32 where the forward kept bf16, until torch 2.13."""
    fails, _ = two_ranks(stock)
    note_unless("dtype" in fails, "pytorch#148831")


@pytest.mark.parametrize("gather", ["low", "stored"])
@pytest.mark.parametrize("recomputed", ["reentrant", "not reentrant"])
def test_sharded_blocks_recompute_in_the_formats_of_their_forward(
    two_ranks: TwoRanks, recomputed: str, gather: str
) -> None:
    """Both kinds of checkpointing, and the weights of a process without either."""
    expected = whole_run("bf16-mixed fp32")
    for found in two_ranks(ours, recomputed, gather):
        assert_close(found, expected, LAST_BITS)
