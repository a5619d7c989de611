from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

import castwise as cw
from castwise.distributed.formats import Gather
from castwise.distributed.sharding import shard
from castwise.errors import IslandError, SettingsError
from castwise.islands import apply_policy, module_facts
from castwise.region import Region
from shared_net import (
    LAST_BITS,
    ROWS,
    Messages,
    Net,
    assert_close,
    loss_of,
    net,
    policy_of,
    train,
    whole,
    whole_run,
)
from two_ranks import TwoRanks


def compiled_run(rank: int, name: str, recomputed: str = "") -> dict[str, Any]:
    """As `sharded_run`, with compiled blocks that are one group each."""
    torch.compiler.reset()
    return sharded_run(rank, name, recomputed, gather="stored", compiled=True)


def sharded_run(
    rank: int,
    name: str,
    recomputed: str = "",
    *,
    gather: Gather = "low",
    compiled: bool = False,
    clip_norm: float | None = None,
) -> dict[str, Any]:
    """What a process finds, of weights of which it holds some rows."""
    model, policy = net(recomputed), policy_of(name)
    if compiled:
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    shard(model, policy, gather=gather)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = cw.prepare(model, optimizer, policy, clip_norm=clip_norm)
    return train(model, run, lambda: [loss_of(model(ROWS[rank]))])


@pytest.mark.parametrize(
    "name",
    [
        "bf16-mixed",
        "bf16-mixed fp32",
        "bf16-mixed fp64",
        "bf16-mixed c=fp64,o=fp32",  # cast at the border, from fp32 weights
        "bf16-mixed c=fp8_e4m3",
        "bf16-mixed backward",  # a block whose backward runs in fp32
        "16-mixed fp32",
        "bf16-true fp32",
        "32-true",
    ],
)
def test_two_processes_compute_what_one_would(two_ranks: TwoRanks, name: str) -> None:
    """Gradients and weights after three steps, whatever travels low."""
    expected = whole_run(name)
    for found in two_ranks(sharded_run, name):
        assert_close(found, expected, LAST_BITS)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert found["formats"] == expected["formats"]


def clipped_run(rank: int) -> dict[str, Any]:
    """As `sharded_run`, clipped in every step."""
    return sharded_run(rank, "bf16-mixed fp32", clip_norm=0.05)


def test_gradients_are_clipped_by_the_norm_of_all_shards(two_ranks: TwoRanks) -> None:
    """The norm is summed in another order, so single weights may round otherwise."""
    expected = whole_run("bf16-mixed fp32", clip_norm=0.05)
    assert min(expected["norms"]) > 0.05
    for found in two_ranks(clipped_run):
        assert_close(found, expected, 2.0**-8)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-3)


@pytest.mark.parametrize("recomputed", ["reentrant", "not reentrant"])
def test_blocks_may_be_recomputed(two_ranks: TwoRanks, recomputed: str) -> None:
    """In the same formats, though the region was left before the backward."""
    expected = whole_run("bf16-mixed fp32")
    for found in two_ranks(sharded_run, "bf16-mixed fp32", recomputed):
        assert_close(found, expected, LAST_BITS)


@pytest.mark.parametrize("recomputed", ["", "not reentrant"])
def test_blocks_may_be_compiled(two_ranks: TwoRanks, recomputed: str) -> None:
    """Each block one full graph, whose weights FSDP2 gathers before it begins."""
    expected = whole_run("bf16-mixed fp32")
    for found in two_ranks(compiled_run, "bf16-mixed fp32", recomputed):
        assert_close(found, expected, LAST_BITS)


def messages(rank: int, name: str, gather: Gather) -> list[tuple[str, str, int]]:
    """What is sent in one step, forward and backward."""
    model, policy = net(), policy_of(name)
    shard(model, policy, gather=gather)
    applied = apply_policy(model, policy.bind(module_facts(model)), "cpu")
    with Messages() as noted:
        with Region.of(policy, "full", (applied,)).entered("cpu"):
            loss = loss_of(model(ROWS[rank]))
        loss.backward()
    return noted.sent


def test_weights_travel_low_and_gradients_as_the_policy_says(
    two_ranks: TwoRanks,
) -> None:
    """Products in half the bytes; norms and the island in fp32, and all sums."""
    sent, _ = two_ranks(messages, "bf16-mixed fp32", "low")
    gathered = {each[1:] for each in sent if "allgather" in each[0]}
    reduced = {each[1] for each in sent if "reduce_scatter" in each[0]}
    assert any("bfloat16" in dtype for dtype, _ in gathered)
    assert any("float32" in dtype for dtype, _ in gathered)
    assert reduced == {"torch.float32"}
    as_stored, _ = two_ranks(messages, "bf16-mixed fp32", "stored")
    assert {each[1] for each in as_stored} == {"torch.float32"}
    true, _ = two_ranks(messages, "bf16-true fp32", "low")
    reduced = {each[1] for each in true if "reduce_scatter" in each[0]}
    assert reduced == {"torch.bfloat16", "torch.float32"}


