"""A number for the bits of a tensor: equal tensors have equal ones, on any device.

    fingerprint(t) = sum over i of w(i) bits(i)  modulo 2^64,  with w(i) odd

Odd numbers have an inverse modulo 2^64, so a tensor in which one number differs always
has another fingerprint; where more differ, chance decides, once in 2^64. -0.0 and 0.0
differ, and a NaN equals itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

_CHUNK = 1 << 18  # numbers at a time: two megabytes of int64, which a cache holds
_STEP = 0x5851F42D4C957F2D  # odd, and so is every sum of an even multiple and 1
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprints(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return the fingerprint of each tensor; what is sharded counts as it is here."""
    if not tensors:
        return []
    with torch.no_grad():
        found = [_fingerprint(each) for each in tensors]
    return [int(each) for each in torch.stack([one.cpu() for one in found])]


def together(numbers: Sequence[int]) -> int:
    """Return one number for several in their order."""
    total = 0
    for each in numbers:
        total = (total * _STEP + each) % (1 << 64)
    return total - (1 << 64) if total >= 1 << 63 else total  # as int64 holds it


def _fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    flat = tensor.detach().reshape(-1)
    bits = flat.view(_BITS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    weights = torch.arange(
        min(_CHUNK, bits.numel()), dtype=torch.int64, device=bits.device
    )
    weights.mul_(2).add_(1)
    for chunk in torch.split(bits, _CHUNK):
        total = total * _STEP + (chunk * weights[: chunk.numel()]).sum()
    return total
