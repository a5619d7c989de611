"""Pairs of saves kept as one: which, how exactly, and what stops them."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from castwise.memory.saves import SavesBill, store_saves
from memory_models import Gpt, gpt_batch, gradients_of, relative_error

Made = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Perceptron(nn.Module):
    """A product, what stands between, and a product."""

    def __init__(self, between: Made, width: int = 48) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.up, self.down = nn.Linear(24, width), nn.Linear(width, 3)
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One number for the loss."""
        y: torch.Tensor = self.down(self.between(self, self.up(x)))
        return y.exp().mean()


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Of all weights that have one."""
    model.zero_grad()
    model(x).backward()
    return [w.grad for w in model.parameters() if w.grad is not None]


def stored(
    between: Made, fmt: str = "fp16"
) -> tuple[SavesBill, list[torch.Tensor], list[torch.Tensor]]:
    """The bill, and gradients with and without a store."""
    model, x = Perceptron(between), torch.randn(4, 33, 24)
    wanted = gradients(model, x)
    with store_saves(model, fmt) as store:
        found = gradients(model, x)
    return store.bill, found, wanted


@pytest.mark.parametrize(
    "between",
    [
        lambda _, h: functional.gelu(h),
        lambda _, h: functional.silu(h),
        lambda model, h: model.norm(h),
        lambda _, h: functional.layer_norm(h, h.shape[-1:]),
        lambda model, h: functional.layer_norm(h, h.shape[-1:], model.norm.weight),
        lambda _, h: functional.silu(h).flatten(0, 1),
    ],
    ids=["gelu", "silu", "norm", "norm bare", "norm without bias", "view"],
)
@pytest.mark.parametrize("fmt", ["fp16", "bf16"])
def test_a_pair_takes_the_bytes_of_two_in_16_bits_and_rounds_nothing(
    between: Made, fmt: str
) -> None:
    """Half of the bytes, and gradients as without a store."""
    bill, found, wanted = stored(between, fmt)
    assert bill.num_paired == bill.num_derived == 1
    assert bill.num_packed == 0
    assert bill.before_bytes == 2 * bill.after_bytes == 2 * 4 * 33 * 48 * 4
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def _written(_: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return functional.gelu(h).mul_(2)


def _unseen(_: nn.Module, h: torch.Tensor) -> torch.Tensor:
    y = functional.gelu(h)
    with torch.no_grad():
        y.mul_(2)
    return y


def _between(_: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return functional.gelu(h) * h.sigmoid()


def _cross(_: nn.Module, h: torch.Tensor) -> torch.Tensor:
    y = functional.gelu(h.mT.contiguous().mT)
    return y.contiguous()


@pytest.mark.parametrize("between", [_written, _unseen, _between, _cross])
def test_what_does_not_follow_is_packed(between: Made) -> None:
    """Written since, even where no graph saw it; or not the next one; or turned."""
    bill, found, wanted = stored(between)
    assert bill.num_paired == bill.num_derived == 0
    assert bill.num_packed >= 2
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() < 1e-3 * other.norm()


def test_a_tanh_gelu_is_packed_on_a_cpu() -> None:
    """It would cost more than widening both."""
    bill, _, _ = stored(lambda _, h: functional.gelu(h, approximate="tanh"))
    assert (bill.num_paired, bill.num_packed) == (0, 2)


def test_int8_makes_no_pairs() -> None:
    """Two in 8 bits are half of one in fp32."""
    bill, _, _ = stored(lambda _, h: functional.gelu(h), "int8")
    assert (bill.num_paired, bill.num_packed) == (0, 2)


def test_a_frozen_norm_makes_pairs_too() -> None:
    """Its weights are read from what it saved, not from what is trained."""
    model, x = Perceptron(lambda model, h: model.norm(h)), torch.randn(99, 24)
    model.norm.requires_grad_(False)
    wanted = gradients(model, x)
    with store_saves(model, "fp16") as store:
        assert all(map(torch.equal, gradients(model, x), wanted))
    assert store.bill.num_paired == 1


def test_what_a_checkpoint_saved_is_not_asked_for() -> None:
    """A norm in a checkpointed region runs twice, as before, and not a third time."""
    calls = []

    def region(h: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return functional.gelu(h)

    bill, found, wanted = stored(
        lambda _, h: checkpoint(region, h * h, use_reentrant=False)
    )
    assert len(calls) == 4  # twice with a store, and twice without
    assert bill.num_paired == 0
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() < 1e-3 * other.norm()


def refuses_its_backward(model: nn.Module) -> None:
    """The backward says what autograd itself would."""
    with store_saves(model, "fp16"):
        loss = model(torch.randn(99, 24))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_source_that_is_written_afterwards_is_refused() -> None:
    """As autograd itself would; the pair does not give old numbers for new ones."""

    def between(_: nn.Module, h: torch.Tensor) -> torch.Tensor:
        y = functional.gelu(h)
        z = y.cos()  # saves what follows
        with torch.no_grad():
            h.add_(1)
        return z

    refuses_its_backward(Perceptron(between))


def test_what_waits_and_was_written_is_refused() -> None:
    """Between the save and its packing nobody may write, or is told."""

    def between(_: nn.Module, h: torch.Tensor) -> torch.Tensor:
        y = h.cos()
        with torch.no_grad():
            h.add_(1)
        return y

    refuses_its_backward(Perceptron(between))


def test_a_transformer_rounds_only_its_attention() -> None:
    """Half of the bytes at a tenth of the error of 16 bits everywhere."""
    torch.manual_seed(3)
    model, batch = Gpt(width=64, depth=2, dropout=0.0), gpt_batch(4, 32)
    wanted = gradients_of(model, batch)
    with store_saves(model, "fp16") as store:
        error = relative_error(gradients_of(model, batch), wanted)
    bill = store.bill
    assert bill.num_paired == bill.num_derived >= 2 * 3
    assert bill.after_bytes == bill.before_bytes / 2 > 0
    assert 0 < error < 6e-5


def test_a_second_backward_finds_everything() -> None:
    """Pairs are computed again as often as they are read."""
    model, x = (
        Perceptron(lambda model, h: functional.gelu(model.norm(h))),
        torch.ones(99, 24),
    )
    with store_saves(model, "fp16") as store:
        loss = model(x)
        weights = list(model.parameters())
        first = torch.autograd.grad(loss, weights, retain_graph=True)
        second = torch.autograd.grad(loss, weights)
    assert store.bill.num_paired == 1
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("fmt", ["fp16", "int8"])
def test_a_graph_that_is_dropped_is_freed_at_once(fmt: str) -> None:
    """No cycle holds it until the collector comes: neither what waits, nor results."""

    class Results(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            small = x[:1].exp()  # saves its result, which is left alone
            h = (x * 2).exp()  # saves its result, which is packed
            bad = (h * torch.inf).sigmoid()  # saves what does not fit
            refs.extend(StorageWeakRef(t.untyped_storage()) for t in (small, h, bad))
            return (functional.gelu(h) * small).sum() + bad.sum()

    refs: list[StorageWeakRef] = []
    model, x = Results(), torch.randn(64, 64, requires_grad=True)
    gc.disable()
    try:
        with store_saves(model, fmt):
            output = model(x)
            del output
        assert [ref.expired() for ref in refs] == [True, True, True]
    finally:
        gc.enable()


def test_statistics_keep_their_digits() -> None:
    """What a softmax or a norm saves for each row is left alone beside the rows."""

    class Normed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.layer_norm(x.sin(), x.shape[-1:]).sum()

    x = torch.randn(2048, 64, requires_grad=True)
    model = Normed()
    with store_saves(model, "fp16") as store:
        model(x)
    assert store.bill.left_alone["a statistic"] == 2
