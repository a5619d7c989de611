"""The estimate, against real steps that the same ledger watched."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from castwise.errors import SettingsError, TargetError
from castwise.memory.estimate import Estimate, estimate
from castwise.memory.lifetimes import Lifetimes
from castwise.optim import SGD, STORAGES, AdamW, SweepSettings, hold_weights
from castwise.policy import Policy, preset
from castwise.training.step import prepare
from castwise.training.step_memory import watch_step

BATCH = 33
EIGHT = SweepSettings(states="8bit", min_8bit_size=256, check_finite=False)
OPTIMIZERS = {
    "torch": lambda weights: torch.optim.AdamW(weights, lr=1e-3),
    "fused": lambda weights: torch.optim.AdamW(weights, lr=1e-3, fused=True),
    "adamw": lambda weights: AdamW(weights, lr=1e-3),
    "adamw8bit": lambda weights: AdamW(weights, lr=1e-3, settings=EIGHT),
    "sgd": lambda weights: SGD(weights, lr=1e-3, momentum=0.9),
}


class Block(nn.Module):
    """Attention and an MLP, with a residual stream and dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block on [B, T, C]."""
        batch, length, width = x.shape
        heads = self.qkv(self.norm(x)).view(batch, length, 3, 3, width // 3)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        heard = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(heard.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(x)


class Net(nn.Module):
    """A language model in small: tied weights, a buffer, blocks."""

    def __init__(self, *, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.embed = nn.Embedding(101, 48)
        self.register_buffer("places", torch.randn(17, 48))
        self.blocks = nn.ModuleList(Block(48) for _ in range(3))
        self.norm = nn.LayerNorm(48)
        self.head = nn.Linear(48, 101, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits [B, T, 101]."""
        x = self.embed(tokens) + self.places
        for block in self.blocks:
            if self.recompute:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.head(self.norm(x))


def conv_net() -> tuple[nn.Module, Sequence[Any]]:
    """Convolutions, batch norm with its buffers, pooling."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 17, 3, padding=1),
        nn.BatchNorm2d(17),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(17, 31, 3, padding=1, bias=False),
        nn.BatchNorm2d(31),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(31, 10),
    )
    return net, (torch.randn(9, 3, 20, 20), torch.randint(10, (9,)))


def language(*, recompute: bool = False) -> tuple[nn.Module, Sequence[Any]]:
    """A language model with a batch."""
    torch.manual_seed(0)
    tokens = torch.randint(101, (BATCH, 17))
    return Net(recompute=recompute), (tokens, tokens.roll(-1, 1))


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over classes in the last dimension."""
    return functional.cross_entropy(output.flatten(0, -2), target.flatten())


def measured(
    model: nn.Module,
    batch: Sequence[Any],
    policy: Policy,
    make: Callable[[Any], torch.optim.Optimizer],
) -> Lifetimes:
    """Watch the second of two real steps of `prepare`."""
    model = copy.deepcopy(model)
    optimizer = make(list(model.parameters()))
    run = prepare(model, optimizer, policy)
    with run.step() as step:
        step.backward(loss_of(model(*batch[:-1]), batch[-1]))
    return watch_step(run, batch, loss_of)


def sums(lifetimes: Lifetimes, *kinds: str) -> int:
    """What some kinds hold before the step."""
    return sum(each.num_bytes for each in lifetimes.alive(0) if each.kind in kinds)


STANDING = ("weights", "storage", "states", "buffers", "batch")


