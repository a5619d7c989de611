"""Recompute gives the same gradients bit by bit, and leaves no trace."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import castwise as cw
from castwise.autocast import autocast
from castwise.errors import SettingsError
from castwise.memory.lifetimes import Ledger
from castwise.memory.recompute import blocks_of, recompute
from memory_models import (
    ConvNet,
    Gpt,
    gpt_batch,
    gradients_of,
    image_batch,
    same_bits,
    token_loss,
)


def gpt(**settings: float) -> Gpt:
    """The same weights each time."""
    torch.manual_seed(3)
    return Gpt(**settings)  # type: ignore[arg-type]


def peak_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> int:
    """Bytes at the peak of a real forward and backward, above what stands."""
    ledger = Ledger(model)
    standing = 0
    for weight in model.parameters():
        ledger.name(weight, kind="weights")
        standing += weight.nbytes
    with ledger:
        token_loss(model(batch[0]), batch[1]).backward()
    model.zero_grad()
    return ledger.lifetimes().peak()[1] - standing


@pytest.mark.parametrize("chosen", [{}, {"every": 2}, {"modules": ["blocks.[02]"]}])
def test_gradients_with_dropout_are_the_same_bits(chosen: dict[str, object]) -> None:
    """Blocks draw the same random numbers again."""
    model, batch = gpt(), gpt_batch()
    before = gradients_of(model, batch)
    assert not same_bits(before, gradients_of(model, batch, seed=8))  # dropout counts
    with recompute(model, **chosen):  # type: ignore[arg-type]
        assert same_bits(gradients_of(model, batch), before)
    assert same_bits(gradients_of(model, batch), before)


def test_random_numbers_after_the_backward_go_on_as_without() -> None:
    """What a block draws again does not move the generator."""
    model, batch = gpt(), gpt_batch()
    gradients_of(model, batch)
    wanted = torch.rand(3)
    with recompute(model):
        gradients_of(model, batch)
        assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
def test_blocks_run_again_in_the_formats_of_autocast(fmt: str) -> None:
    """The backward runs outside of the region; the second forward must not."""
    model, batch = gpt(width=8, depth=2), gpt_batch(2, 5)

    def low(call: Callable[[], torch.Tensor]) -> torch.Tensor:
        with autocast("cpu", fmt):
            return call()

    before = gradients_of(model, batch, low)
    with recompute(model):
        assert same_bits(gradients_of(model, batch, low), before)


@pytest.mark.parametrize("first", ["policy", "recompute"])
@pytest.mark.parametrize("preset", ["bf16-mixed", "bf16-true"])
def test_a_policy_with_islands_steps_the_same_in_any_order(
    first: str, preset: str
) -> None:
    """Policy before recompute and recompute before policy: the same weights."""
    policy = cw.preset(preset).with_rule(module="blocks.1", precision="c=fp32")

    def trained(order: str) -> dict[str, torch.Tensor]:
        model, (x, y) = gpt(), gpt_batch()
        if order == "recompute":
            recompute(model)
        run = cw.prepare(model, torch.optim.AdamW(model.parameters()), policy)
        if order == "policy":
            recompute(model)
        torch.manual_seed(1)
        for _ in range(2):
            with run.step() as step:
                step.backward(token_loss(model(x), y))
        return model.state_dict()

    assert same_bits(trained(first), trained("none"))


def test_batch_norm_learns_once_from_a_batch() -> None:
    """Running statistics and counters are those of a model without recompute."""
    torch.manual_seed(3)
    plain = ConvNet()
    again = copy.deepcopy(plain)
    recompute(again)
    batch = image_batch()
    for _ in range(3):
        assert same_bits(gradients_of(again, batch), gradients_of(plain, batch))
    assert same_bits(dict(again.named_buffers()), dict(plain.named_buffers()))


class Counts(nn.Module):
    """Scales by how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Use a buffer that the forward itself writes."""
        self.calls.add_(1)
        return self.inner(x).tanh() * self.calls


def test_a_block_runs_again_with_its_buffers_as_they_were() -> None:
    """A buffer that the forward reads and writes has the old value the second time."""
    torch.manual_seed(0)
    model = nn.Sequential(Counts(), Counts())
    batch = torch.randn(3, 4), torch.tensor([0, 1, 2])
    plain = copy.deepcopy(model)
    recompute(model)
    for _ in range(2):
        assert same_bits(gradients_of(model, batch), gradients_of(plain, batch))
    assert model[0].calls == plain[0].calls == 2


def test_memory_falls_with_the_number_of_blocks() -> None:
    """The peak of a deep model: at least a quarter less, and more blocks save more."""
    model, batch = gpt(width=32, depth=8), gpt_batch(4, 64)
    plain = peak_of(model, batch)
    peaks = []
    for every in (4, 2, 1):
        with recompute(model, every=every):
            peaks.append(peak_of(model, batch))
    assert plain > peaks[0] > peaks[1] > peaks[2]
    assert peaks[2] < 0.4 * plain


def test_nothing_is_left_behind() -> None:
    """After `remove` the model has the attributes and keys that it had."""
    model = gpt()
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    recomputed = recompute(model)
    assert list(model.state_dict()) == keys
    recomputed.remove()
    recomputed.remove()
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes


def test_a_forward_of_the_instance_itself_comes_back() -> None:
    """Somebody else's patch of a forward is run again, and is there afterwards."""
    model, batch = gpt(depth=1), gpt_batch()
    block = model.blocks[0]
    own = type(block).forward
    patched = block.forward = lambda x: 2 * own(block, x)  # type: ignore[method-assign]
    before = gradients_of(model, batch)
    with recompute(model):
        assert same_bits(gradients_of(model, batch), before)
    assert block.forward is patched


