"""Optimizer states in 8 bits: a code for each number, a scale for each 256 of them.

The largest magnitude of a block is its scale; a number is coded by its ratio to that.
What matters is how the codes are spread over the ratios:

    signed quadratic    x = scale * c |c| / 127^2     c = -127 .. 127   first moments
    quartic             x = scale * (c / 255)^4       c = 0 .. 255      second moments

A second moment divides. Where one number of a block is large, small ones round to code
0, and a first moment that is not 0 is then divided by eps: the weight is thrown away.
So the second moment must vanish later than the first. Beside a largest gradient of 1,
the first moment of a gradient g vanishes below (0.5 / 127)^2 = 1.6e-5, the second below
(0.5 / 255)^4 = 1.5e-11 = (3.8e-6)^2: when g is 4 times smaller still. With evenly
spaced codes, c / 255, it vanishes below 0.5 / 255 = (4.4e-2)^2, long before, and
training diverges; a test keeps that as its negative control.

Block-wise codes are those of Dettmers et al. 2022 (arXiv 2110.02861); the spread here
is a power instead of a table, so that coding is arithmetic, which processors vectorise.
A state takes 1 + 4 / 256 bytes per parameter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, final

import torch

from castwise.optim.roots import square_root

BLOCK = 256
_TINY = torch.finfo(torch.float32).tiny  # a block below it is a block of zeros


class StateCode(ABC):
    """A way to code blocks of numbers in 8 bits each."""

    name: ClassVar[str]
    dtype: ClassVar[torch.dtype]

    @abstractmethod
    def encode_ratio(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return the codes of fp32 [blocks, BLOCK]; a scale of 0 means all are 0."""

    @abstractmethod
    def decode_ratio(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return the fp32 values of codes [blocks, BLOCK]."""

    def encode(
        self, values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor
    ) -> None:
        """Write the codes and scales of a state.

        Args:
            values: fp32 [N].
            codes: [N] of the code's dtype, written.
            scales: fp32 [ceil(N / BLOCK)], written.
        """
        blocks = _in_blocks(values)
        largest = blocks.abs().amax(dim=1)
        scales.copy_(torch.where(largest < _TINY, 0.0, largest))
        codes.copy_(self.encode_ratio(blocks, scales[:, None]).flatten()[: len(codes)])

    def decode(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return a state in fp32, [N]."""
        blocks = _in_blocks(codes)
        return self.decode_ratio(blocks, scales[:, None]).flatten()[: len(codes)]


@final
class SignedQuadratic(StateCode):
    """Sign and root, for moments that add."""

    name = "signed_quadratic"
    dtype = torch.int8

    def encode_ratio(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return sign(x) * round(127 * sqrt(|x| / scale))."""
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        root = square_root(values.abs() * inverse) * 127 + 0.5
        return torch.where(values < 0, -root.floor(), root.floor()).to(torch.int8)

    def decode_ratio(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return scale * c |c| / 127^2."""
        code = codes.float()
        return (code * code.abs()) * (scale * (1 / 127**2))


@final
class Quartic(StateCode):
    """The fourth root, for moments that divide; takes no negative numbers."""

    name = "quartic"
    dtype = torch.uint8

    def encode_ratio(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return round(255 * (x / scale)^(1/4))."""
        inverse = torch.where(scale > 0, 1 / square_root(scale), 0.0)
        root = square_root(square_root(values) * inverse) * 255 + 0.5
        return root.to(torch.uint8)

    def decode_ratio(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return scale * (c / 255)^4."""
        root = codes.float() * (1 / 255)
        square = root * root
        return (square * square) * scale


CODES: Mapping[str, StateCode] = MappingProxyType(
    {code.name: code for code in (SignedQuadratic(), Quartic())}
)
"""Every code by its name."""


def num_blocks(numel: int) -> int:
    """Return how many scales the state of a parameter has."""
    return -(-numel // BLOCK)


def _in_blocks(values: torch.Tensor) -> torch.Tensor:
    """Return [N] as [blocks, BLOCK], filled up with zeros."""
    missing = num_blocks(len(values)) * BLOCK - len(values)
    return torch.nn.functional.pad(values, (0, missing)).view(-1, BLOCK)
