"""Exact posteriors: all squares, all counts, the floors known from enumeration."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch

from castwise.errors import SettingsError
from castwise.recipes.kenken.alphabets import Mode
from castwise.recipes.kenken.batches import UNKNOWN, PuzzleBatch, assemble, batch_of
from castwise.recipes.kenken.dataset import generate_puzzle_set, reveal_mask
from castwise.recipes.kenken.posterior import (
    all_squares,
    cross_entropy,
    entropy,
    posterior,
)
from castwise.recipes.kenken.puzzle_set import Kind


def latin_batch(size: int, fill: float, count: int) -> PuzzleBatch:
    """Show uniform squares with a share of their cells."""
    puzzles = generate_puzzle_set(
        size, Mode.NEGATIVE, count, 11, "train", kind=Kind.LATIN, workers=1
    )
    rows = np.arange(count)
    revealed = reveal_mask(5, 0, rows, size, fill).reshape(count, -1)
    return batch_of([(puzzles, rows)], revealed)


def hints_batch(hints: list[int]) -> PuzzleBatch:
    """Show one square by its hints."""
    return assemble(
        modes=np.array([0]),
        hints=np.array([hints]),
        cage_ids=np.zeros((1, len(hints)), int),
        cage_ops=np.zeros((1, 1), int),
        cage_targets=np.zeros((1, 1), int),
    )


@pytest.mark.parametrize(("size", "count"), [(3, 12), (4, 576), (5, 161_280)])
def test_every_square_is_listed_once(size: int, count: int) -> None:
    """The known numbers of Latin squares; each is Latin, none twice."""
    squares = all_squares(size)
    assert squares.shape == (count, size * size)
    weights = size ** torch.arange(size * size)
    assert len((squares.long() * weights).sum(dim=1).unique()) == count
    grid = squares.view(count, size, size).sort(dim=2).values
    assert (grid == torch.arange(size)).all()
    grid = squares.view(count, size, size).sort(dim=1).values
    assert (grid == torch.arange(size)[:, None]).all()


def test_the_posterior_is_the_share_of_squares_that_keep_the_hints() -> None:
    """Against plain loops over all grids of size 3 (3 ** 9 of them)."""
    hints = [UNKNOWN, 1, UNKNOWN, UNKNOWN, UNKNOWN, 0] + [UNKNOWN] * 3
    counts = np.zeros((9, 3))
    for grid in product(range(3), repeat=9):
        rows = [set(grid[3 * r : 3 * r + 3]) for r in range(3)]
        columns = [set(grid[c::3]) for c in range(3)]
        kept = all(h in {UNKNOWN, g} for h, g in zip(hints, grid, strict=True))
        if kept and all(len(line) == 3 for line in rows + columns):
            counts[np.arange(9), list(grid)] += 1
    chances = posterior(hints_batch(hints))[0]
    np.testing.assert_allclose(chances, counts / counts.sum(axis=1)[:, None])


def test_an_empty_grid_knows_nothing_and_hints_are_certain() -> None:
    """Every rank alike: entropy ln n. A revealed cell has entropy 0."""
    chances = posterior(hints_batch([UNKNOWN] * 25))
    assert chances.flatten().tolist() == pytest.approx([0.2] * 125)
    assert entropy(chances).flatten().tolist() == pytest.approx([math.log(5)] * 25)
    batch = latin_batch(4, 0.5, 40)
    shown = posterior(batch)[~batch.hidden]
    assert torch.equal(shown.argmax(dim=1), batch.answers[~batch.hidden])
    assert torch.equal(shown.amax(dim=1), torch.ones(len(shown), dtype=torch.float64))


@pytest.mark.parametrize(
    ("fill", "floor", "ceiling"),
    [(0.05, 1.284, 0.31), (0.2, 0.885, 0.52), (0.4, 0.361, 0.79), (0.6, 0.085, 0.94)],
)
def test_floors_and_ceilings_of_size_four(
    fill: float, floor: float, ceiling: float
) -> None:
    """Figures of an independent enumeration; 2,000 puzzles, within .03."""
    batch = latin_batch(4, fill, 2000)
    chances = posterior(batch)[batch.hidden]
    assert entropy(chances).mean().item() == pytest.approx(floor, abs=0.03)
    assert chances.amax(dim=1).mean().item() == pytest.approx(ceiling, abs=0.03)


def test_cross_entropy_never_falls_below_the_floor() -> None:
    """It equals the entropy for the posterior's own logits, and exceeds it else."""
    batch = latin_batch(4, 0.3, 60)
    chances = posterior(batch)
    own = cross_entropy(chances, chances.log())
    torch.testing.assert_close(own, entropy(chances))
    logits = torch.randn(
        chances.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    assert (cross_entropy(chances, logits) > entropy(chances)).all()


def test_hints_that_no_square_keeps_have_no_posterior() -> None:
    """Two equal hints in a row: NaN, not a number that looks right."""
    assert posterior(hints_batch([0, 0] + [UNKNOWN] * 7)).isnan().all()


def test_sizes_too_large_to_list_are_refused() -> None:
    """The message says up to where."""
    with pytest.raises(SettingsError, match="up to 5"):
        all_squares(6)
