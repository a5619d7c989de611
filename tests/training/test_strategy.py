"""A strategy refuses what it cannot do."""

from __future__ import annotations

import pytest
import torch

import castwise as cw
from castwise.distributed.ranks import Ranks
from castwise.errors import RanksError, SettingsError
from castwise.training.strategy import Strategy
from shared_net import net, policy_of
from two_ranks import TwoRanks


def begun(rank: int, name: str, presets: list[str]) -> str:
    """Begin to train by a strategy, with a policy of one's own."""
    strategy = Strategy(name=name, ranks=Ranks(rank=rank, num_ranks=2))  # type: ignore[arg-type]
    model, policy = net(), policy_of(presets[rank])
    strategy.shard(model, policy, torch.device("cpu"))
    run = cw.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), policy)
    try:
        strategy.forward_of(model, run)
    except RanksError as error:
        return str(error)
    return "begun"


def test_ranks_of_different_policies_do_not_begin(two_ranks: TwoRanks) -> None:
    """DDP would train two halves of a run in different precisions; FSDP2 would hang."""
    same, other = "bf16-mixed fp32", "bf16-mixed c=fp8_e4m3"
    assert two_ranks(begun, "ddp", [same, same]) == ("begun", "begun")
    for name in ("ddp", "fsdp"):
        zero, one = two_ranks(begun, name, [same, other])
        assert "rank 1 and rank 0 must have the same policy" in zero
        assert "c=fp8_e4m3" in zero
        assert one == "rank 0 says in what the ranks differ; this rank stops too"


@pytest.mark.parametrize("name", ["one", "fsdp"])
def test_gradients_are_made_smaller_under_ddp_alone(name: str) -> None:
    """FSDP2 has no hook, one process sends nothing, and a wrong word is told."""
    ranks = Ranks(rank=0, num_ranks=1 if name == "one" else 2)
    with pytest.raises(SettingsError, match="give it with --strategy ddp"):
        Strategy(name=name, ranks=ranks, compress="bf16")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="did you mean powersgd"):
        Strategy(name="ddp", ranks=ranks, compress="powersdg")
    assert Strategy(name="ddp", ranks=ranks, compress="powersgd:rank=2").name == "ddp"
    assert Strategy(ranks=Ranks(), compress="reduce").name == "one"