def test_copies_and_pickles_are_recomputed_too() -> None:
    """A copy runs its own blocks, not those of the original."""
    model, batch = gpt(), gpt_batch()
    before = gradients_of(model, batch)
    recompute(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 -- made just now
        model.blocks[0].qkv.weight.grad = None
        assert same_bits(gradients_of(twin, batch), before)
        assert model.blocks[0].qkv.weight.grad is None


def test_keywords_and_nested_inputs_reach_the_block() -> None:
    """Names that torch's checkpoint keeps for itself, and tensors inside of dicts."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: dict[str, torch.Tensor], *, debug: float) -> torch.Tensor:
            return self.inner(x["a"]) * debug

    model = Odd()
    x = torch.randn(2, 4, requires_grad=True)

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(model({"a": x}, debug=2.0).square().sum(), x)[0]

    before = gradient()
    with recompute(model, modules=[""]):
        assert torch.equal(gradient(), before)


def test_blocks_are_found_in_lists_of_lists_and_not_inside_of_blocks() -> None:
    """A list that nobody calls is looked into; a block is not."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)])
                for _ in range(2)
            )
            self.stack = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(2, 2))))

    assert blocks_of(Nested(), what="a test") == ["layers.0.0", "layers.1.0", "stack.0"]


def test_what_cannot_be_recomputed_is_told() -> None:
    """No blocks, a glob that matches nothing, two ways at once, twice, none of all."""
    with pytest.raises(SettingsError, match=r"Linear has none.*modules="):
        recompute(nn.Linear(2, 2))
    with pytest.raises(SettingsError, match=r"no module 'block\.\*'.*did you mean"):
        recompute(gpt(), modules=["block.*"])
    with pytest.raises(SettingsError, match="both were given"):
        recompute(gpt(), every=1, modules=["blocks.0"])
    with pytest.raises(SettingsError, match="every >= 1, got 0"):
        recompute(gpt(), every=0)
    model = gpt()
    recompute(model, every=2)
    with pytest.raises(SettingsError, match=r"blocks\.0 is recomputed already"):
        recompute(model)
    assert vars(model.blocks[1]).get("forward") is None  # nothing was done


@pytest.mark.slow
def test_a_compiled_model_is_recomputed() -> None:
    """Under torch.compile the graph recomputes: gradients within fp32's last bits."""
    model, batch = gpt(dropout=0.0, depth=2), gpt_batch()
    before = gradients_of(model, batch)
    with recompute(model):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        found = gradients_of(compiled, batch)
    assert len(found) == len(before)
    for ours, theirs in zip(found.values(), before.values(), strict=True):
        torch.testing.assert_close(ours, theirs)
