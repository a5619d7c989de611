"""A batch of puzzles shared by several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from castwise.distributed.ranks import Ranks
from castwise.errors import SettingsError
from castwise.recipes.kenken.batches import PuzzleBatch, draw_batch
from castwise.recipes.kenken.model import completion_loss
from castwise.recipes.kenken.settings import settings_of
from castwise.recipes.kenken.supply import open_supply
from castwise.recipes.kenken.task import mixture_of


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> list[PuzzleBatch]:
    """A few batches of a tiny run, of both sizes."""
    settings = settings_of("tiny", {})
    folder: Path = tmp_path_factory.mktemp("puzzles")
    supply = open_supply(settings, folder, progress=lambda *_: None)
    mixture = mixture_of(settings)
    return [draw_batch(supply.train, mixture, seed=0, step=step) for step in range(8)]


def parts_of(batch: PuzzleBatch, num_ranks: int) -> list[PuzzleBatch]:
    """What each process sees."""
    return [
        batch.part(Ranks(rank=rank, num_ranks=num_ranks)) for rank in range(num_ranks)
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_puzzle_is_seen_once(batches: list[PuzzleBatch], num_ranks: int) -> None:
    """In the order of the whole batch, also where the ranks do not divide it."""
    assert any(len(batch) % 3 for batch in batches)
    for batch in batches:
        parts = parts_of(batch, num_ranks)
        for name in ("tokens", "answers", "cage_ids", "cage_targets"):
            together = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(together, getattr(batch, name))


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_the_mean_over_ranks_is_the_mean_over_the_batch(
    batches: list[PuzzleBatch], num_ranks: int
) -> None:
    """Though ranks hide different numbers of cells."""
    lot = torch.Generator().manual_seed(5)
    for batch in batches:
        shape = (3, *batch.tokens.shape, batch.size)
        logits = torch.randn(shape, generator=lot, dtype=torch.float64)
        losses, plain, begin = [], [], 0
        for part in parts_of(batch, num_ranks):
            own = logits[:, begin : begin + len(part)]
            loss = completion_loss(own, part)
            losses.append(loss * part.share)
            plain.append(loss)
            begin += len(part)
        expected = completion_loss(logits, batch)
        torch.testing.assert_close(
            torch.stack(losses).mean(), expected, rtol=1e-14, atol=0
        )
        # without shares it would be another number
        assert abs(torch.stack(plain).mean() - expected) > 1e-6


def test_more_ranks_than_puzzles_are_refused(batches: list[PuzzleBatch]) -> None:
    """With the remedy."""
    with pytest.raises(SettingsError, match="start fewer, or raise cells_per_step"):
        batches[0].part(Ranks(rank=0, num_ranks=len(batches[0]) + 1))
