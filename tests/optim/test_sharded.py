from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from castwise.distributed.replication import replicate
from castwise.errors import WeightStorageError
from castwise.optim import AdamW, HeldWeights, SweepSettings, hold_weights
from castwise.optim.shards import is_sharded
from castwise.policy import preset
from two_ranks import TwoRanks

EIGHT = SweepSettings(states="8bit", min_8bit_size=2048, backend="twin", max_norm=1e9)
MAKERS: dict[str, Any] = {
    "torch": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "torch fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "torch sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, foreach=True),
    "ours": lambda p: AdamW(p, lr=1e-2, settings=SweepSettings(backend="twin")),
    "ours 8-bit": lambda p: AdamW(p, lr=1e-2, settings=EIGHT),
}


def net() -> nn.Sequential:
    """Rows that two processes share evenly, unevenly, and not at all."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 5), nn.Linear(5, 1)
    )


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Both processes see the same data, so the mean of their gradients is exact."""
    for step in steps:
        lot = torch.Generator().manual_seed(step)
        x = torch.randn(16, 64, generator=lot).bfloat16()
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def begin(
    storage: str, maker: str, kind: str = "whole"
) -> tuple[nn.Module, torch.optim.Optimizer, HeldWeights]:
    """A model, whole, sharded or replicated, and its held optimizer."""
    model: nn.Module = net()
    if kind == "sharded":
        fully_shard(model)
    optimizer = MAKERS[maker](model.parameters())
    held = hold_weights(optimizer, storage)
    if kind == "replicated":
        replicas = DistributedDataParallel(model)
        # It has sent the 16-bit weights of rank 0 round, and every rank begins there.
        held.load_fp32_weights(model, net().state_dict())
        model = replicas
    return model, optimizer, held


def exact(model: nn.Module, held: HeldWeights) -> dict[str, torch.Tensor]:
    """The whole weights in fp32."""
    return {
        name.removeprefix("module."): weight.full_tensor()  # type: ignore[attr-defined]
        if is_sharded(weight)
        else weight.clone()
        for name, weight in held.fp32_weights(model).items()
    }


def run(rank: int, storage: str, maker: str, kind: str) -> dict[str, Any]:
    """Train on this rank; return the exact weights and what they are held in."""
    del rank
    model, optimizer, held = begin(storage, maker, kind)
    advance(model, optimizer, range(5))
    formats = {parameter.dtype for parameter in model.parameters()}
    return {"weights": exact(model, held), "formats": formats}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Compare every bit."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


CASES = [
    ("split", "torch"),
    ("split", "torch fused"),
    ("split", "torch sgd"),
    ("split", "ours"),
    ("split", "ours 8-bit"),
    ("master", "torch"),
    ("kahan", "torch"),
    ("split8", "ours"),
]


@pytest.mark.parametrize("kind", ["sharded", "replicated"])
@pytest.mark.parametrize(("storage", "maker"), CASES)
def test_processes_train_the_weights_that_one_would(
    two_ranks: TwoRanks, storage: str, maker: str, kind: str
) -> None:
    """Each process holds its shard's masters: together those of the whole run."""
    model, optimizer, held = begin(storage, maker)
    start = exact(model, held)
    advance(model, optimizer, range(5))
    expected = exact(model, held)
    assert any(not torch.equal(start[name], expected[name]) for name in start)
    for found in two_ranks(run, storage, maker, kind):
        assert found["formats"] == {torch.bfloat16}
        assert_same(found["weights"], expected)


