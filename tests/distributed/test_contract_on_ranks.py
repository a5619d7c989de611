from __future__ import annotations

from typing import Any

import pytest
import torch

import castwise as cw
from castwise.distributed.sharding import shard
from castwise.numerics.contract import contract
from shared_net import ROWS, net, policy_of, proof_on
from two_ranks import TwoRanks

NAME = "bf16-mixed fp32"


def proof(rank: int, kind: str, recomputed: str = "") -> dict[str, Any]:
    """Prove a forward and backward of a wrapped model on this rank."""
    found = proof_on(rank, kind, NAME, recomputed=recomputed)
    inside, products = found.share_of("delicate"), found.share_of("blocks")
    return {
        "breaches": list(map(str, found.breaches)),
        "summary": found.summary(),
        "inside": (inside.flops_low, inside.flops_high),
        "products": (products.flops_low, products.flops_high),
    }


@pytest.mark.parametrize("recomputed", ["", "not reentrant"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_each_rank_proves_its_own_contract(
    two_ranks: TwoRanks, kind: str, recomputed: str
) -> None:
    """Every rank sees its operators: the island runs high, the products run low."""
    one_product = 2 * 3 * 7 * 7
    passes = 4 if recomputed else 3  # forward, maybe again, and both of the backward
    for found in two_ranks(proof, kind, recomputed):
        assert found["breaches"] == []
        assert found["inside"] == (0, 3 * one_product)
        assert found["products"] == (2 * passes * one_product, 0)


def sharded_contract(rank: int) -> tuple[str, bool]:
    """The one-line contract on a model that is sharded already."""
    model, policy = net(), policy_of(NAME)
    shard(model, policy)
    before = {name: weight.dtype for name, weight in model.named_parameters()}
    batches = [(ROWS[rank], torch.zeros(3, 3))]
    found = contract(model, batches, torch.nn.functional.mse_loss, policy).check()
    after = {name: weight.dtype for name, weight in model.named_parameters()}
    return found.summary(), before == after


def test_a_sharded_model_has_a_contract_of_one_line(two_ranks: TwoRanks) -> None:
    """`cw.contract` puts the policy on and takes it off; shards stay as they are."""
    for summary, same in two_ranks(sharded_contract):
        assert summary.startswith("contract of bf16-mixed holds")
        assert same


def broken(rank: int) -> list[str]:
    """One rank casts by hand; only its contract breaks."""
    model, policy = net(), policy_of(NAME)
    if rank == 1:
        block = model.blocks[1]
        block.register_forward_pre_hook(lambda _, args: (args[0].double().float(),))
    shard(model, policy)
    found = cw.contract(
        model,
        [(ROWS[rank], torch.zeros(3, 3))],
        torch.nn.functional.mse_loss,
        policy,
    )
    return [str(breach) for breach in found.breaches]


def test_a_breach_is_found_on_the_rank_that_it_is_on(two_ranks: TwoRanks) -> None:
    """Nobody speaks for another rank."""
    zero, one = two_ranks(broken)
    assert zero == []
    assert one
