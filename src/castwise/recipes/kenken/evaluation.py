"""Measure a predictor on sets of puzzles: one record for each set and bin of fills.

Puzzles are binned by the chance with which their cells are revealed. KenKen puzzles
have a unique solution, so what is possible is known (floor 0, ceiling 1); so it is for
Latin squares up to size 5, by `posterior.py`.

An empty Latin square has nothing that could be more certain than the rest, and the best
rank of every cell is the same. It is filled by drawing at temperature 1, and the share
of *different* valid grids is reported beside the valid ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from castwise.errors import DataError, SettingsError
from castwise.recipes.kenken import posterior
from castwise.recipes.kenken.batches import PuzzleBatch, batch_of
from castwise.recipes.kenken.dataset import reveal_mask
from castwise.recipes.kenken.decoding import DecodingSettings, decode
from castwise.recipes.kenken.measures import (
    Measures,
    Rate,
    hidden_accuracy,
    is_valid,
)
from castwise.recipes.kenken.puzzle_set import Kind
from castwise.recipes.kenken.streams import item_keys, uniforms

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from castwise.recipes.kenken.decoding import Predictor
    from castwise.recipes.kenken.puzzle_set import PuzzleSet

_STREAM = "kenken evaluation"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    """What is measured, and on how much."""

    num_puzzles: int = 500
    """Puzzles of each size, mode, kind and bin."""

    fills: tuple[tuple[float, float], ...] = ((0.0, 0.0), (0.1, 0.4), (0.4, 0.7))
    """Bins: ranges of the chance that a cell is revealed; (0, 0) is the empty grid."""

    decoding: DecodingSettings = field(
        default_factory=lambda: DecodingSettings(threshold=0.999)
    )
    """How grids are filled. An empty Latin square is drawn at temperature 1."""

    batch_size: int = 512
    """Puzzles per forward."""

    seed: int = 0
    """Seed of the reveal masks."""

    def __post_init__(self) -> None:
        """Refuse what measures nothing.

        Raises:
            SettingsError: Naming the setting.
        """
        if self.num_puzzles < 1 or self.batch_size < 1:
            raise SettingsError(
                "num_puzzles and batch_size of an evaluation must be at least 1; got "
                f"{self.num_puzzles} and {self.batch_size}."
            )
        for low, high in self.fills:
            if not 0.0 <= low <= high < 1.0:
                raise SettingsError(
                    f"A bin of fills must rise within [0, 1), got ({low}, {high})."
                )


def evaluate(
    predict: Predictor,
    sets: Iterable[PuzzleSet],
    settings: EvaluationSettings,
    *,
    device: torch.device | str = "cpu",
) -> tuple[Measures, ...]:
    """Measure a predictor on the first puzzles of each set, for every bin of fills.

    Args:
        predict: From batch to logits of ranks [B, L, n]; -inf is allowed. Gradients
            and precision are the caller's business.
        sets: Puzzles, one set for each size, mode and kind.
        settings: How much and how.
        device: Where the predictor wants its batches.

    Returns:
        One record per set and bin.

    Raises:
        DataError: If a set holds fewer puzzles than are to be measured.
    """
    return tuple(
        _measure(predict, puzzles, fill, settings, device)
        for puzzles in sets
        for fill in settings.fills
    )


def evaluation_batch(
    puzzles: PuzzleSet, fill: tuple[float, float], rows: np.ndarray, seed: int
) -> PuzzleBatch:
    """Show some puzzles of a set with fills of a bin: the same ones for the same seed.

    Args:
        puzzles: The set.
        fill: Range of the chance that a cell is revealed.
        rows: int64 [B], which puzzles.
        seed: Seed of the masks.

    Returns:
        The batch, on the CPU.
    """
    bin_of = f"{_STREAM} {fill[0]:g} {fill[1]:g}"
    share = uniforms(item_keys(seed, bin_of, 0, rows), 1)[:, 0]
    chance = fill[0] + (fill[1] - fill[0]) * share
    revealed = reveal_mask(seed, 0, rows, puzzles.size, chance)
    return batch_of([(puzzles, rows)], revealed.reshape(len(rows), -1))


@dataclass(kw_only=True, slots=True)
class _Sums:
    """What the batches of one bin add up to."""

    cells_right: int = 0
    cells: int = 0
    valid: int = 0
    forwards: int = 0
    ceiling: float = 0.0
    cross: float = 0.0
    floor: float = 0.0


def _measure(
    predict: Predictor,
    puzzles: PuzzleSet,
    fill: tuple[float, float],
    settings: EvaluationSettings,
    device: torch.device | str,
) -> Measures:
    num = settings.num_puzzles
    if len(puzzles) < num:
        raise DataError(
            f"an evaluation needs {num} puzzles of size {puzzles.size}, mode "
            f"{puzzles.mode}; got {len(puzzles)}; make more or measure fewer."
        )
    decoding = settings.decoding
    if puzzles.kind is Kind.LATIN and fill[1] == 0.0:
        decoding = replace(decoding, temperature=1.0)
    known = puzzles.kind is Kind.KENKEN or puzzles.size <= posterior.LARGEST_SIZE
    sums, valid_grids = _Sums(), []
    for start in range(0, num, settings.batch_size):
        rows = np.arange(start, min(start + settings.batch_size, num))
        batch = evaluation_batch(puzzles, fill, rows, settings.seed).to(device)
        decoded = decode(predict, batch, decoding, first_index=start)
        _add_cells(decoded.first_logits, batch, puzzles.kind, sums)
        valid = is_valid(decoded.tokens, batch)
        sums.valid += int(valid.sum())
        sums.forwards += int(decoded.num_forwards.sum())
        valid_grids.append(decoded.tokens[valid].cpu())
    cells = max(sums.cells, 1)
    return Measures(
        size=puzzles.size,
        mode=puzzles.mode,
        kind=puzzles.kind,
        fill=fill,
        num_puzzles=num,
        cell_accuracy=Rate(hits=sums.cells_right, num=sums.cells),
        ceiling=sums.ceiling / cells if known else None,
        cross_entropy=sums.cross / cells,
        floor=sums.floor / cells if known else None,
        valid=Rate(hits=sums.valid, num=num),
        distinct=len(torch.unique(torch.cat(valid_grids), dim=0)),
        forwards=sums.forwards / num,
    )


@torch.no_grad()
def _add_cells(logits: Tensor, batch: PuzzleBatch, kind: Kind, sums: _Sums) -> None:
    """Add what the first forward says about the hidden cells of a batch."""
    best = batch.alphabet.gather(1, logits.argmax(dim=-1))
    accuracy = hidden_accuracy(torch.where(batch.hidden, best, batch.tokens), batch)
    sums.cells_right += accuracy.hits
    sums.cells += accuracy.num
    hidden = batch.hidden.cpu()
    chances = _possible(batch, kind)[hidden]
    sums.cross += float(posterior.cross_entropy(chances, logits.cpu()[hidden]).sum())
    sums.floor += float(posterior.entropy(chances).sum())
    sums.ceiling += float(chances.amax(dim=-1).sum())


def _possible(batch: PuzzleBatch, kind: Kind) -> Tensor:
    """Return the exact chances where they are known, else certainty of the answer."""
    if kind is Kind.LATIN and batch.size <= posterior.LARGEST_SIZE:
        return posterior.posterior(batch)
    answers = batch.answers.cpu()
    return torch.nn.functional.one_hot(answers, batch.size).double()
