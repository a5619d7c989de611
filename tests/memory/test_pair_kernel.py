"""Second tensors of pairs in one pass: close to float64, and torch's own bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from castwise.memory import pair_kernel


@pytest.mark.parametrize("num_numbers", [1, 7, 63, 1000])
def test_the_gelu_is_no_further_from_float64_than_that_of_torch(
    num_numbers: int,
) -> None:
    """At sizes no vector divides, from far below zero to far above."""
    x = torch.linspace(-13.0, 13.0, num_numbers)
    exact = functional.gelu(x.double())
    found = pair_kernel.gelu(x)
    assert found is not None
    assert float(((found - exact).abs() / (1 + x.abs())).max()) < 2.5e-7


def test_numbers_that_are_none_stay_so() -> None:
    """Infinities and NaN give none, wherever they stand, and nothing else does."""
    for value in (math.inf, -math.inf, math.nan):
        for place in (0, 15, 16, 32):
            x = torch.zeros(33)
            x[place] = value
            found = pair_kernel.gelu(x)
            assert found is not None
            assert not found[place].isfinite()
            assert int((found == 0).sum()) == 32


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("dim", [1, 17, 256])
def test_the_norm_is_that_of_the_operator(rows: int, dim: int) -> None:
    """From the statistics that the operator found."""
    draws = torch.Generator().manual_seed(rows * dim)
    x = torch.randn(2, rows, dim, generator=draws) * 3 + 5
    weight, bias = torch.randn(2, dim, generator=draws).unbind()
    eps = 1e-5
    wanted, mean, inverse = torch.native_layer_norm(x, (dim,), weight, bias, eps)
    found = pair_kernel.normed(x, mean, inverse, weight.clone(), bias.clone())
    assert found is not None
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_operators_do_what_the_kernels_may_not() -> None:
    """Several threads, other devices, parameters in another format."""
    wide, row = torch.ones(1 << 16), torch.ones(1)
    assert pair_kernel.gelu(torch.empty(3, device="meta")) is None
    low = torch.ones(3, dtype=torch.bfloat16)
    assert pair_kernel.normed(torch.ones(1, 3), row, row, low, low) is None
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert pair_kernel.gelu(wide) is None
        assert pair_kernel.gelu(torch.ones(3)) is not None
    finally:
        torch.set_num_threads(threads)
