"""Saves that are computed again from other saves: the same bits, and less memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

import castwise as cw
from castwise.autocast import autocast
from castwise.errors import SettingsError
from castwise.memory.lifetimes import Ledger
from castwise.memory.recompute import recompute
from castwise.memory.saves import store_saves
from memory_models import (
    ConvNet,
    Gpt,
    gpt_batch,
    gradients_of,
    image_batch,
    relative_error,
    same_bits,
    token_loss,
)


class Gated(nn.Module):
    """An RMS norm by hand, and a gated product, as in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(61, 48)
        self.scale = nn.Parameter(torch.rand(48) + 0.5)
        self.gate, self.up = nn.Linear(48, 96), nn.Linear(48, 96)
        self.down = nn.Linear(96, 61)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Norm, gate, product."""
        x = self.table(tokens)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.scale
        y: torch.Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt": lambda: Gpt(width=64, depth=2, dropout=0.1),
    "gated": Gated,
    "conv": ConvNet,
}


def model_of(kind: str) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """The same weights and batch each time."""
    torch.manual_seed(3)
    batch = image_batch(8, 15) if kind == "conv" else gpt_batch(4, 33)
    return MODELS[kind](), batch


def region(low: bool) -> Callable[[Callable[[], torch.Tensor]], torch.Tensor]:
    """Around a forward: autocast in bf16, or nothing."""

    def around(call: Callable[[], torch.Tensor]) -> torch.Tensor:
        with autocast("cpu", "bf16") if low else torch.enable_grad():
            return call()

    return around


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_alone_it_costs_no_bit(kind: str, low: bool) -> None:
    """Norms, activations, gates and casts run twice and give the same numbers."""
    model, batch = model_of(kind)
    wanted = gradients_of(model, batch, region(low))
    with store_saves(model, derive=True) as stored:
        assert same_bits(gradients_of(model, batch, region(low)), wanted)
        assert stored.bill.num_derived >= 3
        assert stored.bill.num_packed == 0


def peak_of(
    model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], low: bool
) -> int:
    """Bytes at the peak of forward and backward above what stands."""
    ledger = Ledger(model)
    standing = 0
    for weight in model.parameters():
        ledger.name(weight, kind="weights")
        standing += weight.nbytes
    with ledger:
        loss = region(low)(lambda: token_loss(model(batch[0]), batch[1]))
        loss.backward()
    model.zero_grad()
    return ledger.lifetimes().peak()[1] - standing


def test_in_bf16_the_peak_falls_by_a_third_at_equal_error() -> None:
    """Against torch.autocast: derived saves, and fp32 ones in fp16."""
    torch.manual_seed(3)
    model, batch = Gpt(width=64, depth=6, dropout=0.0), gpt_batch(16, 64)
    exact = gradients_of(model.double(), batch)
    model.float()

    def torch_autocast(call: Callable[[], torch.Tensor]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return call()

    theirs = relative_error(gradients_of(model, batch, torch_autocast), exact)
    before = peak_of(model, batch, low=True)
    with store_saves(model, "fp16", derive=True):
        ours = relative_error(gradients_of(model, batch, torch_autocast), exact)
        after = peak_of(model, batch, low=True)
    assert after < 0.7 * before
    assert ours < 1.02 * theirs


def test_what_is_stored_low_is_what_others_are_derived_from() -> None:
    """With fp16 the error stays that of fp16, and bytes fall by more than half."""
    model, batch = model_of("gpt")
    wanted = gradients_of(model, batch)
    with store_saves(model, "fp16", derive=True) as stored:
        assert relative_error(gradients_of(model, batch), wanted) < 5e-4
    assert stored.bill.after_bytes < 0.4 * stored.bill.before_bytes
    assert "derived" in str(stored.bill)


class Writes(nn.Module):
    """Changes a tensor in place between its use and what is made of it."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when = when
        self.leave = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Use `h` and its gelu; write one of them before or after it is saved."""
        h = x * 3
        g = functional.gelu(h)
        if self.when == "result":
            g.add_(1)
        y: torch.Tensor = self.leave(g)
        if self.when == "source":
            h.detach().add_(1)
        return y


def test_a_result_that_was_written_is_not_derived() -> None:
    """Its memory no longer holds what the operator made."""
    torch.manual_seed(0)
    model, x = Writes("result"), torch.randn(64, 64, requires_grad=True)
    wanted = torch.autograd.grad(model(x).sum(), model.leave.weight)[0]
    with store_saves(model, derive=True):
        found = torch.autograd.grad(model(x).sum(), model.leave.weight)[0]
    assert torch.equal(found, wanted)


def test_a_source_that_is_written_afterwards_is_refused() -> None:
    """Autograd refuses it too, because gelu saved it."""
    model, x = Writes("source"), torch.randn(64, 64, requires_grad=True)
    store_saves(model, derive=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(x).sum().backward()


def test_running_statistics_learn_once() -> None:
    """A batch norm that runs again does not write its buffers."""
    model, batch = model_of("conv")
    twin, _ = model_of("conv")
    with store_saves(model, derive=True):
        gradients_of(model, batch)
    gradients_of(twin, batch)
    assert same_bits(dict(model.named_buffers()), dict(twin.named_buffers()))


def test_an_evaluation_of_batch_norm_is_not_taken_for_a_training() -> None:
    """In eval mode the running statistics decide, and nothing is derived of them."""
    model, batch = model_of("conv")
    model.eval()
    wanted = gradients_of(model, batch)
    with store_saves(model, derive=True):
        assert same_bits(gradients_of(model, batch), wanted)


def test_it_stands_beside_recompute_and_a_policy() -> None:
    """Steps of a run in bf16 with islands, every second block recomputed."""

    def trained(derive: bool) -> dict[str, torch.Tensor]:
        model, (x, y) = model_of("gpt")
        policy = cw.preset("bf16-mixed").with_rule(
            module="blocks.1.up", precision="c=fp32"
        )
        run = cw.prepare(model, torch.optim.AdamW(model.parameters()), policy)
        if derive:
            recompute(model, every=2)
            store_saves(model, derive=True)
        torch.manual_seed(1)
        for _ in range(3):
            with run.step() as step:
                step.backward(token_loss(model(x), y))
        return dict(model.state_dict())

    assert same_bits(trained(derive=True), trained(derive=False))


def test_nothing_asked_for_is_refused() -> None:
    """Neither a format nor derived saves."""
    with pytest.raises(SettingsError, match="got neither"):
        store_saves(ConvNet())
