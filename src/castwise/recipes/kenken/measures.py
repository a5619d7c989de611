"""How good a solver is, on what, with how many samples and how sure.

Every measure looks at grids of tokens or at logits, whoever made them: a model, a rule,
an oracle. A grid counts only if it keeps every hint: one that changes a hint has no
cell right, is not valid and solves nothing. So an oracle scores 1 everywhere, and who
answers with padding, with another alphabet or with one digit for all cells scores 0.

    hidden-cell accuracy   hidden cells that show the answer after one forward, beside
                           the Bayes ceiling where it is known
    cross-entropy          nats per hidden cell; excess over the exact floor
    valid rate             all rows and columns hold the alphabet, hints kept, cages
                           satisfied; with no hint at all it is valid-from-empty
    solved rate            the same, on puzzles with a unique solution
    distinct share         different valid grids among all grids: variety, not only
                           validity, of what is generated from nothing

Rates come with Wilson's score interval. `evaluation.py` measures whole sets of puzzles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from castwise.errors import SettingsError
from castwise.recipes.kenken.alphabets import Mode, digits
from castwise.recipes.kenken.clues import (
    OP_ADD,
    OP_DIV,
    OP_GIVEN,
    OP_MUL,
    OP_NONE,
    OP_SUB,
)
from castwise.recipes.kenken.relations import MODES

if TYPE_CHECKING:
    from torch import Tensor

    from castwise.recipes.kenken.batches import PuzzleBatch
    from castwise.recipes.kenken.puzzle_set import Kind

_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """A share of successes, with what it rests on."""

    hits: int
    """Successes."""

    num: int
    """Trials."""

    def __post_init__(self) -> None:
        """Refuse counts that are none.

        Raises:
            SettingsError: If hits lies outside 0..num.
        """
        if not 0 <= self.hits <= self.num:
            raise SettingsError(
                f"A rate needs hits in 0..num, got {self.hits} of {self.num}."
            )

    @property
    def value(self) -> float:
        """The share; NaN of no trials."""
        return self.hits / self.num if self.num else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % score interval; (0, 1) of no trials."""
        if not self.num:
            return 0.0, 1.0
        z2, share = _NORMAL_95**2, self.value
        centre = (share + z2 / (2 * self.num)) / (1 + z2 / self.num)
        spread = share * (1 - share) / self.num + z2 / (4 * self.num**2)
        half = _NORMAL_95 * math.sqrt(spread) / (1 + z2 / self.num)
        low = 0.0 if self.hits == 0 else centre - half
        high = 1.0 if self.hits == self.num else centre + half
        return low, high

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}] of {self.num}"


# --- what a grid must be; all bool [B]


def keeps_hints(tokens: Tensor, batch: PuzzleBatch) -> Tensor:
    """Say which grids (int64 [B, L]) show every hint of their puzzle."""
    return ((tokens == batch.tokens) | batch.hidden).all(dim=1)


def is_latin(tokens: Tensor, batch: PuzzleBatch) -> Tensor:
    """Say which grids hold each token of their alphabet once per row and column."""
    size = batch.size
    shown = tokens[:, :, None] == batch.alphabet[:, None, :]
    grid = shown.view(-1, size, size, size)
    once = (grid.sum(dim=2) == 1) & (grid.sum(dim=1) == 1)
    return once.flatten(1).all(dim=1)


