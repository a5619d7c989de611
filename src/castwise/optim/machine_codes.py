"""Numbers in other formats than fp32, in machine code: fp16, 8-bit codes, pieces.

What a sweep cannot read or write where it lies goes through scratch memory in fp32, one
span at a time. `states.py` describes the 8-bit codes, `pieces.py` the two pieces.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from castwise.optim.addresses import pointer
from castwise.optim.machine_rows import (
    ABSENT,
    BLOCK,
    FP32,
    SIGNED_QUADRATIC,
    SPAN,
)

_TINY = np.float32(np.finfo(np.float32).tiny)  # a block below it is a block of zeros
_COMPILE: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def load_fp16(address: int, n: int, bits: Any) -> None:
    """Write fp16 numbers in fp32 into the view of `bits`."""
    narrow = carray(pointer(address), (n,), np.int16)
    out = bits.view(np.float32)
    # The bits of fp16 under fp32: the exponents are biased by 15 and 127, so the number
    # is 2^112 too small; the product is exact, for subnormals too. An exponent of all
    # ones means infinity or NaN and is filled up to all ones.
    up = np.float32(2.0**112)
    for i in range(n):
        half = np.int32(narrow[i])
        rest = (half & np.int32(0x7FFF)) << np.int32(13)
        special = np.int32(0x70000000) if rest >= np.int32(0x0F800000) else np.int32(0)
        bits[i] = (half & np.int32(-0x80000000)) | (rest + special)
    for i in range(n):
        small = np.abs(out[i]) < np.float32(1)  # NaN is not
        out[i] = out[i] * up if small else out[i]


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _load_signed(address: int, scale: Any, n: int, out: Any) -> None:
    """Write one coded block in fp32 into `out`: sign and square."""
    codes = carray(pointer(address), (n,), np.int8)
    unit = scale * np.float32(1 / 127**2)
    for i in range(n):
        code = np.float32(np.int32(codes[i]))
        out[i] = (code * np.abs(code)) * unit


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _load_quartic(address: int, scale: Any, n: int, out: Any) -> None:
    """Write one coded block in fp32 into `out`: fourth power."""
    codes = carray(pointer(address), (n,), np.uint8)
    for i in range(n):
        root = np.float32(np.int32(codes[i])) * np.float32(1 / 255)
        square = root * root
        out[i] = (square * square) * scale


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _largest(n: int, bits: Any) -> Any:
    """Return the largest magnitude; as integers, because that is vectorised."""
    largest = np.int32(0)
    for i in range(n):
        largest = max(largest, bits[i] & np.int32(0x7FFFFFFF))
    return largest


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _store_signed(address: int, scale: Any, n: int, x: Any) -> None:
    """Code a block by sign and root: 127 * sqrt(|x| / largest)."""
    codes = carray(pointer(address), (n,), np.int8)
    inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
    for i in range(n):
        root = np.sqrt(np.abs(x[i]) * inverse) * np.float32(127) + np.float32(0.5)
        code = np.int32(root)
        codes[i] = np.int8(-code if x[i] < 0 else code)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _store_quartic(address: int, scale: Any, n: int, square_root: Any) -> None:
    """Code a block by the fourth root: 255 * (x / largest)^(1/4)."""
    codes = carray(pointer(address), (n,), np.uint8)
    inverse = np.float32(1) / np.sqrt(scale) if scale > 0 else np.float32(0)
    for i in range(n):
        root = np.sqrt(square_root[i] * inverse) * np.float32(255) + np.float32(0.5)
        codes[i] = np.uint8(np.int32(root))


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def load_state(
    fmt: int, address: int, scales: int, start: int, n: int, out: Any
) -> None:
    """Write the blocks of a coded state from element `start` on in fp32."""
    first = start // BLOCK
    table = carray(pointer(scales + 4 * first), (SPAN // BLOCK,), np.float32)
    for k in range((n + BLOCK - 1) // BLOCK):
        at, size = k * BLOCK, min(BLOCK, n - k * BLOCK)
        if fmt == SIGNED_QUADRATIC:
            _load_signed(address + start + at, table[k], size, out[at : at + size])
        else:
            _load_quartic(address + start + at, table[k], size, out[at : at + size])


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def store_state(
    fmt: int, address: int, scales: int, start: int, n: int, bits: Any, root: Any
) -> None:
    """Code the blocks of a state from element `start` on.

    `bits` are its fp32 bits; `root` is its square root, which only a quartic code reads
    and AdamW has computed already. A state in fp32 stands where it belongs.
    """
    if fmt in (FP32, ABSENT):
        return
    first = start // BLOCK
    table = carray(pointer(scales + 4 * first), (SPAN // BLOCK,), np.float32)
    table_bits = carray(pointer(scales + 4 * first), (SPAN // BLOCK,), np.int32)
    values = bits.view(np.float32)
    for k in range((n + BLOCK - 1) // BLOCK):
        at, size = k * BLOCK, min(BLOCK, n - k * BLOCK)
        table_bits[k] = _largest(size, bits[at : at + size])
        if table[k] < _TINY:
            table[k] = np.float32(0)
        if fmt == SIGNED_QUADRATIC:
            x = values[at : at + size]
            _store_signed(address + start + at, table[k], size, x)
        else:
            x = root[at : at + size]
            _store_quartic(address + start + at, table[k], size, x)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _join(weight: int, remainder: int, n: int, bits: Any) -> None:
    """Write the fp32 weight of both pieces as bits; `pieces` draws them."""
    high = carray(pointer(weight), (n,), np.int16)
    low = carray(pointer(remainder), (n,), np.int16)
    for i in range(n):
        bits[i] = (np.int32(high[i]) << np.int32(16)) + np.int32(low[i])


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _split(weight: int, remainder: int, n: int, bits: Any) -> None:
    """Write both pieces of an fp32 weight."""
    high = carray(pointer(weight), (n,), np.int16)
    low = carray(pointer(remainder), (n,), np.int16)
    for i in range(n):
        upper = (bits[i] + np.int32(0x8000)) >> np.int32(16)
        high[i] = np.int16(upper)
        low[i] = np.int16(bits[i])  # the lower half is the remainder: h << 16 has none


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def join(weight: int, remainder: int, full: int, n: int) -> None:
    """Write the fp32 weights of both pieces at the address `full`."""
    _join(weight, remainder, n, carray(pointer(full), (n,), np.int32))


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def split(weight: int, remainder: int, full: int, n: int) -> None:
    """Write both pieces of the fp32 weights at the address `full`."""
    _split(weight, remainder, n, carray(pointer(full), (n,), np.int32))
