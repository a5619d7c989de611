"""fp32 to fp16 in one pass: the numbers of torch's cast, and how large they are."""

from __future__ import annotations

import math

import pytest
import torch

from castwise.memory.half_kernel import narrowed

EDGES = [
    *(0.0, -0.0, 1.0, -1.0, 1 / 3, 65504.0, 65519.99, 65520.0, -65536.0, 1e30),
    *(2.0**-14, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25, -(2.0**-26), 1e-45),
    *(1 + 2.0**-11, 1 + 3 * 2.0**-11, math.inf, -math.inf, math.nan),
]


@pytest.mark.parametrize("num_numbers", [1, 7, 63, 1000])
def test_the_numbers_are_those_of_the_operator(num_numbers: int) -> None:
    """Ties to even, subnormals, infinities and NaN, at sizes no vector divides."""
    draws = torch.Generator().manual_seed(num_numbers)
    sizes = 10.0 ** torch.randint(-9, 6, (num_numbers,), generator=draws)
    drawn = torch.randn(num_numbers, generator=draws) * sizes
    for flat in (drawn, torch.tensor(EDGES)):
        done = narrowed(flat)
        assert done is not None
        wanted = flat.to(torch.float16)
        torch.testing.assert_close(done[0], wanted, rtol=0, atol=0, equal_nan=True)
        bits = wanted.abs().view(torch.int16)
        numbers = bits[~wanted.isnan()]
        top = int(numbers.max())
        assert done[1] == top if not wanted.isnan().any() else done[1] > 0x7C00


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 7e4, -7e4])
def test_what_fp16_cannot_hold_is_told_wherever_it_stands(value: float) -> None:
    """An infinity, a NaN or an overflow in any place of any vector."""
    for place in range(67):
        flat = torch.zeros(67)
        flat[place] = value
        done = narrowed(flat)
        assert done is not None
        assert done[1] >= 0x7C00


def test_operators_do_what_the_kernel_may_not() -> None:
    """Other classes of tensors, and large ones where torch has several threads."""
    assert narrowed(torch.nn.Parameter(torch.ones(3))) is None
    assert narrowed(torch.empty(3, device="meta")) is None
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert narrowed(torch.ones(1 << 16)) is None
        assert narrowed(torch.ones(3)) is not None
    finally:
        torch.set_num_threads(threads)
