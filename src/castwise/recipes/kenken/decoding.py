"""From a model that rates ranks to filled grids: orders, legality, thresholds.

A decoder asks the predictor, commits at least one hidden cell of each puzzle, shows the
grid with it, and asks again. The orders:

    random              cells in an order drawn per puzzle
    row_major           cells as one reads
    most_certain_first  the cell whose best rank has the highest probability

*Raw* takes the predictor at its word; *legal* masks ranks that already stand in the row
or column of a cell (where none is left the word stands, and the grid will be wrong).
`threshold` commits with the next cell all others whose best rank is at least as
probable: far fewer forwards, and at .999 no measurable loss. `temperature` 0 takes the
best rank; 1 draws from the probabilities, which is how squares are generated from
nothing.

Hints are clamped. Everything random is a function of the seed and the index of the
puzzle, so a grid does not depend on the batch that its puzzle came in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from castwise.errors import SettingsError
from castwise.recipes.kenken.streams import item_keys, uniforms

if TYPE_CHECKING:
    from torch import Tensor

    from castwise.recipes.kenken.batches import PuzzleBatch
    from castwise.recipes.kenken.model import KenKenModel

    Predictor = Callable[[PuzzleBatch], Tensor]


class Order(StrEnum):
    """In which order cells are committed."""

    RANDOM = "random"
    ROW_MAJOR = "row_major"
    MOST_CERTAIN_FIRST = "most_certain_first"


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodingSettings:
    """How a grid is filled."""

    order: Order = Order.MOST_CERTAIN_FIRST
    """Which cell is next."""

    legal: bool = False
    """Mask ranks that the row or column of a cell already holds."""

    threshold: float | None = None
    """Also commit every cell that is at least this certain; None commits one alone."""

    temperature: float = 0.0
    """0 takes the best rank; above 0 draws from softmax(logits / temperature)."""

    seed: int = 0
    """Seed of the random order and of the draws."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            SettingsError: Naming the setting.
        """
        if self.threshold is not None and not 0.0 < self.threshold <= 1.0:
            raise SettingsError(
                f"A decoding threshold must lie in (0, 1], got {self.threshold}."
            )
        if self.temperature < 0:
            raise SettingsError(
                f"A temperature must not be negative, got {self.temperature}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """Filled grids."""

    tokens: Tensor
    """int64 [B, L]: the grids, hints included."""

    first_tokens: Tensor
    """int64 [B, L]: what one forward alone says about all cells at once."""

    first_logits: Tensor
    """[B, L, n]: what the first forward said; 0 for puzzles without a hidden cell."""

    num_forwards: Tensor
    """int64 [B]: forwards that each puzzle took."""


def predictor_of(model: KenKenModel, num_loops: int | None = None) -> Predictor:
    """Make a predictor of a model: logits of the last loop, fp32 [B, L, n].

    Args:
        model: The model; gradients and precision are the caller's business.
        num_loops: Loops at test time. Default: as in training.

    Returns:
        A callable from batch to logits.
    """

    def predict(batch: PuzzleBatch) -> Tensor:
        logits = model(batch.tokens, batch.alphabet, batch.relations, num_loops)
        last: Tensor = logits[-1].float()
        return last

    return predict


@torch.no_grad()
def decode(
    predict: Predictor,
    batch: PuzzleBatch,
    settings: DecodingSettings,
    *,
    first_index: int = 0,
) -> Decoded:
    """Fill the hidden cells of every puzzle.

    Args:
        predict: From batch to logits [B, L, n].
        batch: The puzzles.
        settings: How.
        first_index: Index of the batch's first puzzle in the whole, for the draws.

    Returns:
        The grids, and what they took.
    """
    tokens, hidden = batch.tokens.clone(), batch.hidden.clone()
    noise, priority = _draws(batch, settings, first_index)
    num_forwards = torch.zeros(len(batch), dtype=torch.int64, device=tokens.device)
    first = tokens.clone()
    first_logits = torch.zeros(*tokens.shape, batch.size, device=tokens.device)
    open_rows = hidden.any(dim=1).nonzero().squeeze(1)
    held: Tensor | None = None
    while num := len(open_rows):
        rows = _padded(open_rows)
        is_first = held is None
        if held is None or not torch.equal(rows, held):
            active, held = batch.select(rows), rows
        asked = active.with_tokens(tokens[rows])
        logits, shown = predict(asked)[:num], asked.select(slice(num))
        best, certainty = _decide(logits, shown, settings, noise[open_rows])
        spoken = shown.alphabet.gather(1, best)
        chosen = _choose_cells(certainty, shown.hidden, settings, priority[open_rows])
        if is_first:
            first[open_rows] = torch.where(shown.hidden, spoken, shown.tokens)
            first_logits = first_logits.to(logits.dtype)
            first_logits[open_rows] = logits
        tokens[open_rows] = torch.where(chosen, spoken, shown.tokens)
        hidden[open_rows] &= ~chosen
        num_forwards[open_rows] += 1
        open_rows = open_rows[hidden[open_rows].any(dim=1)]
    return Decoded(
        tokens=tokens,
        first_tokens=first,
        first_logits=first_logits,
        num_forwards=num_forwards,
    )


def _padded(rows: Tensor) -> Tensor:
    """Repeat the last row until the number is 2^k or 3 * 2^k.

    Kernels are compiled and kept for every shape that comes (oneDNN on the CPU): with
    the bare number of open puzzles a first evaluation of the `small` preset took 34 s
    instead of 4 s, and 680 MiB stayed with the kernels.
    """
    num = len(rows)
    power = 1 << (num - 1).bit_length()
    wanted = 3 * power // 4 if 3 * power // 4 >= num else power
    return torch.cat([rows, rows[-1:].expand(wanted - num)])


def _draws(
    batch: PuzzleBatch, settings: DecodingSettings, first_index: int
) -> tuple[Tensor, Tensor]:
    """Draw Gumbel noise [B, L, n] and the order of the cells [B, L] (low is next)."""
    count, length = batch.tokens.shape
    index = np.arange(first_index, first_index + count)
    device = batch.tokens.device
    noise = torch.zeros(count, length, batch.size)
    if settings.temperature > 0:
        keys = item_keys(settings.seed, "kenken decode", 0, index)
        chance = np.clip(uniforms(keys, length * batch.size), 1e-12, 1 - 1e-12)
        noise = torch.from_numpy(-np.log(-np.log(chance))).view_as(noise).float()
    priority = torch.arange(length).expand(count, length)
    if settings.order is Order.RANDOM:
        keys = item_keys(settings.seed, "kenken order", 0, index)
        priority = torch.from_numpy(uniforms(keys, length).argsort(axis=1).argsort(1))
    return noise.to(device), priority.to(device)


def _decide(
    logits: Tensor, batch: PuzzleBatch, settings: DecodingSettings, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Choose a rank for every cell, int64 [B, L], and say how certain, [B, L]."""
    if settings.legal:
        illegal = _standing(batch)
        illegal &= ~illegal.all(dim=-1, keepdim=True)
        logits = logits.masked_fill(illegal, -torch.inf)
    if settings.temperature > 0:
        chances = (logits / settings.temperature).softmax(dim=-1)
        best = (logits / settings.temperature + noise).argmax(dim=-1)
        return best, chances.amax(dim=-1)
    certainty, best = logits.softmax(dim=-1).max(dim=-1)
    return best, certainty


def _standing(batch: PuzzleBatch) -> Tensor:
    """Say which ranks stand in the row or column of each cell: bool [B, L, n]."""
    size = batch.size
    shown = batch.tokens[:, :, None] == batch.alphabet[:, None, :]
    grid = shown.view(-1, size, size, size)
    standing = grid.any(dim=2, keepdim=True) | grid.any(dim=1, keepdim=True)
    return standing.view(shown.shape)


def _choose_cells(
    certainty: Tensor, hidden: Tensor, settings: DecodingSettings, priority: Tensor
) -> Tensor:
    """Choose the cells to commit now: bool [B, L], at least one per puzzle."""
    if settings.order is Order.MOST_CERTAIN_FIRST:
        following = certainty.masked_fill(~hidden, -1.0).argmax(dim=1)
    else:
        following = priority.masked_fill(~hidden, priority.shape[1]).argmin(dim=1)
    chosen = functional.one_hot(following, hidden.shape[1]).bool()
    if settings.threshold is not None:
        chosen |= certainty >= settings.threshold
    return chosen & hidden
