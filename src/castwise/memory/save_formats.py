"""How a saved activation is stored until its backward: 16 bits, 8 bits, elsewhere.

    store = store_of("fp16")
    kept = store.put(flat)        # none where the tensor does not fit: kept whole
    kept.get()                    # wide again, on the device where it was

fp16 keeps 11 bits of every number. A tensor whose largest number is too large or too
small for it is scaled by a power of two, which costs no bit; only one that holds an
infinity or a NaN does not fit. bf16 keeps 8 bits and fits always.

8 bits are whole numbers from -127 to 127, and a scale for each block of 64:

    scale = max |x| / 127         x ~ scale * round(x / scale)

The largest error of a block is 1/254 of its largest number. Where numbers are normally
distributed that is some 0.5 % of each one's root mean square, four times what bf16
costs, so 8 bits are for whom memory is worth digits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, final

import torch
from torch._subclasses import FakeTensor

from castwise.dtypes import DTYPES
from castwise.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

AS_IS = "as they are"
"""The name of the store that takes nothing."""

BLOCK = 64
"""Numbers that share a scale in 8 bits."""

_CODES = 127
_FP16_MAX = 65504.0
_FP16_SMALL = 2.0**-6  # below it too much of a tensor lies in fp16's subnormals
_FP16_FITS = range(0x2400, 0x7C00)  # bits of fp16 from 2^-6 up to below infinity
_SIXTEEN = ("fp16", "bf16")
_NAMES = (*_SIXTEEN, "int8")


class Kept(ABC):
    """One stored tensor."""

    num_bytes: int
    """What it takes on the device that it came from."""

    @abstractmethod
    def get(self) -> torch.Tensor:
        """Return it as it was: flat, in its own format, on its own device."""


class Store(ABC):
    """A way to store flat floating tensors."""

    takes: frozenset[torch.dtype]
    """The formats of tensors that it takes; others are kept whole."""

    halves: bool = False
    """Whether two tensors take as much as one did, so that a pair may stay as one."""

    exact: bool = False
    """Whether what comes back has the same bits."""

    @abstractmethod
    def put(self, flat: torch.Tensor) -> Kept | None:
        """Store a tensor, or return none if it does not fit."""


@final
class SixteenBits(Store):
    """fp32 in fp16 or bf16.

    Args:
        fmt: fp16 or bf16.
    """

    takes = frozenset({torch.float32})
    halves = True

    def __init__(self, fmt: str) -> None:
        self._dtype = DTYPES[fmt]
        self._is_bounded = fmt == "fp16"

    def put(self, flat: torch.Tensor) -> Kept | None:
        """Narrow; scale by a power of two where fp16 would not reach."""
        if not self._is_bounded or isinstance(flat, FakeTensor):
            return _Narrow(flat.to(self._dtype), flat.dtype, 1.0)
        done = _one_pass(flat)
        if done is not None:
            return _Narrow(done, flat.dtype, 1.0)
        # amax and amin: vector_norm(inf) is 30 times slower on a CPU; a NaN passes both
        largest = max(float(flat.amax()), -float(flat.amin()))
        if not math.isfinite(largest):
            return None
        if _FP16_SMALL <= largest <= _FP16_MAX or largest == 0.0:
            return _Narrow(flat.to(self._dtype), flat.dtype, 1.0)
        scale = 2.0 ** (15 - math.frexp(largest)[1])  # the largest gets below 2^15
        if not math.isfinite(1 / scale):
            return None
        return _Narrow(flat.mul(scale).to(self._dtype), flat.dtype, scale)


def _one_pass(flat: torch.Tensor) -> torch.Tensor | None:
    """Return a tensor in fp16, if machine code does it and it needs no scale."""
    if flat.device.type != "cpu":
        return None
    from castwise.memory.half_kernel import narrowed  # noqa: PLC0415 -- numba is imported by those who need it

    done = narrowed(flat)
    return None if done is None or done[1] not in _FP16_FITS else done[0]


@final
class _Narrow(Kept):
    def __init__(self, low: torch.Tensor, dtype: torch.dtype, scale: float) -> None:
        self._low, self._dtype, self._scale = low, dtype, scale
        self.num_bytes = low.nbytes

    def get(self) -> torch.Tensor:
        wide = self._low.to(self._dtype)
        return wide if self._scale == 1.0 else wide.div_(self._scale)


@final
class EightBits(Store):
    """fp32, bf16 or fp16 in whole numbers of 8 bits with a scale for each block."""

    takes = frozenset({torch.float32, torch.bfloat16, torch.float16})

    def put(self, flat: torch.Tensor) -> Kept | None:
        """Scale each block so that its largest number becomes 127, and round."""
        num_numbers = flat.numel()
        padded = torch.nn.functional.pad(flat.float(), (0, -num_numbers % BLOCK))
        blocks = padded.view(-1, BLOCK)
        largest = torch.maximum(
            blocks.amax(dim=1, keepdim=True), -blocks.amin(dim=1, keepdim=True)
        )
        if not isinstance(flat, FakeTensor) and not bool(largest.isfinite().all()):
            return None
        scales = largest / _CODES
        inverse = torch.where(largest > 0, _CODES / largest, 0.0)
        codes = torch.mul(blocks, inverse).round_().to(torch.int8)
        return _Codes(codes, scales, flat.dtype, num_numbers)


@final
class _Codes(Kept):
    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        dtype: torch.dtype,
        num_numbers: int,
    ) -> None:
        self._codes, self._scales = codes, scales
        self._dtype, self._num_numbers = dtype, num_numbers
        self.num_bytes = codes.nbytes + scales.nbytes

    def get(self) -> torch.Tensor:
        wide = self._codes.to(torch.float32).mul_(self._scales).to(self._dtype)
        return wide.view(-1)[: self._num_numbers]


@final
class AsTheyAre(Store):
    """Takes nothing: what is saved stays as it is."""

    takes = frozenset[torch.dtype]()
    exact = True

    def put(self, flat: torch.Tensor) -> Kept | None:
        """Store nothing."""
        del flat
        return None


def store_of(fmt: str) -> Store:
    """Return the store of a format.

    Raises:
        SettingsError: There is none of this name.
    """
    if fmt not in STORES:
        raise SettingsError(
            f"saved activations are stored in {', '.join(_NAMES)}, got {fmt!r}"
        )
    return STORES[fmt]


STORES: Mapping[str, Store] = {
    **{fmt: SixteenBits(fmt) for fmt in _SIXTEEN},
    "int8": EightBits(),
    AS_IS: AsTheyAre(),
}
"""Formats of saved activations by name."""
