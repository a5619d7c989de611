"""A transformer that completes Latin squares and solves KenKen puzzles.

A puzzle is a sequence of L = n * n cells. The state of a cell is one vector of c
channels for each of its n ranks, so that what holds for one rank is learned for all:

    state  [B, L, n, c]

A block lets each cell hear four voices, then runs one MLP on every rank of every cell:

    line   attention heads that see the cells of the same row alone, and the same heads
           once more for the column; the MLP is told their sum and their absolute
           difference, which transposing the puzzle does not change
    cage   attention heads that see the other cells of the same cage alone
    clue   attention heads of the cage over the *ways* in which its clue can be
           satisfied (`relations`): the cells of the cage say what they think of each
           rank, every way gets the sum of what they think of its ranks, and the cells
           hear how often each rank occurs in the ways that are left
    cell   the mean over the ranks of the cell itself

One attention weight serves all ranks of a cell: query and key are as long as its whole
state. The blocks are few and run `num_loops` times. Each loop ends in logits, and the
loss looks at the last half of them, so a solver may loop longer than it was trained to.

The model sees relations, never positions: permuting rows or columns or transposing the
puzzle permutes its logits in the same way. Alphabets enter through the tokens (which
rank a hint is) and the clues alone, so Latin squares look the same in every mode. No
cast is written here; the precision policy decides every format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from castwise.errors import SettingsError
from castwise.recipes.kenken.alphabets import EMPTY, MAX_SIZE
from castwise.recipes.kenken.relations import NUM_LEVELS

if TYPE_CHECKING:
    from castwise.recipes.kenken.batches import PuzzleBatch
    from castwise.recipes.kenken.relations import CageWays, Relations

_NUM_FEATURES = 10
_NUM_OPERATIONS = 6
_MOST_MATES = 8
_FORBIDDEN = -1e4  # finite, and within fp16: a row of it alone is uniform, never NaN
_UNSCORED = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """The shape of a model."""

    num_channels: int
    """Channels of each rank of each cell (c)."""

    num_heads: int
    """Heads for lines (rows and columns alike), and as many for cages."""

    num_clue_heads: int
    """Heads that weigh the ways to satisfy a clue."""

    key_channels: int
    """Channels of query and key for each rank and head."""

    value_channels: int
    """Channels of the value for each rank and head."""

    num_blocks: int
    """Blocks with weights of their own."""

    num_loops: int
    """How often the blocks run."""

    mlp_ratio: int = 4
    """Width of the hidden layer in units of num_channels."""

    recompute: bool = False
    """Keep only each block's input for the backward pass and run the block again."""

    def __post_init__(self) -> None:
        """Refuse a shape that is none.

        Raises:
            SettingsError: Naming the setting.
        """
        for name in self.__slots__:
            value = getattr(self, name)
            if not isinstance(value, bool) and value < 1:
                raise SettingsError(
                    f"{name} of a KenKen model must be at least 1; got {value}."
                )


MODELS: Mapping[str, ModelSettings] = {
    "tiny": ModelSettings(
        num_channels=12,
        num_heads=2,
        num_clue_heads=2,
        key_channels=2,
        value_channels=4,
        num_blocks=1,
        num_loops=3,
    ),
    "small": ModelSettings(
        num_channels=32,
        num_heads=1,
        num_clue_heads=4,
        key_channels=4,
        value_channels=16,
        num_blocks=1,
        num_loops=8,
        mlp_ratio=3,
    ),
    "base": ModelSettings(
        num_channels=64,
        num_heads=4,
        num_clue_heads=8,
        key_channels=8,
        value_channels=16,
        num_blocks=2,
        num_loops=8,
        recompute=True,
    ),
}
"""Shapes by name: `tiny` for tests, `small` for two CPU cores, `base` for a GPU."""


def model_settings(name: str) -> ModelSettings:
    """Look a shape up by its name.

    Raises:
        SettingsError: If there is none of this name.
    """
    if name not in MODELS:
        raise SettingsError(
            f"a KenKen model is one of {', '.join(MODELS)}; got {name!r}; use one of "
            "these names."
        )
    return MODELS[name]


