"""The chunked cross-entropy against logits in float64, chunk by odd chunk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

from castwise.autocast import autocast
from castwise.errors import SettingsError
from castwise.layers import chunked_loss
from castwise.layers.chunked_loss import IGNORED, chunk_of, chunked_cross_entropy


def original(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return what the loss is, in float64 and with all logits at once."""
    logits = hidden.double() @ weight.double().T
    counted = targets != IGNORED
    right = logits.gather(-1, targets.where(counted, 0)[..., None]).squeeze(-1)
    return (logits.logsumexp(-1) - right)[counted].mean()


def case(
    num: int = 13, dim: int = 5, vocab: int = 7, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, a head, and targets of which two do not count."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(num, dim, dtype=dtype, generator=generator)
    weight = torch.randn(vocab, dim, dtype=dtype, generator=generator)
    targets = torch.randint(vocab, (num,), generator=generator)
    targets[[1, num - 1]] = IGNORED
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("chunk", [1, 3, 13, 1000, None])
def test_loss_and_gradients_are_those_of_the_original(chunk: int | None) -> None:
    """No chunk size changes what is computed."""
    hidden, weight, targets = case()
    loss = chunked_cross_entropy(hidden, weight, targets, chunk=chunk)
    right = original(hidden, weight, targets)
    torch.testing.assert_close(loss.double(), right, rtol=1e-6, atol=0)
    wanted = torch.autograd.grad(right, (hidden, weight))
    found = torch.autograd.grad(loss, (hidden, weight))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-7)


def test_gradcheck_in_both_arguments() -> None:
    """The gradients are those of finite differences."""
    hidden, weight, targets = case(num=7, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_cross_entropy(h, w, targets, chunk=3), (hidden, weight)
    )


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_needs_no_gradient_gets_none(frozen: int) -> None:
    """A frozen head, or hidden states that are data, cost nothing."""
    both = list(case()[:2])
    targets = case()[2]
    both[frozen] = both[frozen].detach()
    chunked_cross_entropy(both[0], both[1], targets, chunk=4).backward()
    assert both[frozen].grad is None
    free = both[1 - frozen]
    wanted = torch.autograd.grad(original(both[0], both[1], targets), free)[0]
    torch.testing.assert_close(free.grad, wanted, rtol=2e-5, atol=1e-7)


def test_a_loss_scale_scales_the_gradient_bit_by_bit() -> None:
    """The backward is linear in the upstream gradient, and knows no clamp."""
    hidden, weight, targets = case()
    loss = chunked_cross_entropy(hidden, weight, targets, chunk=4)
    plain = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    scaled = torch.autograd.grad(
        loss, (hidden, weight), torch.tensor(2.0**16), retain_graph=True
    )
    for one, other in zip(plain, scaled, strict=True):
        assert torch.equal(one * 2.0**16, other)
    endless = torch.autograd.grad(loss, (hidden, weight), torch.tensor(torch.inf))
    assert not torch.isfinite(endless[0]).any()


@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
def test_under_autocast_products_run_low_and_the_loss_stays_fp32(fmt: str) -> None:
    """It computes as a linear layer and torch's loss would, and no worse."""
    hidden, weight, targets = case(num=300, dim=33, vocab=97)
    with autocast("cpu", fmt):
        loss = chunked_cross_entropy(hidden, weight, targets, chunk=64)
        rival = cross_entropy(linear(hidden, weight), targets)
    assert loss.dtype is torch.float32
    right = original(hidden, weight, targets)
    assert abs(loss - right) <= 2 * abs(rival - right) + 1e-3 * right
    exact = torch.autograd.grad(right, (hidden, weight))
    ours = torch.autograd.grad(loss, (hidden, weight))
    theirs = torch.autograd.grad(rival, (hidden, weight))
    for one, two, best in zip(ours, theirs, exact, strict=True):
        assert one.dtype is torch.float32
        assert (one - best).norm() <= 1.5 * (two - best).norm() + 1e-6 * best.norm()
        assert (one - best).norm() <= 2e-2 * best.norm()


def test_small_gradients_survive_fp16() -> None:
    """The division by the number of tokens comes after the products."""
    hidden, weight, targets = case(num=5000, dim=8, vocab=11)
    with autocast("cpu", "fp16"):
        loss = chunked_cross_entropy(hidden, weight, targets)
    found = torch.autograd.grad(loss, hidden)[0]
    exact = torch.autograd.grad(original(hidden, weight, targets), hidden)[0]
    assert (found - exact).norm() <= 2e-3 * exact.norm()


def test_weights_held_low_get_low_gradients() -> None:
    """Gradients come in the formats of what they belong to."""
    hidden, weight, targets = case()
    low = [each.detach().bfloat16().requires_grad_() for each in (hidden, weight)]
    loss = chunked_cross_entropy(low[0], low[1], targets)
    assert loss.dtype is torch.float32
    loss.backward()
    assert low[0].grad is not None
    assert low[0].grad.dtype is low[1].grad.dtype is torch.bfloat16
    exact = torch.autograd.grad(original(low[0], low[1], targets), low[1])[0]
    assert (low[1].grad - exact).norm() <= 2e-2 * exact.norm()


