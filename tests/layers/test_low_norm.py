"""Norms that come out in bf16: outputs and gradients of the float64 original."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from castwise.layers.low_norm import layer_norm, normed, rms_norm

SHAPES = [(1, 1), (3, 63), (2, 5, 1000), (130, 32)]


def drawn(*shape: int) -> Tensor:
    """The same numbers each time, not centred."""
    draws = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(*shape, generator=draws) * 3 + 1


def both(
    shape: tuple[int, ...], *, centred: bool, threads: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients: ours, and those of the original."""
    given = [drawn(*shape), drawn(shape[-1]), drawn(shape[-1] + 1)[1:]]
    grad = drawn(*shape).bfloat16()
    results = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for exact in (False, True):
            x, w, b = (
                (each.double() if exact else each.clone()).requires_grad_()
                for each in given
            )
            if exact:
                y = normed(x, w, b if centred else None, 1e-5, centred=centred)
            else:
                y = layer_norm(x, w, b) if centred else rms_norm(x, w, 1e-5)
                assert y.dtype is torch.bfloat16
            y.backward(grad.to(y.dtype))
            found = [y.detach(), x.grad, w.grad, *([b.grad] if centred else [])]
            results.append([each.double() for each in found if each is not None])
    finally:
        torch.set_num_threads(before)
    return results[0], results[1]


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_those_of_the_original(
    shape: tuple[int, ...], centred: bool
) -> None:
    """Outputs within half a unit of bf16, gradients within some of fp32."""
    ours, exact = both(shape, centred=centred)
    scale = max(1.0, float(exact[0].abs().max()))
    assert torch.allclose(ours[0], exact[0], rtol=2**-8, atol=1e-5 * scale)
    for got, want in zip(ours[1:], exact[1:], strict=True):
        # a row of one number has a gradient of zero, made of what cancels
        assert float((got - want).norm()) <= 3e-6 * max(1.0, float(want.norm()))


@pytest.mark.parametrize("centred", [True, False])
def test_threads_change_little(centred: bool) -> None:
    """Rows are shared out; only sums over rows are taken in another order."""
    alone, exact = both((1030, 512), centred=centred)
    shared, _ = both((1030, 512), centred=centred, threads=3)
    assert torch.equal(alone[0], shared[0])
    assert torch.equal(alone[1], shared[1])
    for one, other, want in zip(alone[2:], shared[2:], exact[2:], strict=True):
        assert float((one - other).norm() / want.norm()) < 1e-6


def test_numbers_that_are_not_finite_stay_so() -> None:
    """A NaN with all of its bits set is no negative zero."""
    x = drawn(3, 63)
    x[1, 5] = math.nan
    x[2].view(torch.int32)[7] = 0x7FFFFFFF
    for y in (rms_norm(x, torch.ones(63)), layer_norm(x, *torch.ones(2, 63))):
        assert y[0].isfinite().all()
        assert y[1:].isnan().all()


def test_rounding_is_that_of_the_operator() -> None:
    """Ties to even: weights times ones, which a norm leaves as they are."""
    weight = drawn(1000)
    weight[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 2.0**127])
    found = rms_norm(torch.ones(1, 1000), weight, eps=0.0)
    assert torch.equal(found[0], weight.bfloat16())


def test_elsewhere_operators_do_the_same() -> None:
    """Other formats take the way of torch, and so do compiled graphs."""
    x, w, b = drawn(3, 63), drawn(63), drawn(64)[1:]
    wanted = functional.layer_norm(x.double(), (63,), w.double(), b.double())
    found = layer_norm(x.double(), w.double(), b.double())
    assert torch.equal(found, wanted.bfloat16())
    compiled = torch.compile(layer_norm, backend="eager", fullgraph=True)
    operator = functional.layer_norm(x, (63,), w, b).bfloat16()
    assert torch.equal(compiled(x, w, b), operator)