def wholly_compiled_run(rank: int) -> dict[str, Any]:
    """The sharded model compiled from outside, with breaks where FSDP2 gathers."""
    torch.compiler.reset()
    model, policy = net(), policy_of("bf16-mixed fp32")
    shard(model, policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = cw.prepare(model, optimizer, policy)
    compiled = torch.compile(model, backend="aot_eager")
    found = train(model, run, lambda: [loss_of(compiled(ROWS[rank]))])
    torch.compiler.reset()
    return found


def test_the_whole_model_may_be_compiled_in_pieces(two_ranks: TwoRanks) -> None:
    """In the same formats: Dynamo steps aside where weights come and go."""
    expected = whole_run("bf16-mixed fp32")
    for found in two_ranks(wholly_compiled_run):
        assert_close(found, expected, LAST_BITS)


def hybrid_run(rank: int, shape: tuple[int, int]) -> dict[str, Any]:
    """Replicas of shards, clipped: one of the two axes has one process."""
    model, policy = net(), policy_of("bf16-mixed fp32")
    names = ("replicas", "shards")
    mesh = distributed.init_device_mesh("cpu", shape, mesh_dim_names=names)
    shard(model, policy, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = cw.prepare(model, optimizer, policy, clip_norm=0.05)
    return train(model, run, lambda: [loss_of(model(ROWS[rank]))])


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_shards_may_have_replicas(two_ranks: TwoRanks, shape: tuple[int, int]) -> None:
    """The norm is summed over shards, and not once for each replica."""
    expected = whole_run("bf16-mixed fp32", clip_norm=0.05)
    for found in two_ranks(hybrid_run, shape):
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-3)
        assert_close(found, expected, 2.0**-8)


def complex_run(rank: int) -> dict[str, Any]:
    """A spectral module, whose weights are complex, behind a product."""
    torch.manual_seed(0)
    model, policy = nn.Sequential(nn.Linear(5, 7), Spectral()), cw.preset("bf16-mixed")
    if rank >= 0:
        shard(model, policy)
    run = cw.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), policy)
    rows = [ROWS[rank]] if rank >= 0 else list(ROWS)
    return train(model, run, lambda: [model(x).square().mean() for x in rows])


