"""Saved activations in fewer bits: what is stored, what left alone, what it costs."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import castwise as cw
from castwise.autocast import autocast
from castwise.errors import SettingsError
from castwise.memory.lifetimes import Ledger
from castwise.memory.recompute import recompute
from castwise.memory.save_formats import BLOCK, store_of
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


def gpt(**settings: float) -> Gpt:
    """The same weights each time."""
    torch.manual_seed(3)
    return Gpt(**settings)  # type: ignore[arg-type]


def held_at_backward(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> int:
    """Bytes of activations that are alive between forward and backward."""
    ledger = Ledger(model)
    for weight in model.parameters():
        ledger.name(weight, kind="weights")
    with ledger:
        output = model(batch[0])
        ledger.begin("backward")
        output.float().square().mean().backward()
    model.zero_grad()
    lifetimes = ledger.lifetimes()
    turn = lifetimes.marks["backward"]
    standing = {"weights", "batch"}
    return sum(a.num_bytes for a in lifetimes.alive(turn) if a.kind not in standing)


def test_fp32_in_fp16_halves_what_is_held_at_a_small_error() -> None:
    """Half of the bytes, and a gradient error below 2.5e-4."""
    model, batch = gpt(width=64, depth=2, dropout=0.0), gpt_batch(4, 32)
    wanted, before = gradients_of(model, batch), held_at_backward(model, batch)
    with store_saves(model, "fp16") as stored:
        error = relative_error(gradients_of(model, batch), wanted)
        held = held_at_backward(model, batch)
    assert 0 < error < 2.5e-4
    assert held < 0.55 * before
    assert stored.bill.after_bytes == stored.bill.before_bytes / 2 > 0


@pytest.mark.parametrize(
    ("fmt", "bound"), [("fp16", 1e-3), ("bf16", 8e-3), ("int8", 1e-1)]
)
@pytest.mark.parametrize("kind", ["gpt", "conv"])
def test_each_format_costs_its_digits(fmt: str, bound: float, kind: str) -> None:
    """Gradients are within the format's error, with dropout and with batch norm."""
    torch.manual_seed(3)
    model = gpt(width=64) if kind == "gpt" else ConvNet()
    batch = gpt_batch(4, 32) if kind == "gpt" else image_batch(8, 15)
    wanted = gradients_of(copy.deepcopy(model), batch)
    with store_saves(model, fmt):
        assert 0 < relative_error(gradients_of(model, batch), wanted) < bound


def test_three_views_of_one_memory_are_stored_once() -> None:
    """Query, key and value of one product are one storage."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = nn.Linear(64, 192, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.all(x).chunk(3, dim=-1)
            y: torch.Tensor = q * k * v
            return y

    model, x = Three(), torch.randn(50, 64)
    with store_saves(model, "fp16") as stored:
        model(x).sum().backward()
    assert stored.bill.num_packed == 2  # all three at once, and q * k
    assert stored.bill.before_bytes == 50 * 192 * 4 + 50 * 64 * 4


def test_three_views_that_are_read_together_are_widened_once() -> None:
    """They share one memory as long as one of them lives, and none afterwards."""

    class Together(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *parts: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(*parts)
            return parts[0] * parts[1] * parts[2]

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            parts = ctx.saved_tensors
            seen.append({part.untyped_storage().data_ptr() for part in parts})
            values.append([part.clone() for part in parts])
            a, b, c = parts
            return grad * b * c, grad * a * c, grad * a * b

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = nn.Linear(64, 192, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = Together.apply(*self.all(x).chunk(3, dim=-1)).exp()
            return y.sum()

    seen: list[set[int]] = []
    values: list[list[torch.Tensor]] = []
    model, x = Three(), torch.randn(50, 64)
    with store_saves(model, "fp16"):
        loss = model(x)
        loss.backward(retain_graph=True)
        loss.backward()
    assert [len(each) for each in seen] == [1, 1]
    wanted = model.all(x).half().float().chunk(3, dim=-1)
    for found in values:
        assert all(map(torch.equal, found, wanted))


def test_what_others_hold_is_left_alone() -> None:
    """Weights, inputs, outputs, integers, bools, fp64 and small tensors."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))

        def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            wide = (x @ self.weight).double().tanh().float()
            y: torch.Tensor = wide.masked_fill(at > 5, 0.0).exp()
            return y

    model, x = Mixed(), torch.randn(64, 64)
    at = torch.randint(9, (64, 64))
    with store_saves(model, "fp16") as stored:
        output = model(x, at)
        output.sum().backward()
    left = stored.bill.left_alone
    assert left["an output"] == left["an input"] == left["float64"] == 1
    assert left["bool"] == 1
    assert stored.bill.num_packed == stored.bill.before_bytes == 0
    assert torch.equal(output, model(x, at))


