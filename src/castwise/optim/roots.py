"""Square roots that are rounded correctly.

Machine code rounds a square root as IEEE 754 demands. `torch.sqrt` on a CPU asks a
vector library, whose answer is the next number one time in six (torch 2.13, MKL, fp32,
measured). For a twin that is to equal machine code bit by bit the root is taken in
fp64 and rounded: 53 bits are more than twice 24 and two, so rounding twice is harmless
(Figueroa 1995).
"""

from __future__ import annotations

import torch


def square_root(x: torch.Tensor) -> torch.Tensor:
    """Return the square root of an fp32 tensor; compiled or not on a CPU: torch's."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return torch.sqrt(x)
    return x.double().sqrt_().float()