@pytest.mark.parametrize("optimizer", ["torch", "adamw8bit"])
@pytest.mark.parametrize("policy", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", ["language", "recomputed", "conv"])
def test_estimate_is_what_a_real_step_holds(
    kind: str, policy: str, optimizer: str
) -> None:
    """Saved bytes are exact, what stands is exact, the peak is within 0.5 %."""
    model, batch = (
        conv_net() if kind == "conv" else language(recompute=kind == "recomputed")
    )
    make = OPTIMIZERS[optimizer]
    told = estimate(model, batch, loss_of, preset(policy), optimizer=make)
    real = measured(model, batch, preset(policy), make)
    assert told.saved_bytes == real.saved_bytes()
    for each in STANDING:
        assert told.num_bytes(each) == sums(real, each), each
    assert told.peak_bytes == pytest.approx(real.peak()[1], rel=5e-3)


@pytest.mark.parametrize("optimizer", ["fused", "adamw", "sgd"])
@pytest.mark.parametrize("storage", list(STORAGES))
def test_every_storage_is_told(storage: str, optimizer: str) -> None:
    """Whatever stands beside weights in 16 bits, and what it takes to step them."""
    model, batch = conv_net()
    policy, make = preset("bf16-true").with_storage(storage), OPTIMIZERS[optimizer]
    told = estimate(model, batch, loss_of, policy, optimizer=make)
    real = measured(model, batch, policy, make)
    for each in STANDING:
        assert told.num_bytes(each) == sums(real, each), each
    assert told.stages[-1].num_bytes == pytest.approx(
        real.peak(real.marks["update"])[1], rel=5e-3
    )


def test_weights_that_are_held_already_are_told_so() -> None:
    """A hold in force and states that were made are taken as they are."""
    model, batch = conv_net()
    optimizer = torch.optim.AdamW(model.parameters())
    hold_weights(optimizer, "kahan")
    loss_of(model.bfloat16()(batch[0].bfloat16()), batch[1]).backward()
    optimizer.step()
    optimizer.zero_grad()
    given = batch[0].bfloat16(), batch[1]
    told = estimate(model, given, loss_of, optimizer=optimizer)
    assert told.by_format("weights") == {"bf16": 2 * told.num_parameters}
    assert told.by_format("storage") == {"bf16": 2 * told.num_parameters}
    assert told.by_format("states")["fp32"] >= 8 * told.num_parameters


def test_a_model_on_meta_is_told_as_on_the_cpu() -> None:
    """A model that was never allocated has the estimate of the same model."""
    model, batch = language()
    with torch.device("meta"):
        unborn = Net()
    policy, make = preset("bf16-true"), OPTIMIZERS["adamw"]
    here = estimate(model, batch, loss_of, policy, optimizer=make)
    there = estimate(unborn, batch, loss_of, policy, optimizer=make)
    assert here == there


def test_nothing_of_the_model_is_touched() -> None:
    """Weights, buffers, gradients, random state and the optimizer stay as they are."""
    model, batch = conv_net()
    optimizer = torch.optim.AdamW(model.parameters())
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    estimate(model, batch, loss_of, preset("bf16-true"), optimizer=optimizer)
    assert torch.equal(random, torch.get_rng_state())
    assert all(weight.grad is None for weight in model.parameters())
    assert not optimizer.state
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype is before[name].dtype


def test_an_estimate_comes_back_from_its_record() -> None:
    """The record is JSON, and holds everything."""
    model, batch = language()
    told = estimate(model, batch, loss_of, optimizer=OPTIMIZERS["torch"])
    assert Estimate.from_record(json.loads(json.dumps(told.record()))) == told


def test_rows_add_up_to_the_peak() -> None:
    """Every byte of the peak belongs to a kind, a module and a format."""
    model, batch = language()
    told = estimate(
        model, batch, loss_of, preset("bf16-mixed"), optimizer=OPTIMIZERS["torch"]
    )
    assert told.at_peak() == told.peak_bytes
    assert max(peak.num_bytes for peak in told.stages) == told.peak_bytes
    assert sum(told.by_kind().values()) == told.num_bytes()
    num_weights = len(list(model.parameters()))
    assert told.num_bytes("states") == 8 * told.num_parameters + 4 * num_weights
    assert told.num_bytes("saved", module="blocks") > 0
    assert set(told.by_module("saved", depth=1)) >= {"blocks", "norm", "head"}
    assert told.by_format("casts") == {"bf16": told.num_bytes("casts")}


def test_recompute_by_globs_saves_what_recomputing_in_the_model_saves() -> None:
    """Blocks named by a glob hold what `checkpoint` in the model holds."""
    plain, batch = language()
    told = estimate(plain, batch, loss_of, recompute=("blocks.?",))
    real = measured(*language(recompute=True), preset("32-true"), OPTIMIZERS["sgd"])
    assert told.recompute == ("blocks.0", "blocks.1", "blocks.2")
    assert told.saved_bytes == real.saved_bytes()
    assert told.saved_bytes < estimate(plain, batch, loss_of).saved_bytes / 3


class Branches(nn.Module):
    """Takes another way when its positions, which depend on no input, are odd."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x, squared where positions rise as they should."""
        places = torch.arange(x.shape[1])
        steps = torch.diff(places, prepend=places[:1] - 1)
        return x * x if bool((steps == 1).all()) else x.exp().exp()


def test_models_may_branch_on_what_depends_on_no_input() -> None:
    """Positions and masks made of them have numbers, as in a real run."""
    net = nn.Sequential(nn.Linear(9, 21), Branches())
    batch = torch.randn(5, 9), torch.randint(21, (5,))
    told = estimate(net, batch, loss_of)
    real = measured(net, batch, preset("32-true"), OPTIMIZERS["sgd"])
    assert told.saved_bytes == real.saved_bytes()
    assert "exp" not in {each.op for each in real.allocations}


def test_what_stands_beside_is_counted_where_it_is_named() -> None:
    """Averages of the weights are the caller's to name."""
    model, batch = conv_net()
    plain = estimate(model, batch, loss_of)
    more = estimate(model, batch, loss_of, beside={"averages": 4096})
    assert more.peak_bytes == plain.peak_bytes + 4096
    assert more.by_module("beside") == {"averages": 4096}


def test_mistakes_are_told() -> None:
    """What cannot be estimated is refused with its remedy."""
    model, batch = conv_net()
    other = torch.optim.SGD(nn.Linear(3, 3).parameters())
    with pytest.raises(SettingsError, match="optimizer of this model"):
        estimate(model, batch, loss_of, optimizer=other)
    with pytest.raises(SettingsError, match="finds no module"):
        estimate(model, batch, loss_of, recompute=("block.*",))
    with pytest.raises(SettingsError, match="policy asks for"):
        estimate(model, batch, loss_of, storage="split")
    with pytest.raises(TargetError, match="batch of"):
        estimate(model, batch[0], loss_of)
    with pytest.raises(TargetError, match="loss of one number"):
        estimate(model, batch, lambda out, _: out)
    with pytest.raises(TargetError, match="depends on the weights"):
        estimate(model, batch, lambda out, _: out.detach().sum())
    with pytest.raises(TargetError, match="branch on shapes"):
        estimate(model, batch, lambda out, _: out.sum() * float(out.sum()))