def test_casts_of_weights_are_left_alone() -> None:
    """A weight that autocast cast to bf16 is not rounded to 8 bits."""
    model, batch = gpt(width=64, dropout=0.0), gpt_batch(4, 33)
    with store_saves(model, "int8") as stored, autocast("cpu", "bf16"):
        model(batch[0])
    assert stored.bill.left_alone["a cast of a weight"] >= 3 * 4


@pytest.mark.parametrize("factor", [1e-30, 1e-7, 1.0, 3e4, 1e30])
def test_fp16_reaches_every_range(factor: float) -> None:
    """A tensor too large or too small for fp16 is scaled by a power of two."""
    flat = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * factor
    kept = store_of("fp16").put(flat)
    assert kept is not None
    assert kept.num_bytes == 2000
    found = kept.get()
    assert float((found - flat).abs().max() / flat.abs().max()) < 2**-10


@pytest.mark.parametrize("fmt", ["fp16", "int8"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_tensor_that_does_not_fit_is_kept_whole_and_counted(
    fmt: str, value: float
) -> None:
    """Infinities and NaNs come back as they were, and the bill says so."""

    class Bad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(40, 40)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inner(x)
            h = h.masked_fill(torch.arange(40) == 3, value)
            return (h * h).tanh()

    model, x = Bad(), torch.randn(40, 40)
    wanted = torch.autograd.grad(model(x).nansum(), model.inner.bias)[0]
    with store_saves(model, fmt) as stored:
        found = torch.autograd.grad(model(x).nansum(), model.inner.bias)[0]
    assert stored.bill.num_whole == 1
    assert torch.equal(found.isnan(), wanted.isnan())
    assert "kept whole" in str(stored.bill)


@pytest.mark.parametrize("num_numbers", [1, 63, 64, 65, 1000])
def test_eight_bits_are_within_half_a_code_of_their_block(num_numbers: int) -> None:
    """The error is at most 1/254 of the largest number of the block."""
    flat = torch.randn(num_numbers, generator=torch.Generator().manual_seed(1)) * 7
    flat[num_numbers // 2 :] *= 1e-3
    kept = store_of("int8").put(flat)
    assert kept is not None
    found = kept.get()
    assert found.shape == flat.shape
    for start in range(0, num_numbers, BLOCK):
        block = slice(start, start + BLOCK)
        bound = float(flat[block].abs().max()) / 254 * (1 + 1e-5)
        assert float((found[block] - flat[block]).abs().max()) <= bound


def test_eight_bits_keep_zeros() -> None:
    """A block of zeros has no scale, and is zeros again."""
    kept = store_of("int8").put(torch.zeros(130))
    assert kept is not None
    assert torch.equal(kept.get(), torch.zeros(130))


def test_a_change_in_place_is_refused_or_does_not_matter() -> None:
    """As autograd would: what is kept by reference may not change; a copy may."""

    class Keeps(nn.Module):
        def forward(self, x: torch.Tensor, *, small: bool) -> torch.Tensor:
            h = x[:2] * 1 if small else x * 1
            y = h * h
            z = y.cos()  # saves the next one, and h is packed
            h.add_(1)
            return y + 0 * z

    x = torch.randn(64, 64, requires_grad=True)
    with store_saves(Keeps(), "fp16"):
        pass
    model = Keeps()
    with store_saves(model, "fp16"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            model(x, small=True).sum().backward()
        found = torch.autograd.grad(model(x, small=False).sum(), x)[0]
    torch.testing.assert_close(found, 2 * x, rtol=1e-3, atol=1e-3)


def test_memory_that_is_used_anew_is_not_taken_for_the_old() -> None:
    """Storages come and go at the same addresses while the forward runs."""

    class Reuses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = x
            for scale in range(1, 6):
                h = (x * scale).sigmoid()  # its input is freed at once
                total = total + (h * h).mul(scale).exp().sum()
                del h
                gc.collect()
            return total.sum()

    x = torch.randn(64, 64, requires_grad=True)
    model = Reuses()
    wanted = torch.autograd.grad(model(x), x)[0]
    with store_saves(model, "fp16"):
        found = torch.autograd.grad(model(x), x)[0]
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-2 * wanted.abs().max())


def test_memory_is_let_go_with_the_graph() -> None:
    """Nothing of a forward stays when its output is dropped without a backward."""
    model, batch = gpt(width=64), gpt_batch(4, 32)
    ledger = Ledger(model)
    with store_saves(model, "fp16"), ledger:
        output = model(batch[0])
        del output
        gc.collect()
    alive = [a for a in ledger.lifetimes().allocations if a.died is None and a.born > 0]
    assert sum(a.num_bytes for a in alive) < 4096


def test_without_gradients_nothing_happens() -> None:
    """An evaluation neither stores nor counts."""
    model, batch = gpt(), gpt_batch()
    with store_saves(model, "fp16") as stored, torch.no_grad():
        model(batch[0])
    assert stored.bill.num_packed == 0


def test_an_exception_in_the_forward_leaves_no_hook() -> None:
    """Tensors saved afterwards are not packed."""

    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError(f"on purpose, {len(x)}")

    model = Fails()
    with store_saves(model, "fp16") as stored:
        with pytest.raises(ValueError, match="on purpose"):
            model(torch.randn(64, 64))
        x = torch.randn(64, 64, requires_grad=True)
        x.exp().sum().backward()
        assert stored.bill.num_packed == 0


def test_it_stores_what_goes_into_recomputed_blocks() -> None:
    """With recompute only the inputs of blocks are held, and they are stored low."""
    model, batch = gpt(width=64, depth=4, dropout=0.0), gpt_batch(4, 32)
    wanted = gradients_of(model, batch)
    with recompute(model):
        alone = held_at_backward(model, batch)
        with store_saves(model, "fp16"):
            both = held_at_backward(model, batch)
            assert relative_error(gradients_of(model, batch), wanted) < 5e-4
    assert both < 0.75 * alone


def test_a_checkpoint_of_the_user_inside_of_the_model_goes_on() -> None:
    """What the model recomputes by itself is recomputed as before."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = gpt(dropout=0.2).blocks[0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = checkpoint(self.inner, x * 1, use_reentrant=False)
            return y

    model, x = Checkpointed(), torch.randn(4, 33, 32)

    def gradient() -> torch.Tensor:
        torch.manual_seed(2)
        weight = model.inner.up.weight
        return torch.autograd.grad(model(x).square().sum(), weight)[0]

    wanted = gradient()
    with store_saves(model, "fp16"):
        found = gradient()
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-3 * wanted.abs().max())


def test_under_a_policy_only_wide_tensors_are_stored() -> None:
    """In a bf16 plan the fp32 rest goes to fp16; steps stay close to those without."""

    def trained(fmt: str | None) -> list[float]:
        model, (x, y) = gpt(width=64, dropout=0.0), gpt_batch(4, 32)
        run = cw.prepare(
            model,
            torch.optim.AdamW(model.parameters(), lr=3e-3),
            cw.preset("bf16-mixed"),
        )
        stored = None if fmt is None else store_saves(model, fmt)
        losses = []
        for _ in range(8):
            with run.step() as step:
                step.backward(token_loss(model(x), y))
            losses.append(step.outcome.loss)
        assert stored is None or stored.bill.left_alone["bfloat16"] > 0
        return losses

    plain, low = trained(None), trained("fp16")
    assert plain[0] == low[0]
    assert plain[-1] == pytest.approx(low[-1], rel=2e-2)
    assert low[-1] < low[0]


def test_removed_it_is_gone_and_copies_do_not_inherit_it() -> None:
    """After `remove` gradients have the bits of before; a copy stores nothing."""
    model, batch = gpt(), gpt_batch()
    wanted = gradients_of(model, batch)
    stored = store_saves(model, "int8")
    twin = copy.deepcopy(model)
    assert same_bits(gradients_of(twin, batch), wanted)
    stored.remove()
    stored.remove()
    assert same_bits(gradients_of(model, batch), wanted)


def test_another_format_is_refused_with_those_that_exist() -> None:
    """The message lists the table."""
    with pytest.raises(SettingsError, match="fp16, bf16, int8, got 'fp8'"):
        store_saves(gpt(), "fp8")
