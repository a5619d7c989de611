"""What each number of fp16 is in fp32: a table for machine code, which has no fp16."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray


@functools.cache
def halves() -> NDArray[np.int32]:
    """Return the bits in fp32 of each number of fp16, by its own; int32 [65536]."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    wide = bits.view(torch.float16).float()
    found: NDArray[np.int32] = wide.view(torch.int32).numpy()
    return found
