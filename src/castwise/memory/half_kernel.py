"""fp32 rounded to fp16, and how large it was, in one pass of machine code (numba).

Operators of torch need three passes for the same: the largest number, the smallest, and
the cast. Here the magnitudes are those of fp16 and stay in a register:

    s eeeee mmmmmmmmmm      as int16 without its sign, a larger number is a larger int,
    0 11111 0000000000      infinity is above all numbers, and NaN above infinity

Processors have had an instruction for eight or sixteen such casts since 2012; without
it, the operators decide. They do too where torch may use several threads, which the
kernel does not.
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import njit, types
from numba.extending import intrinsic
from numba.np.numpy_support import carray

from castwise.optim.addresses import pointer

_GRAIN = 1 << 15  # numbers below which torch itself uses one thread
_COMPILE: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}


def _to_half_bits(typing_context: Any, number: Any) -> Any:
    """Return the bits of a number in fp16, rounded to the nearest even one."""
    del typing_context, number

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        del context, signature
        half = builder.fptrunc(values[0], ir.HalfType())
        return builder.bitcast(half, ir.IntType(16))

    return types.int16(types.float32), generate


_half_bits: Any = intrinsic(_to_half_bits)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _narrow(wide: int, low: int, n: int) -> Any:
    """Round `n` numbers; return the largest magnitude as bits of fp16."""
    x = carray(pointer(wide), (n,), np.float32)
    y = carray(pointer(low), (n,), np.int16)
    largest = np.int16(0)
    for i in range(n):
        bits = _half_bits(x[i])
        y[i] = bits
        size = np.int16(bits & np.int16(0x7FFF))
        # max() would become one of 64 bits, with a quarter of the lanes
        largest = size if size > largest else largest  # noqa: FURB136 -- as above
    return largest


@functools.cache
def _has_instruction() -> bool:
    """Whether this processor rounds to fp16 by itself."""
    if platform.machine().lower() in {"aarch64", "arm64"}:
        return True
    return bool(binding.get_host_cpu_features().get("f16c"))


def runs_here(tensor: torch.Tensor) -> bool:
    """Whether machine code of one thread may read a tensor, and is not outrun."""
    alone = tensor.numel() <= _GRAIN or torch.get_num_threads() == 1
    return type(tensor) is torch.Tensor and tensor.device.type == "cpu" and alone


def narrowed(flat: torch.Tensor) -> tuple[torch.Tensor, int] | None:
    """Return a tensor in fp16 and the bits of its largest magnitude.

    Args:
        flat: fp32 [N], contiguous, on any device.

    Returns:
        None where operators of torch have to do it.
    """
    if not runs_here(flat) or not _has_instruction():
        return None
    n = flat.numel()
    low = torch.empty(n, dtype=torch.float16)
    return low, int(_narrow(flat.data_ptr(), low.data_ptr(), n))