def satisfies_cages(tokens: Tensor, batch: PuzzleBatch) -> Tensor:
    """Say which grids satisfy every clue; a Latin square has none to break."""
    values = _values(tokens, batch)
    count, room = batch.cage_ops.shape
    member = (
        batch.cage_ids[:, None, :]
        == torch.arange(room, device=tokens.device)[None, :, None]
    )
    cell = values[:, None, :]
    total = (cell * member).sum(dim=2)
    product = torch.where(member, cell, torch.ones_like(cell)).prod(dim=2)
    far = torch.iinfo(torch.int64).max
    low = torch.where(member, cell, far).amin(dim=2)
    high = torch.where(member, cell, -far).amax(dim=2)
    target = batch.cage_targets
    quotient = ((low != 0) & (high == low * target)) | (
        (high != 0) & (low == high * target)
    )
    holds = torch.ones(count, room, dtype=torch.bool, device=tokens.device)
    outcomes = {
        OP_GIVEN: total == target,
        OP_ADD: total == target,
        OP_SUB: high - low == target,
        OP_MUL: product == target,
        OP_DIV: quotient,
    }
    for operation, outcome in outcomes.items():
        holds = torch.where(batch.cage_ops == operation, outcome, holds)
    readable = (tokens[:, :, None] == batch.alphabet[:, None, :]).any(dim=2).all(dim=1)
    caged = (batch.cage_ops != OP_NONE).any(dim=1)
    return torch.where(caged, holds.all(dim=1) & readable, True)


def _values(tokens: Tensor, batch: PuzzleBatch) -> Tensor:
    """Read the digits of a grid, int64 [B, L]; 0 for what is no digit of the mode."""
    by_mode = np.stack([digits(batch.size, mode) for mode in MODES])
    by_rank = torch.from_numpy(by_mode).to(tokens.device)[batch.modes]
    shown = tokens[:, :, None] == batch.alphabet[:, None, :]
    return (shown * by_rank[:, None, :]).sum(dim=2)


def is_valid(tokens: Tensor, batch: PuzzleBatch) -> Tensor:
    """Say which grids are completions: hints, rows, columns and cages all hold."""
    latin = keeps_hints(tokens, batch) & is_latin(tokens, batch)
    return latin & satisfies_cages(tokens, batch)


def hidden_accuracy(tokens: Tensor, batch: PuzzleBatch) -> Rate:
    """Count hidden cells that show the answer, in grids that keep their hints."""
    right = (tokens == batch.answer_tokens) & batch.hidden
    right &= keeps_hints(tokens, batch)[:, None]
    return Rate(hits=int(right.sum()), num=int(batch.hidden.sum()))


def valid_rate(tokens: Tensor, batch: PuzzleBatch) -> Rate:
    """Count the grids that are completions."""
    return Rate(hits=int(is_valid(tokens, batch).sum()), num=len(batch))


def num_distinct(tokens: Tensor, batch: PuzzleBatch) -> int:
    """Count the different grids among those that are completions."""
    return len(torch.unique(tokens[is_valid(tokens, batch)], dim=0))


# --- a record


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """One bin of one size and mode: a row of the report's table."""

    size: int
    """Rows of the puzzles."""

    mode: Mode
    """Alphabet."""

    kind: Kind
    """With cages (unique solution) or without."""

    fill: tuple[float, float]
    """Range of the chance that a cell is revealed."""

    num_puzzles: int
    """Puzzles that the row rests on."""

    cell_accuracy: Rate
    """Hidden cells right after one forward."""

    ceiling: float | None
    """Bayes accuracy of the same puzzles; None where it is not known."""

    cross_entropy: float | None
    """Nats per hidden cell: to the exact posterior where it is known, else to the
    answer; None for a predictor that gives grids alone."""

    floor: float | None
    """The least cross-entropy that is possible; None where it is not known."""

    valid: Rate
    """Decoded grids that are completions. For kind KENKEN this is the solved rate, as
    the solution is unique; for an empty Latin square it is valid-from-empty."""

    distinct: int
    """Different grids among the valid ones."""

    forwards: float
    """Forwards per puzzle."""

    @property
    def excess(self) -> float | None:
        """Cross-entropy above the floor, in nats per hidden cell."""
        if self.cross_entropy is None or self.floor is None:
            return None
        return self.cross_entropy - self.floor

    @property
    def distinct_share(self) -> float:
        """Different valid grids among all grids."""
        return self.distinct / self.num_puzzles
