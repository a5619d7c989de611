"""A number in fp32 as the bf16 number next to it and a remainder of 16 or 8 bits.

bf16 is the upper half of fp32. Cutting there would truncate; so the upper half is first
rounded to nearest, and the remainder says, with a sign, how far that went:

    fp32        s eeeeeeee mmmmmmm xxxxxxxxxxxxxxxx      as an integer u
    bf16        s eeeeeeee mmmmmmm                       h = (u + 2^15) >> 16
    remainder                      rrrrrrrrrrrrrrrr      r = u - (h << 16)
    back        u = (h << 16) + r

Because 2^15 is added before the cut, r lies in -2^15 .. 2^15 - 1: always an int16, and
the way back is exact for every finite number and both infinities. Ties go away from
zero; rounding them to even would need an r of +2^15, which no int16 holds. The weight
that the model sees is therefore a nearest bf16, and differs from `Tensor.bfloat16()`
only at exact ties. A few NaNs whose payload lies in the low bits look like infinities
or zeros in bf16 alone, and are NaNs again once joined.

The remainder of 8 bits keeps 15 of the 23 mantissa bits, rounded to nearest once:

    fp32        s eeeeeeee mmmmmmm xxxxxxxx yyyyyyyy
    24 bits     s eeeeeeee mmmmmmm xxxxxxxx              t = (u + 2^7) >> 8
    bf16        s eeeeeeee mmmmmmm                       h = (t + 2^7) >> 8
    remainder                      rrrrrrrr              r = t - (h << 8)
"""

from __future__ import annotations

import torch


def split_16(full: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> None:
    """Write the pieces of a number.

    Args:
        full: fp32, any shape.
        high: bf16 of that shape, written.
        low: int16 of that shape, written.
    """
    bits = full.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    low.copy_(bits - (upper << 16))
    high.view(torch.int16).copy_(upper)


def join_16(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Return the fp32 number of a bf16 and an int16 piece: `split_16` undone."""
    bits = high.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return bits.add_(low).view(torch.float32)


def split_8(full: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> None:
    """Write the pieces of a number rounded to 24 bits.

    Args:
        full: fp32, any shape.
        high: bf16 of that shape, written.
        low: int8 of that shape, written.
    """
    bits = (full.view(torch.int32) + 0x80) >> 8
    upper = (bits + 0x80) >> 8
    low.copy_(bits - (upper << 8))
    high.view(torch.int16).copy_(upper)


def join_8(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Return the fp32 number of a bf16 and an int8 piece: `split_8` undone."""
    bits = high.view(torch.int16).to(torch.int32).bitwise_left_shift_(8)
    return bits.add_(low).bitwise_left_shift_(8).view(torch.float32)
