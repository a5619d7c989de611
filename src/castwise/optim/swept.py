"""What a sweep runs over, and the sweep by operators of torch: the readable twin."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from castwise.optim.pieces import join_16, split_16
from castwise.optim.states import BLOCK, CODES

_PIECE = 1024 * BLOCK  # elements: the twin's copies stay in the cache


@dataclass(slots=True)
class Swept:
    """One parameter and everything that its update reads and writes."""

    name: str
    """The name it was given, or its place."""

    parameter: torch.Tensor
    """The parameter itself, of which the rest may be this process's part."""

    weight: torch.Tensor
    """The weight, fp32, or bf16 with a remainder; written."""

    remainder: torch.Tensor | None
    """The lower 16 bits of a split weight; written."""

    gradient: torch.Tensor
    """The gradient in fp32, bf16 or fp16, laid out as the weight."""

    states: list[torch.Tensor]
    """States in fp32 or 8-bit codes; written."""

    scales: list[torch.Tensor | None]
    """Scales of the coded states; written."""

    codes: list[str]
    """Codes of the states, should they be coded."""

    group: dict[str, Any]
    """The group of the parameter."""

    state: dict[str, Any]
    """The optimizer's state of the parameter, for its step count."""

    numbers: tuple[float, ...] = field(default=())
    """The factor of the gradient, and the numbers of the update."""


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of a dense tensor in the order of memory."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    return tensor.as_strided((tensor.numel(),), (1,))


def sweep_piece(
    update: Callable[..., None],
    weight: torch.Tensor,
    remainder: torch.Tensor | None,
    gradient: torch.Tensor,
    states: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor | None],
    codes: Sequence[str],
    numbers: torch.Tensor,
) -> None:
    """Take one flat piece of a parameter through all stages.

    Args:
        update: The update in fp32, such as `adamw.adamw_`.
        weight: fp32 or bf16 [N], written.
        remainder: int16 [N] beside bf16, written.
        gradient: [N], fp32, bf16 or fp16.
        states: fp32 or coded [N] each, written.
        scales: fp32 [ceil(N / 256)] beside a coded state, written.
        codes: Names in `CODES`.
        numbers: fp32 [8]; the first is the factor of the gradient.
    """
    full = weight if remainder is None else join_16(weight, remainder)
    coded = list(zip(states, scales, codes, strict=True))
    wide = [
        state if scale is None else CODES[code].decode(state, scale)
        for state, scale, code in coded
    ]
    update(full, gradient.float() * numbers[0], wide, numbers)
    for values, (state, scale, code) in zip(wide, coded, strict=True):
        if scale is not None:
            CODES[code].encode(values, state, scale)
    if remainder is not None:
        split_16(full, weight, remainder)


class Sweeper(ABC):
    """Looks at the gradients of some parameters, and sweeps over them."""

    def __init__(self, swept: list[Swept]) -> None:
        self.swept = swept

    @abstractmethod
    def nonfinite(self) -> list[bool]:
        """Return of each gradient whether it holds an infinity or NaN."""

    @abstractmethod
    def square_sums(self, factor: float) -> list[float]:
        """Return the sum of the squares of each gradient times a factor."""

    @abstractmethod
    def run(self, update: Callable[..., None]) -> None:
        """Sweep: `update` is that of the optimizer, such as `adamw.adamw_`."""


class TorchSweeper(Sweeper):
    """Sweeps with operators of torch, piece by piece."""

    def nonfinite(self) -> list[bool]:
        """Return of each gradient whether it holds an infinity or NaN."""
        finite = torch.stack([each.gradient.isfinite().all() for each in self.swept])
        return [bool(bad) for bad in finite.logical_not().tolist()]

    def square_sums(self, factor: float) -> list[float]:
        """Return the sum of the squares of each gradient times a factor."""
        norms = [
            torch.linalg.vector_norm(each.gradient, dtype=torch.float64)
            for each in self.swept
        ]
        return [(float(norm) * factor) ** 2 for norm in torch.stack(norms).tolist()]

    def run(self, update: Callable[..., None]) -> None:
        """Sweep with the readable update."""
        for each in self.swept:
            numbers = torch.tensor(each.numbers, device=each.weight.device)
            size = each.weight.numel()
            for start in range(0, size, _PIECE):
                piece = slice(start, min(start + _PIECE, size))
                blocks = slice(start // BLOCK, -(-piece.stop // BLOCK))
                sweep_piece(
                    update,
                    flat(each.weight)[piece],
                    None if each.remainder is None else flat(each.remainder)[piece],
                    flat(each.gradient)[piece],
                    [flat(state)[piece] for state in each.states],
                    [None if scale is None else scale[blocks] for scale in each.scales],
                    each.codes,
                    numbers,
                )


class CompiledSweeper(TorchSweeper):
    """Sweeps with the twin compiled into kernels, one call for each parameter."""

    def run(self, update: Callable[..., None]) -> None:
        """Sweep with the compiled update."""
        sweep = _compiled(update)
        for each in self.swept:
            if each.weight.numel():
                sweep(
                    flat(each.weight),
                    None if each.remainder is None else flat(each.remainder),
                    flat(each.gradient),
                    [flat(state) for state in each.states],
                    each.scales,
                    each.codes,
                    torch.tensor(each.numbers, device=each.weight.device),
                )


@functools.cache
def _compiled(update: Callable[..., None]) -> Callable[..., None]:
    """Return the compiled sweep of an update; sizes stay symbolic."""
    compiled: Callable[..., None] = torch.compile(
        functools.partial(sweep_piece, update), dynamic=True, fullgraph=True
    )
    return compiled
