from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from castwise.optim.pieces import join_8, join_16, split_8, split_16


def _of_bits(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)


def _pieces_16(full: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    high = torch.empty_like(full, dtype=torch.bfloat16)
    low = torch.empty_like(full, dtype=torch.int16)
    split_16(full, high, low)
    return high, low


def test_16_bits_beside_bf16_are_exactly_fp32_for_every_kind_of_number() -> None:
    """Random bit patterns (NaNs, infinities, subnormals among them) come back."""
    lot = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1_000_003,), generator=lot)
    edges = [0, -(2**31), 0x7F800000, 0x7F7FFFFF, 0x00000001, 0x007FFFFF, 0x3F7FFFFF]
    full = _of_bits(torch.cat([bits, torch.tensor(edges)]))
    assert torch.equal(
        join_16(*_pieces_16(full)).view(torch.int32), full.view(torch.int32)
    )


@given(st.floats(width=32, allow_nan=False))
def test_the_bf16_piece_is_a_nearest_bf16(number: float) -> None:
    """The model sees the weight rounded to nearest; at ties either neighbour is."""
    full = torch.tensor([number])
    high, _ = _pieces_16(full)
    nearest = full.bfloat16()
    if high.isfinite() and nearest.isfinite():
        distance = (high.double() - full.double()).abs()
        assert distance == (nearest.double() - full.double()).abs()
    else:
        assert torch.equal(high, nearest)


def test_8_bits_beside_bf16_keep_16_significant_bits() -> None:
    """The relative error is at most 2^-17 wherever the number is normal."""
    full = torch.randn(100_003, generator=torch.Generator().manual_seed(1))
    high = torch.empty_like(full, dtype=torch.bfloat16)
    low = torch.empty_like(full, dtype=torch.int8)
    split_8(full, high, low)
    error = ((join_8(high, low) - full) / full).abs().max()
    assert 2**-18 < error <= 2**-16
    again = torch.empty_like(high), torch.empty_like(low)
    split_8(join_8(high, low), *again)
    assert torch.equal(again[0], high)
    assert torch.equal(again[1], low)