class KenKenModel(nn.Module):
    """From what stands in the cells, and what the clues say, to logits of ranks."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        width = settings.num_channels
        self.features = nn.Linear(_NUM_FEATURES, width)
        self.size = nn.Embedding(MAX_SIZE + 1, width)
        self.operation = nn.Embedding(_NUM_OPERATIONS, width)
        self.mates = nn.Embedding(_MOST_MATES + 1, width)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.num_blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        tokens: Tensor,
        alphabet: Tensor,
        relations: Relations,
        num_loops: int | None = None,
    ) -> Tensor:
        """Rate every rank of every cell after each loop.

        Args:
            tokens: int64 [B, L], what stands in the cells; EMPTY where hidden.
            alphabet: int64 [B, n], token of each rank.
            relations: What the clues say.
            num_loops: How often the blocks run. Default: as in training.

        Returns:
            [num_loops, B, L, n] logits; hidden cells are what the loss looks at.
        """
        size = alphabet.shape[1]
        state = self._read(tokens, alphabet, relations)
        barred = _barred(size, relations.mates, relations.support.dtype)
        cages = relations.by_cage()
        logits = []
        for _ in range(num_loops or self.settings.num_loops):
            for block in self.blocks:
                if self.settings.recompute and torch.is_grad_enabled():
                    state = checkpoint(block, state, cages, barred, use_reentrant=False)
                else:
                    state = block(state, cages, barred)
            logits.append(self.head(self.norm(state)).squeeze(-1))
        return torch.stack(logits)

    def _read(self, tokens: Tensor, alphabet: Tensor, relations: Relations) -> Tensor:
        """Turn cells and clues into the first state, [B, L, n, c]."""
        size = alphabet.shape[1]
        cages = self.operation(relations.operations)
        cages = cages + self.mates(relations.num_mates.clamp(max=_MOST_MATES))
        cages = cages[:, :, None] + self.size.weight[size]
        state: Tensor = cages + self.features(_features(tokens, alphabet, relations))
        return state


def _features(tokens: Tensor, alphabet: Tensor, relations: Relations) -> Tensor:
    """List what is known of every rank of every cell, fp32 [B, L, n, 10]."""
    size = alphabet.shape[1]
    support = relations.support
    hidden = (tokens == EMPTY)[:, :, None].expand_as(support)
    shown = tokens[:, :, None] == alphabet[:, None, :]
    cells = (relations.num_mates + 1)[:, :, None]
    rank = torch.arange(size, device=tokens.device)
    return torch.stack(
        [
            hidden.to(support.dtype),
            shown.to(support.dtype),
            (~hidden & ~shown).to(support.dtype),
            support,
            (support > 0).to(support.dtype),
            (support * cells).clamp(max=1.5),
            (support * size).clamp(max=4) / 2,
            (rank / size).to(support.dtype).expand_as(support),
            (rank % 2).to(support.dtype).expand_as(support),
            torch.full_like(support, 1 / size),
        ],
        dim=-1,
    )


def _barred(size: int, mates: Tensor, dtype: torch.dtype) -> Tensor:
    """Bar the sight of other rows, columns and cages: [B, 3, 1, L, L].

    Added to scores: 0 where a cell is seen, else so low that its weight vanishes. A
    cell without mates sees itself.
    """
    cell = torch.arange(size * size, device=mates.device)
    same_row = cell[:, None] // size == cell // size
    same_column = cell[:, None] % size == cell % size
    alone = ~mates.any(dim=-1, keepdim=True) & (cell[:, None] == cell)
    lines = (same_row.expand_as(mates), same_column.expand_as(mates), mates | alone)
    seen = torch.stack(lines, dim=1)[:, :, None]
    return torch.zeros(seen.shape, dtype=dtype, device=mates.device).masked_fill(
        ~seen, _FORBIDDEN
    )


class ClueAttention(nn.Module):
    """Heads of each cage over the ways in which its clue can be satisfied."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.num_heads = settings.num_clue_heads
        pooled = settings.num_heads * settings.value_channels
        self.opinion = nn.Linear(settings.num_channels, pooled)
        self.potential = nn.Linear(pooled, NUM_LEVELS * self.num_heads)

    def forward(self, normed: Tensor, cages: CageWays) -> Tensor:
        """Hear how often each rank occurs in the ways that are left.

        Args:
            normed: [B, L, n, c].
            cages: Their members and the ways of their clues.

        Returns:
            [B, L, n, NUM_LEVELS * H], the shares of the levels; 0 without a clue.
        """
        batch, length, size, _ = normed.shape
        num_cages = cages.members.shape[1]
        opinions = functional.relu(self.opinion(normed)).square()
        pooled = torch.matmul(cages.members, opinions.flatten(2))
        potentials = self.potential(pooled.view(batch, num_cages, size, -1))
        potentials = potentials.view(
            batch, num_cages, size * NUM_LEVELS, self.num_heads
        )
        scores = torch.matmul(cages.ways, potentials)
        scores = scores.masked_fill(~cages.is_way[..., None], _FORBIDDEN)
        shares = torch.matmul(cages.ways.transpose(2, 3), scores.softmax(dim=2))
        heard = torch.matmul(cages.members.transpose(1, 2), shares.flatten(2))
        return heard.view(batch, length, size, NUM_LEVELS * self.num_heads)


