"""Saved activations in 16 or 8 bits with a scale for each row, for generated code.

`save_formats` looks at a tensor's largest number and then decides, which a graph that
is compiled once cannot. Here every row brings its own power of two, so that nothing has
to be decided: a compiler fuses finding the largest number of a row, scaling it, and
rounding into one loop over a row that is still in the cache.

    fp16    x 2^(13 - e) in fp16, and max |x| in fp32; 2^e <= max |x| < 2^(e+1)
    bf16    x in bf16
    int8    round(127 x / max |x|) of each block, and max |x| in fp32

A power of two costs no bit: fp16 keeps 11 bits of every number down to 2^-27 of the
largest one of its row, whatever that is. Infinities and NaN stay what they are in fp16
and bf16. In int8 the -inf of a mask has a code of its own; another infinity, or a NaN,
makes its block NaN.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from castwise.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

    Narrow = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    Widen = Callable[..., torch.Tensor]

ROW_FORMATS = ("fp16", "bf16", "int8")
"""The formats that rows are stored in."""

ROW, BLOCK = 256, 64
"""Numbers that one scale in fp16, and in int8, is worth."""

_EXPONENT = 0x7F800000  # bits of fp32 that hold a power of two
_MANTISSA_BITS = 23
_HEADROOM = 13 << _MANTISSA_BITS  # a row's largest number becomes 2^13 to 2^14
_POWERS = (14 << _MANTISSA_BITS, 253 << _MANTISSA_BITS)
"""Between 2^-113 and 2^126 a power, its inverse, and both with headroom are normal."""
_BOTH_POWERS = 254 << _MANTISSA_BITS  # bits of 2^e and 2^-e add up to these
_FP32_MAX = torch.finfo(torch.float32).max
_CODES = 127
_MASKED = -128


def row_format(fmt: str, tensor: torch.Tensor) -> tuple[Narrow, Widen]:
    """Return how a tensor is stored, and how it is had back.

    Args:
        fmt: fp16, bf16 or int8.
        tensor: Of any shape; a fake will do.

    Returns:
        From a tensor to what is kept of it, and from that to a tensor of the same
        shape and format. Both are plain operators, without a decision on numbers.

    Raises:
        SettingsError: There is no such format.
    """
    dtype = tensor.dtype
    if fmt == "fp16":
        dims = row_dims(tensor, ROW)
        return (
            lambda x: _to_fp16(x, dims),
            lambda low, largest: _from_fp16(low, largest).to(dtype),
        )
    if fmt == "bf16":
        return (lambda x: (x.to(torch.bfloat16),)), lambda low: low.to(dtype)
    if fmt == "int8":
        split = _splits_in_blocks(tensor)
        dims = row_dims(tensor, BLOCK)
        return (
            lambda x: _to_int8(_in_blocks(x) if split else x, (-1,) if split else dims),
            lambda codes, largest: _from_int8(codes, largest, whole=split).to(dtype),
        )
    raise SettingsError(
        f"saved activations are stored in {', '.join(ROW_FORMATS)}, got {fmt!r}"
    )


def row_dims(tensor: torch.Tensor, least: int) -> tuple[int, ...]:
    """Return the innermost dimensions that have so many numbers together."""
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda dim: (_hint(strides[dim]), -dim))
    size, found = 1, []
    for dim in order:
        if size >= least:
            break
        found.append(dim)
        size *= _hint(tensor.shape[dim])
    return tuple(sorted(found))


def _to_fp16(
    x: torch.Tensor, dims: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = x.float().abs()
    largest = torch.where(sizes <= _FP32_MAX, sizes, 0.0).amax(dims, keepdim=True)
    scale = (_BOTH_POWERS + _HEADROOM - _power(largest)).view(torch.float32)
    return (x * scale).to(torch.float16), largest


def _from_fp16(low: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    return low.to(torch.float32) * (_power(largest) - _HEADROOM).view(torch.float32)


def _power(largest: torch.Tensor) -> torch.Tensor:
    """Return the bits of the power of two below a number, from 2^-113 to 2^126."""
    return (largest.view(torch.int32) & _EXPONENT).clamp(*_POWERS)


def _to_int8(
    x: torch.Tensor, dims: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    masked = x == -math.inf
    largest = torch.where(masked, 0.0, x.abs()).amax(dims, keepdim=True).float()
    inverse = torch.where(largest > 0, _CODES / largest, 0.0)
    codes = torch.where(masked, float(_MASKED), (x * inverse).round())
    return codes.to(torch.int8), largest


def _from_int8(
    codes: torch.Tensor, largest: torch.Tensor, *, whole: bool
) -> torch.Tensor:
    wide = codes.to(torch.float32) * (largest * (1 / _CODES))
    wide = torch.where(codes == _MASKED, -math.inf, wide)
    return wide.flatten(-2) if whole else wide


def _splits_in_blocks(tensor: torch.Tensor) -> bool:
    """Whether whole blocks fit into the last dimension."""
    size = tensor.shape[-1] if tensor.ndim else 1
    fixed = all(isinstance(each, int) for each in tensor.shape)
    return fixed and tensor.is_contiguous() and size > BLOCK and size % BLOCK == 0


def _in_blocks(x: torch.Tensor) -> torch.Tensor:
    return x.view(*x.shape[:-1], -1, BLOCK)


def _hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint or ROW)
