from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import castwise as cw
from castwise.distributed.formats import Gather
from castwise.distributed.sharding import shard
from castwise.errors import IslandError, SettingsError
from castwise.islands import apply_policy, module_facts
from castwise.policy import Policy
from castwise.region import Region
from tolerances import TOLERANCES
from two_ranks import TwoRanks

ROWS = torch.linspace(-1, 1, 2 * 3 * 5).reshape(2, 3, 5).sin()
"""A batch of three rows for each process."""

LAST_BITS = 4 * TOLERANCES["fp32"].unit
"""Norms sum their gradients in an order that depends on where tensors lie in memory."""


class Block(nn.Module):
    """A norm and a product, with statistics and a table in buffers."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(7)
        self.product = nn.Linear(7, 7)
        self.register_buffer("table", torch.linspace(0, 1, 7) ** 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Stay near the input."""
        y: torch.Tensor = x + self.product(self.norm(x)).tanh() * self.table
        return y


class Net(nn.Module):
    """Two blocks and a delicate product between two others."""

    def __init__(self, recomputed: str = "") -> None:
        super().__init__()
        self.recomputed = recomputed
        self.enter = nn.Linear(5, 7)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.delicate = nn.Linear(7, 7)
        self.leave = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run, with blocks recomputed or not."""
        x = self.enter(x)
        for block in self.blocks:
            if self.recomputed:
                reentrant = self.recomputed == "reentrant"
                x = checkpoint(block, x, use_reentrant=reentrant)
            else:
                x = block(x)
        y: torch.Tensor = self.leave(self.delicate(x))
        return y


def policy_of(name: str) -> Policy:
    """A preset with an fp32 or fp64 island."""
    preset, _, island = name.partition(" ")
    precision = {"fp32": "p=fp32,c=fp32", "fp64": "p=fp64,c=fp64,o=fp32"}
    policy = cw.preset(preset)
    if island in precision:
        return policy.with_rule(module="delicate", precision=precision[island])
    return policy.with_rule(module="delicate", precision=island) if island else policy


def loss_of(out: torch.Tensor) -> torch.Tensor:
    """A loss in fp32."""
    return out.float().square().mean()


def net(recomputed: str = "") -> Net:
    """The same weights on every process, which bf16 holds exactly."""
    torch.manual_seed(0)
    model = Net(recomputed)
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    return model


def whole(tensor: Any) -> torch.Tensor:
    """All rows of a sharded tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(
    model: nn.Module,
    run: cw.Run,
    losses: Callable[[], list[torch.Tensor]],
    num_steps: int = 3,
) -> dict[str, Any]:
    """Steps of all the losses; what came out."""
    gradients: dict[str, torch.Tensor] = {}
    outcomes = []
    for _ in range(num_steps):
        with run.step() as step:
            batches = losses()
            for loss in batches:
                step.backward(loss)
            for weight in model.parameters():
                assert weight.grad is not None
                weight.grad.div_(len(batches))  # as the mean over processes is taken
            gradients = {
                name: whole(weight.grad).clone()
                for name, weight in model.named_parameters()
            }
        outcomes.append(step.outcome)
    return {
        "gradients": gradients,
        "weights": {n: whole(w).detach().clone() for n, w in model.named_parameters()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "formats": {name: str(w.dtype) for name, w in model.named_parameters()},
        "norms": [outcome.gradient_norm for outcome in outcomes],
    }


def compiled_run(rank: int, name: str) -> dict[str, Any]:
    """As `sharded_run`, with compiled blocks that are one group each."""
    torch.compiler.reset()
    return sharded_run(rank, name, gather="stored", compiled=True)


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


def whole_run(name: str, clip_norm: float | None = None) -> dict[str, Any]:
    """What one process finds that sees both batches."""
    model, policy = net(), policy_of(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = cw.prepare(model, optimizer, policy, clip_norm=clip_norm)
    return train(model, run, lambda: [loss_of(model(x)) for x in ROWS])


def assert_close(found: dict[str, Any], expected: dict[str, Any], share: float) -> None:
    """Compare with the largest number of the whole model, not with tiny ones."""
    for kind in ("gradients", "weights", "buffers"):
        largest = max(each.abs().max() for each in expected[kind].values())
        assert found[kind].keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            error = (found[kind][name].double() - value.double()).abs().max()
            assert error <= share * largest, (kind, name, error, largest)


@pytest.mark.parametrize(
    "name",
    [
        "bf16-mixed",
        "bf16-mixed fp32",
        "bf16-mixed fp64",
        "bf16-mixed c=fp64,o=fp32",  # cast at the border, from fp32 weights
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


def test_blocks_may_be_compiled(two_ranks: TwoRanks) -> None:
    """Each block one full graph, whose weights FSDP2 gathers before it begins."""
    expected = whole_run("bf16-mixed fp32")
    for found in two_ranks(compiled_run, "bf16-mixed fp32"):
        assert_close(found, expected, LAST_BITS)


class Messages(TorchDispatchMode):
    """Notes the format of what processes send to one another."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, str, int]] = []

    def __torch_dispatch__(
        self, func: Any, _: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Note a collective, and run it."""
        name = func.name()
        if name.startswith("c10d::") and "barrier" not in name:
            tensor = next(each for each in _tensors(args))
            self.sent.append(
                (name.partition("::")[2], str(tensor.dtype), tensor.numel())
            )
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


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


def test_without_processes_there_is_nothing_to_shard_over() -> None:
    """The remedy is one line."""
    with pytest.raises(SettingsError, match="init_process_group"):
        shard(net(), cw.preset("bf16-mixed"))