class Block(nn.Module):
    """Attention along lines, cages and clues, and an MLP; one residual sum."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        width, heads = settings.num_channels, settings.num_heads
        line = heads * settings.value_channels
        hidden = settings.mlp_ratio * width
        self.norm = nn.LayerNorm(width)
        self.query_key = nn.Linear(width, 2 * 2 * heads * settings.key_channels)
        self.value = nn.Linear(width, 3 * line)  # for lines, cages and the cell itself
        self.clue = ClueAttention(settings)
        self.up = nn.Linear(width, hidden)
        self.up_heard = nn.Linear(3 * line, hidden, bias=False)
        self.up_clue = nn.Linear(
            NUM_LEVELS * settings.num_clue_heads, hidden, bias=False
        )
        self.up_cell = nn.Linear(line, hidden, bias=False)
        self.down = nn.Linear(hidden, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, state: Tensor, cages: CageWays, barred: Tensor) -> Tensor:
        """Run the block.

        Args:
            state: [B, L, n, c].
            cages: What they can be filled with.
            barred: [B, 3, 1, L, L], added to scores: who does not see whom.

        Returns:
            The new state, [B, L, n, c].
        """
        normed = self.norm(state)
        values = functional.relu(self.value(normed)).square()
        line, cage, cell = values.chunk(3, dim=-1)
        row, column, cage = self._attend(normed, line, cage, barred)
        heard = torch.cat([row + column, (row - column).abs(), cage], dim=-1)
        hidden = self.up(normed) + self.up_heard(heard)
        hidden = hidden + self.up_clue(self.clue(normed, cages))
        hidden = hidden + self.up_cell(cell.mean(dim=2, keepdim=True))
        change: Tensor = self.down(functional.relu(hidden).square())
        return state + change

    def _attend(
        self, normed: Tensor, line: Tensor, cage: Tensor, barred: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hear the cells of the row, the column and the cage, [B, L, n, H * v] each."""
        scores = self._scores(normed)
        row, column, mates = (
            (scores[:, kind] + barred[:, which]).softmax(dim=-1)
            for kind, which in ((0, 0), (0, 1), (1, 2))
        )
        lines = torch.matmul(torch.cat([row, column], dim=2), self._by_head(line))
        heard_row, heard_column = lines.chunk(2, dim=2)
        heard_cage = torch.matmul(mates, self._by_head(cage))
        size = normed.shape[2]
        return (
            _by_cell(heard_row, size),
            _by_cell(heard_column, size),
            _by_cell(heard_cage, size),
        )

    def _scores(self, normed: Tensor) -> Tensor:
        """Compare cells, for line heads and for cage heads: [B, 2, H, L, L]."""
        batch, length, size, _ = normed.shape
        heads, channels = self.settings.num_heads, self.settings.key_channels
        width = size * channels
        both = self.query_key(normed).view(batch, length, size, 2, 2 * heads, channels)
        query, key = both.permute(3, 0, 4, 1, 2, 5).reshape(
            2, batch, 2 * heads, length, width
        )
        scores: Tensor = torch.matmul(query, key.transpose(-1, -2)) * width**-0.5
        return scores.view(batch, 2, heads, length, length)

    def _by_head(self, values: Tensor) -> Tensor:
        """Turn [B, L, n, H * v] into [B, H, L, n * v]."""
        batch, length, size, _ = values.shape
        heads = self.settings.num_heads
        split = values.view(batch, length, size, heads, -1).permute(0, 3, 1, 2, 4)
        return split.reshape(batch, heads, length, -1)


def _by_cell(heard: Tensor, size: int) -> Tensor:
    """Turn [B, H, L, n * v] into [B, L, n, H * v]."""
    batch, heads, length, _ = heard.shape
    split = heard.view(batch, heads, length, size, -1).permute(0, 2, 3, 1, 4)
    cells: Tensor = split.reshape(batch, length, size, -1)
    return cells


def completion_loss(
    logits: Tensor, batch: PuzzleBatch, num_scored: int | None = None
) -> Tensor:
    """Average the cross-entropy over hidden cells and the last loops.

    The first loops are left free to prepare: no model can answer after one of them.

    Args:
        logits: [R, B, L, n] of every loop.
        batch: The puzzles, with their answers.
        num_scored: How many of the last loops count. Default: half of them, rounded up.

    Returns:
        A scalar, in nats per hidden cell.
    """
    logits = logits[-(num_scored or (len(logits) + 1) // 2) :]
    wanted = batch.answers.masked_fill(~batch.hidden, _UNSCORED)
    wanted = wanted.expand(logits.shape[:-1]).reshape(-1)
    total = functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        wanted,
        ignore_index=_UNSCORED,
        reduction="sum",
    )
    mean: Tensor = total / (wanted != _UNSCORED).sum().clamp(min=1)
    return mean


def puzzle_losses(logits: Tensor, batch: PuzzleBatch) -> Tensor:
    """Average the cross-entropy over hidden cells and the last loops, by puzzle.

    Args:
        logits: [R, B, L, n] of every loop.
        batch: The puzzles, with their answers.

    Returns:
        [B], in nats per hidden cell; 0 for a puzzle that hides nothing.
    """
    logits = logits[-((len(logits) + 1) // 2) :]
    wanted = batch.answers.masked_fill(~batch.hidden, _UNSCORED)
    losses = functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        wanted.expand(logits.shape[:-1]).reshape(-1),
        ignore_index=_UNSCORED,
        reduction="none",
    ).reshape(logits.shape[:-1])
    num = len(logits) * batch.hidden.sum(-1).clamp(min=1)
    by_puzzle: Tensor = losses.sum((0, 2)) / num
    return by_puzzle