def apart(rank: int) -> dict[str, torch.Tensor]:
    """Begin every rank from other weights and other data; DDP makes them one."""
    torch.manual_seed(rank)
    model = nn.Linear(64, 7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    held = hold_weights(optimizer)
    replicas = DistributedDataParallel(model)
    advance(replicas, optimizer, range(3 * rank, 3 * rank + 3))
    return exact(replicas, held)


def test_replicas_that_began_apart_hold_one_master(two_ranks: TwoRanks) -> None:
    """What DDP sends round is the weight, and its hooks outlive every held step."""
    assert_same(*two_ranks(apart))


def saved(rank: int, storage: str, maker: str, folder: str) -> dict[str, Any]:
    """Train, save with torch's distributed checkpoints, and go on."""
    del rank
    model, optimizer, held = begin(storage, maker, "sharded")
    advance(model, optimizer, range(3))
    checkpoint.save(tree_of(model, optimizer), checkpoint_id=folder)
    advance(model, optimizer, range(3, 6))
    return exact(model, held)


def tree_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What torch's own recipe saves."""
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


def load(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: str, *, alone: bool
) -> None:
    """Load it in place, as torch's own recipe does."""
    tree = tree_of(model, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        checkpoint.load(tree, checkpoint_id=folder, no_dist=alone)
    set_model_state_dict(model, tree["model"])
    set_optimizer_state_dict(model, optimizer, tree["optimizer"])


def loaded(rank: int, storage: str, maker: str, folder: str) -> dict[str, Any]:
    """Go on with what two processes saved."""
    del rank
    torch.manual_seed(7)
    model, optimizer, held = begin(storage, maker, "sharded")
    load(model, optimizer, folder, alone=False)
    advance(model, optimizer, range(3, 6))
    return exact(model, held)


@pytest.mark.parametrize(
    ("storage", "maker"),
    [
        ("split", "torch"),
        ("split", "ours"),
        ("split", "ours 8-bit"),
        ("master", "torch fused"),
    ],
)
def test_what_two_processes_saved_two_or_one_go_on_with(
    two_ranks: TwoRanks, tmp_path: Path, storage: str, maker: str
) -> None:
    """Remainders, masters, codes and scales are resharded; no bit is lost."""
    folder = str(tmp_path / "checkpoint")
    whole, _ = two_ranks(saved, storage, maker, folder)
    for found in two_ranks(loaded, storage, maker, folder):
        assert_same(found, whole)
    model, optimizer, held = begin(storage, maker)
    load(model, optimizer, folder, alone=True)
    advance(model, optimizer, range(3, 6))
    assert_same(exact(model, held), whole)


def checks(rank: int) -> dict[str, Any]:
    """What one process can know only from the other."""
    model = net()
    fully_shard(model)
    settings = SweepSettings(backend="twin", max_norm=1.0)
    optimizer = AdamW(model.parameters(), settings=settings)
    held = hold_weights(optimizer)
    advance(model, optimizer, range(1))
    norm = optimizer.outcome.norm
    before = exact(model, held)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    if rank == 1:
        gradient: Any = model[0].weight.grad
        gradient.to_local()[3, 2] = float("nan")
    optimizer.step()
    return {
        "norm": norm,
        "outcome": str(optimizer.outcome),
        "untouched": all(
            torch.equal(before[name], after)
            for name, after in exact(model, held).items()
        ),
    }


def test_norms_and_infinities_are_those_of_all_processes(two_ranks: TwoRanks) -> None:
    """A NaN in one shard stops every process, and the norm is that of the whole."""
    model = net()
    settings = SweepSettings(backend="twin", max_norm=1.0)
    optimizer = AdamW(model.parameters(), settings=settings)
    hold_weights(optimizer)
    advance(model, optimizer, range(1))
    for found in two_ranks(checks):
        assert found["norm"] == pytest.approx(optimizer.outcome.norm, rel=1e-12)
        assert "skipped" in found["outcome"]
        assert "parameter 0" in found["outcome"]
        assert found["untouched"]


def released(rank: int) -> dict[str, Any]:
    """Step every shard in the backward."""
    del rank
    model = net()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    held = hold_weights(optimizer, release_gradients=True)
    for step in range(3):
        lot = torch.Generator().manual_seed(step)
        x = torch.randn(16, 64, generator=lot).bfloat16()
        model(x).float().square().mean().backward()
    free = all(parameter.grad is None for parameter in model.parameters())
    return {"weights": exact(model, held), "free": free}


def test_gradients_of_shards_are_released_in_the_backward(two_ranks: TwoRanks) -> None:
    """The same weights as by steps, and no gradient is left."""
    model, optimizer, held = begin("split", "torch")
    advance(model, optimizer, range(3))
    expected = exact(model, held)
    for found in two_ranks(released):
        assert found["free"]
        assert_same(found["weights"], expected)


def refused_replicas(rank: int) -> list[str]:
    """Hold weights in ways that DDP does not go along with."""
    del rank
    said = []
    ways: list[dict[str, Any]] = [{"release_gradients": True}, {"grad_format": "fp32"}]
    for way in ways:
        model = net()
        hold_weights(torch.optim.SGD(model.parameters(), lr=0.1), **way)
        try:
            replicate(model, preset("bf16-true"))
        except WeightStorageError as error:
            said.append(str(error))
    return said


def test_replicas_do_not_step_by_gradients_of_their_own(two_ranks: TwoRanks) -> None:
    """Each rank would drift away in silence, or DDP stop with formats that differ."""
    for released, wide in two_ranks(refused_replicas):
        assert "'0.weight' is updated in the backward, before DDP" in released
        assert "leave release_gradients out, or use castwise.shard" in released
        assert "gets gradients in torch.float32" in wide
        assert "r=fp32" in wide


def plain_replicas(rank: int, order: str) -> dict[str, Any]:
    """Release gradients of a model in torch's own DDP, wrapped before or after that."""
    model = net()
    wrap = torch.nn.parallel.DistributedDataParallel
    ddp = wrap(model) if order == "wrapped first" else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = hold_weights(optimizer, release_gradients=True)
    ddp = ddp or wrap(model)
    before = [each.detach().clone() for each in model.parameters()]
    loss = ddp(torch.full((2, 64), 1.0 + rank).bfloat16()).float().square().mean()
    said = ""
    try:
        loss.backward()
    except WeightStorageError as error:
        said = str(error)
    stands = all(map(torch.equal, before, model.parameters()))
    other = net()  # that no DDP has: each process may train it for itself
    hold_weights(torch.optim.SGD(other.parameters(), lr=0.1), release_gradients=True)
    other(torch.ones(2, 64).bfloat16()).float().square().mean().backward()
    free = all(each.grad is None for each in other.parameters())
    held.remove()
    return {"said": said, "stands": stands, "others": free}


@pytest.mark.parametrize("order", ["wrapped first", "wrapped last"])
def test_plain_ddp_does_not_step_by_gradients_of_its_own(
    two_ranks: TwoRanks, order: str
) -> None:
    """Torch's DDP says nothing and drifts apart; the first backward stops it."""
    for found in two_ranks(plain_replicas, order):
        assert "before DDP has summed the gradients of all" in found["said"]
        assert found["stands"]
        assert found["others"]


def wide_gradients(rank: int) -> str:
    """Ask for gradients in a format that FSDP2 would not give."""
    del rank
    model = net()
    fully_shard(model)
    try:
        hold_weights(torch.optim.SGD(model.parameters()), grad_format="fp32")
    except WeightStorageError as error:
        return str(error)
    return "held"


def test_gradients_of_shards_are_summed_by_fsdp2(two_ranks: TwoRanks) -> None:
    """What cannot be honoured is refused, with the setting that does it."""
    for told in two_ranks(wide_gradients):
        assert "reduce_dtype=torch.float32" in told


def taken_back(rank: int) -> dict[str, Any]:
    """Hold, and give back before and after FSDP2 has worked with the format."""
    del rank
    model = net()
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hold_weights(optimizer).remove()
    model(torch.randn(3, 64)).sum().backward()
    weights = {
        name: weight.full_tensor()  # type: ignore[attr-defined]
        for name, weight in model.state_dict().items()
    }
    other, optimizer, held = begin("split", "torch", "sharded")
    advance(other, optimizer, range(1))
    try:
        held.remove()
    except WeightStorageError as error:
        return {"weights": weights, "told": str(error)}
    return {"weights": weights, "told": "removed"}


def test_shards_come_back_in_fp32_until_they_are_used(two_ranks: TwoRanks) -> None:
    """A refused policy leaves every bit; later the exact weights are taken out."""
    expected = net().state_dict()
    for found in two_ranks(taken_back):
        assert_same(found["weights"], expected)
        assert "take fp32_weights() into a new model" in found["told"]


def too_late(rank: int) -> str:
    """Hold weights that FSDP2 already computes with in fp32, and go on."""
    del rank
    model = net()
    fully_shard(model)
    model(torch.randn(3, 64)).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        hold_weights(optimizer)
        optimizer.zero_grad()
        model(torch.randn(3, 64)).sum().backward()
    except RuntimeError as error:
        return str(error)
    return "held"


def test_sharded_weights_held_too_late_cannot_go_on(two_ranks: TwoRanks) -> None:
    """FSDP2 would compute with the former weights for ever; the backward says no."""
    for told in two_ranks(too_late):
        assert "'float' to a tensor with grad_dtype 'BFloat16'" in told