def test_batches_of_windows_are_taken_as_they_are() -> None:
    """Any leading shape does."""
    hidden, weight, targets = case(num=12)
    flat = chunked_cross_entropy(hidden, weight, targets, chunk=5)
    deep = chunked_cross_entropy(
        hidden.view(3, 4, -1), weight, targets.view(3, 4), chunk=5
    )
    assert torch.equal(flat, deep)


def test_without_a_token_that_counts_it_is_nan_as_that_of_torch() -> None:
    """A mean over nothing is no number."""
    hidden, weight, _ = case()
    assert chunked_cross_entropy(hidden, weight, torch.full((13,), IGNORED)).isnan()


def test_no_tensor_is_as_large_as_the_logits() -> None:
    """The largest tensor ever made has a chunk of rows, or is a gradient."""
    made: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: object, types: object, args: object = (), kwargs: object = None
        ) -> object:
            out = func(*args, **(kwargs or {}))  # type: ignore[operator, misc]
            if isinstance(out, Tensor):
                made.append(out.numel())
            return out

    hidden, weight, targets = case(num=1000, dim=16, vocab=501)
    with Sizes():
        chunked_cross_entropy(hidden, weight, targets, chunk=50).backward()
    assert max(made) <= 50 * 501
    made.clear()
    with Sizes():
        cross_entropy(linear(hidden, weight), targets).backward()
    assert max(made) >= 1000 * 501  # the measure sees what it should


def test_a_chunk_weighs_as_much_as_the_hidden_states() -> None:
    """A large vocabulary means small chunks, but none below the least."""
    assert chunk_of(65_536, 512, 50_304) == 1024
    assert chunk_of(4096, 512, 50_304) == 256
    assert chunk_of(10, 512, 50) == 256
    assert chunk_of(65_536, 512, 50_304, torch.bfloat16) == 2048
    assert chunk_of(4096, 512, 50_304, torch.bfloat16) == 512
    assert chunk_of(4096, 512, 50_304, torch.float64) == 256


def test_a_backward_scales_in_place_unless_another_one_comes() -> None:
    """The gradient of the head is there once, and right however often it is asked."""
    hidden, weight, targets = case()
    loss = chunked_cross_entropy(hidden, weight, targets, chunk=4)
    sums = loss.grad_fn.saved_tensors  # type: ignore[union-attr]
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    for one, two, total in zip(first, second, sums, strict=False):
        assert torch.equal(one, two)
        assert one.data_ptr() != total.data_ptr() == two.data_ptr()


def test_a_batch_of_upstream_gradients_gives_a_gradient_each() -> None:
    """`is_grads_batched` runs the backward once for all of them."""
    hidden, weight, targets = case()
    loss = chunked_cross_entropy(hidden, weight, targets, chunk=4)
    one = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    factors = torch.tensor([1.0, -2.0, 0.5])
    (found,) = torch.autograd.grad(loss, weight, factors, is_grads_batched=True)
    for each, factor in zip(found, factors, strict=True):
        torch.testing.assert_close(each, one * factor)


def test_in_16_bits_only_some_rows_are_wide_and_the_head_grows_by_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parts change no bit, and no tensor in fp32 is as large as a chunk of logits."""
    hidden, weight, targets = case(num=64, dim=8, vocab=501)
    with autocast("cpu", "bf16"):
        whole = chunked_cross_entropy(hidden, weight, targets, chunk=32)
        wanted = torch.autograd.grad(whole, (hidden, weight))
    monkeypatch.setattr(chunked_loss, "_WIDE_AT_ONCE", 5 * 501 + 7)
    monkeypatch.setattr(chunked_loss, "_ADDED_AT_ONCE", 100 * 8)
    wide: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: object, types: object, args: object = (), kwargs: object = None
        ) -> object:
            out = func(*args, **(kwargs or {}))  # type: ignore[operator, misc]
            if isinstance(out, Tensor) and out.dtype is torch.float32:
                wide.append(out.numel())
            return out

    with autocast("cpu", "bf16"), Sizes():
        parts = chunked_cross_entropy(hidden, weight, targets, chunk=32)
        found = torch.autograd.grad(parts, (hidden, weight))
    assert max(wide) == weight.numel()  # the gradient itself, larger than 5 rows
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=2**-8, atol=0.0)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0.0)


def test_without_gradients_logits_are_only_measured() -> None:
    """An evaluation makes neither exponentials nor products of gradients."""
    hidden, weight, targets = case()
    called: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: object, types: object, args: object = (), kwargs: object = None
        ) -> object:
            called.append(str(func))
            return func(*args, **(kwargs or {}))  # type: ignore[operator, misc]

    with torch.no_grad(), Names():
        found = chunked_cross_entropy(hidden, weight, targets, chunk=4)
    assert not {"aten.exp_.default", "aten.addmm_.default"} & set(called)
    torch.testing.assert_close(found.double(), original(hidden, weight, targets))


def test_shapes_that_do_not_fit_are_refused() -> None:
    """One sentence names all three."""
    hidden, weight, targets = case()
    with pytest.raises(SettingsError, match=r"\(13, 5\), \(7, 5\) and \(12,\)"):
        chunked_cross_entropy(hidden, weight, targets[1:])
    with pytest.raises(SettingsError, match="at least 1"):
        chunked_cross_entropy(hidden, weight, targets, chunk=0)