class Spectral(nn.Module):
    """Magnitudes of a complex product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 7, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """|x W|."""
        y: torch.Tensor = (x.to(torch.complex64) @ self.weight).abs()
        return y


def test_complex_weights_are_sharded_whole(two_ranks: TwoRanks) -> None:
    """Neither their imaginary part nor a digit is lost on the way."""
    expected = complex_run(-1)
    for found in two_ranks(complex_run):
        for kind in ("gradients", "weights"):
            for name, value in expected[kind].items():
                torch.testing.assert_close(found[kind][name], value)


def skipping_run(rank: int) -> dict[str, Any]:
    """In the second of three steps one shard of one process holds a NaN."""
    model, policy = net(), policy_of("16-mixed fp32")
    shard(model, policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = cw.prepare(model, optimizer, policy, clip_norm=1.0)
    weights, outcomes = [], []
    for number in range(3):
        with run.step() as step:
            step.backward(loss_of(model(ROWS[rank])))
            if number == rank == 1:
                model.leave.bias.grad.to_local()[-1] = float("nan")
        outcomes.append(step.outcome)
        weights.append(whole(model.enter.weight).detach().clone())
    skipped = outcomes[1]
    assert isinstance(skipped, cw.Skipped)
    return {
        "kinds": [type(each).__name__ for each in outcomes],
        "parameter": skipped.parameter,
        "weights": weights,
        "scale": run.loss_scale.scale,
    }


def test_all_processes_skip_a_step_that_one_of_them_must_skip(
    two_ranks: TwoRanks,
) -> None:
    """And all back off, so that their weights stay the same."""
    for found in two_ranks(skipping_run):
        assert found["kinds"] == ["Stepped", "Skipped", "Stepped"]
        assert found["parameter"] == "leave.bias"
        assert torch.equal(found["weights"][0], found["weights"][1])
        assert not torch.equal(found["weights"][1], found["weights"][2])
        assert found["scale"] == 2.0**15


def accumulated(rank: int) -> dict[str, torch.Tensor]:
    """Two micro-batches, of which only the second one sends."""
    model, policy = net(), policy_of("bf16-mixed fp32")
    shard(model, policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = cw.prepare(model, optimizer, policy)
    with run.step() as step:
        for at, x in enumerate((ROWS[rank], ROWS[rank].flip(0) * 2)):
            assert isinstance(model, FSDPModule)
            model.set_requires_gradient_sync(at == 1)
            step.backward(loss_of(model(x)) / 2)
    return {name: whole(weight).detach() for name, weight in model.named_parameters()}


def test_gradients_accumulate_before_they_are_sent(two_ranks: TwoRanks) -> None:
    """In fp32, which is what they are reduced in: the weights of one process."""
    model, policy = net(), policy_of("bf16-mixed fp32")
    run = cw.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), policy)
    with run.step() as step:
        for rows in ROWS:
            for x in (rows, rows.flip(0) * 2):
                step.backward(loss_of(model(x)) / 4)
    for found in two_ranks(accumulated):
        for name, weight in model.named_parameters():
            torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-7)


def from_meta(_rank: int) -> Any:
    """Weights that never stood whole in any memory."""
    with torch.device("meta"):
        model = Net()
    sharding = shard(model, policy_of("bf16-true fp32"), mesh=_mesh())
    model.to_empty(device="cpu")
    return sharding.summary(), sharding.explain(), model.delicate.weight.dtype


def _mesh() -> Any:
    return distributed.init_device_mesh("cpu", (2,))


def test_a_model_may_begin_on_the_meta_device(two_ranks: TwoRanks) -> None:
    """Formats and groups are settled before there is any memory."""
    summary, explained, dtype = two_ranks(from_meta)[0]
    assert dtype is torch.float32
    assert summary == (
        "sharding of bf16-true: 262 numbers in 4 groups over 2 processes; 78.6 % "
        "stored bf16, gathered bf16; 21.4 % stored fp32, gathered fp32"
    )
    assert "'delicate': 56 numbers stored in fp32" in explained


def refusals(_rank: int) -> list[str]:
    """What shard says to models that it comes too late for."""
    said = []
    policy = policy_of("bf16-mixed fp32")
    done, applied, theirs, held = net(), net(), net(), net()
    shard(done, policy)
    apply_policy(applied, policy.bind(module_facts(applied)), "cpu")
    fully_shard(theirs.delicate, mesh=_mesh())
    assert isinstance(done, FSDPModule)
    for model in (done, applied, theirs):
        try:
            shard(model, policy)
        except IslandError as error:
            said.append(str(error))
    fully_shard(held, mesh=_mesh())
    optimizer = torch.optim.SGD(held.parameters(), lr=0.1)
    try:
        cw.prepare(held, optimizer, policy_of("bf16-mixed fp64"))
    except IslandError as error:
        said.append(str(error))
    return said


def test_whoever_comes_too_late_is_told_the_order(two_ranks: TwoRanks) -> None:
    """shard, optimizer, prepare; a format cannot change after sharding."""
    done, applied, theirs, held = two_ranks(refusals)[0]
    assert "the whole model is sharded already" in done
    assert "'delicate' is an island already" in applied
    assert "call shard first, build the optimizer, then prepare" in applied
    assert "'delicate' is sharded already" in theirs
    assert "'delicate.weight' is sharded already and holds fp32" in held
    assert "castwise.distributed.shard" in held


def sharded_by_hand(rank: int) -> Any:
    """Islands first, fully_shard by somebody else after, and off they come."""
    model, policy = net(), policy_of("bf16-mixed fp32")
    applied = apply_policy(model, policy.bind(module_facts(model)), "cpu")
    for part in (*model.blocks, model.delicate, model):
        fully_shard(part, mesh=_mesh())
    with Region.of(policy, "full", (applied,)).entered("cpu"):
        loss = loss_of(model(ROWS[rank]))
    loss.backward()
    applied.remove()
    kind = type(model.delicate)
    return (
        kind.__name__,
        [cls.__name__ for cls in kind.__mro__[1:3]],
        (
            isinstance(model.delicate, FSDPModule),
            model.delicate(torch.ones(2, 7)).dtype,
        ),
    )


def test_islands_leave_modules_that_were_sharded_after_them(
    two_ranks: TwoRanks,
) -> None:
    """The class of FSDP2 stays on top, and is that of FSDP2."""
    name, above, (is_sharded, dtype) = two_ranks(sharded_by_hand)[0]
    assert (name, above) == ("FSDPLinear", ["FSDPModule", "Linear"])
    assert is_sharded
    assert dtype is torch.float32


def test_without_processes_there_is_nothing_to_shard_over() -> None:
    """The remedy is one line."""
    with pytest.raises(SettingsError, match="init_process_group"):
        shard(net(), cw.preset("bf16-mixed"))
