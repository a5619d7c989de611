"""Decoding: orders, legality, thresholds, clamped hints, baselines without a model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch.nn import functional

from castwise.errors import SettingsError
from castwise.recipes.kenken.alphabets import EMPTY, Mode
from castwise.recipes.kenken.batches import UNKNOWN, PuzzleBatch, assemble, batch_of
from castwise.recipes.kenken.dataset import generate_puzzle_set
from castwise.recipes.kenken.decoding import DecodingSettings, Order, decode
from castwise.recipes.kenken.measures import is_valid, valid_rate
from castwise.recipes.kenken.puzzle_set import PuzzleSet

if TYPE_CHECKING:
    from torch import Tensor


@cache
def puzzles() -> PuzzleSet:
    """Make a few puzzles of size 4."""
    return generate_puzzle_set(4, Mode.ZERO_INCLUSIVE, 30, 4, "train", workers=1)


def batch(fill: float = 0.3) -> PuzzleBatch:
    """Show them with some hints."""
    rng = np.random.default_rng(1)
    return batch_of([(puzzles(), np.arange(30))], rng.random((30, 16)) < fill)


def empty_squares(size: int, count: int) -> PuzzleBatch:
    """Ask for squares from nothing."""
    return assemble(
        modes=np.zeros(count, int),
        hints=np.full((count, size * size), UNKNOWN),
        cage_ids=np.zeros((count, size * size), int),
        cage_ops=np.zeros((count, 1), int),
        cage_targets=np.zeros((count, 1), int),
    )


def oracle(asked: PuzzleBatch) -> Tensor:
    """Know the answer; surer of later cells."""
    sure = torch.linspace(5, 9, asked.size**2)[:, None]
    return functional.one_hot(asked.answers, asked.size) * sure


def uniform(asked: PuzzleBatch) -> Tensor:
    """Know nothing."""
    return torch.zeros(len(asked), asked.size**2, asked.size)


@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize("legal", [False, True])
def test_an_oracle_solves_in_one_forward_per_hidden_cell(
    order: Order, legal: bool
) -> None:
    """Whatever the order; the first forward alone knows everything too."""
    asked = batch()
    decoded = decode(oracle, asked, DecodingSettings(order=order, legal=legal))
    assert torch.equal(decoded.tokens, asked.answer_tokens)
    assert torch.equal(decoded.first_tokens, asked.answer_tokens)
    assert torch.equal(decoded.num_forwards, asked.hidden.sum(dim=1))


def test_a_threshold_commits_all_that_are_certain_and_at_least_one() -> None:
    """An oracle needs one forward; one that is never certain, one per cell."""
    asked = batch()
    settings = DecodingSettings(threshold=0.9)
    assert (decode(oracle, asked, settings).num_forwards <= 1).all()
    slow = decode(uniform, asked, settings).num_forwards
    assert torch.equal(slow, asked.hidden.sum(dim=1))


def test_hints_are_never_changed_even_by_a_hostile_predictor() -> None:
    """A predictor that shouts another rank in every hint cell is not heard."""
    asked = batch(0.5)

    def hostile(shown: PuzzleBatch) -> Tensor:
        return -oracle(shown)

    for order in Order:
        decoded = decode(hostile, asked, DecodingSettings(order=order, threshold=0.2))
        for grid in (decoded.tokens, decoded.first_tokens):
            assert torch.equal(grid[~asked.hidden], asked.tokens[~asked.hidden])
            assert not (grid == EMPTY).any()


def test_cells_are_committed_in_the_named_order() -> None:
    """A recording predictor sees row-major prefixes, or the surest cells first."""
    asked = empty_squares(3, 1).select(torch.tensor([0]))
    asked = replace(asked, answers=torch.tensor([[0, 1, 2, 1, 2, 0, 2, 0, 1]]))
    for order, wanted in (
        (Order.ROW_MAJOR, list(range(9))),
        (Order.MOST_CERTAIN_FIRST, list(range(8, -1, -1))),
    ):
        seen: list[Tensor] = []

        def recording(shown: PuzzleBatch, seen: list[Tensor] = seen) -> Tensor:
            seen.append(shown.hidden[0])
            return oracle(shown)

        decode(recording, asked, DecodingSettings(order=order))
        states = torch.stack([*seen, torch.zeros(9, dtype=torch.bool)]).long()
        committed = (states[:-1] - states[1:]).argmax(dim=1)
        assert committed.tolist() == wanted


def test_grids_depend_on_seed_and_index_and_not_on_the_batch() -> None:
    """Puzzle 7 alone, with its index, is puzzle 7 of the batch; seeds differ."""
    asked = empty_squares(5, 12)
    settings = DecodingSettings(order=Order.RANDOM, legal=True, temperature=1.0)
    together = decode(uniform, asked, settings).tokens
    alone = decode(uniform, asked.select(torch.tensor([7])), settings, first_index=7)
    assert torch.equal(alone.tokens[0], together[7])
    assert torch.equal(decode(uniform, asked, settings).tokens, together)
    other = decode(uniform, asked, replace(settings, seed=1)).tokens
    assert not torch.equal(other, together)


def test_drawing_follows_the_probabilities() -> None:
    """One hidden cell, chances .6 .3 .1, 4,000 draws: within four standard errors."""
    asked = empty_squares(3, 4000)
    chances = torch.tensor([0.6, 0.3, 0.1])

    def biased(shown: PuzzleBatch) -> Tensor:
        return chances.log().expand(len(shown), 9, 3)

    grid = decode(biased, asked, DecodingSettings(temperature=1.0, threshold=0.1))
    found = torch.stack([(grid.tokens[:, 4] == 3 + d).float().mean() for d in range(3)])
    error = 4 * (chances * (1 - chances) / 4000).sqrt()
    assert ((found - chances).abs() < error).all()


@pytest.mark.parametrize(
    ("order", "size", "rate"),
    [
        (Order.RANDOM, 4, 0.147),
        (Order.RANDOM, 5, 0.022),
        (Order.ROW_MAJOR, 4, 0.591),
        (Order.ROW_MAJOR, 5, 0.280),
        (Order.MOST_CERTAIN_FIRST, 4, 0.974),
        (Order.MOST_CERTAIN_FIRST, 5, 0.971),
    ],
)
def test_legal_random_filling_reaches_the_known_rates(
    order: Order, size: int, rate: float
) -> None:
    """Knowing nothing but legality: 2,000 squares, within .035 of a pilot's figures.

    Most certain first is most constrained first here: fewest legal ranks.
    """
    asked = empty_squares(size, 2000)
    settings = DecodingSettings(order=order, legal=True, temperature=1.0)
    grid = decode(uniform, asked, settings).tokens
    assert valid_rate(grid, asked).value == pytest.approx(rate, abs=0.035)


def test_legal_grids_fail_only_where_nothing_was_left() -> None:
    """A grid is wrong only if some cell met all ranks in its lines."""
    asked = empty_squares(4, 300)
    settings = DecodingSettings(order=Order.ROW_MAJOR, legal=True, temperature=1.0)
    grid = decode(uniform, asked, settings).tokens
    rows = grid.view(-1, 4, 4)
    wrong = ~is_valid(grid, asked)
    assert wrong.any()
    # the first two rows of row-major filling always find a legal rank but the last
    # cells of a row; a first row never repeats
    assert (rows[:, 0].sort(dim=1).values == torch.arange(3, 7)).all()


def test_a_full_grid_needs_no_forward() -> None:
    """Nothing hidden, nothing asked."""
    asked = batch()
    full = asked.with_tokens(asked.answer_tokens)

    def never(shown: PuzzleBatch) -> Tensor:
        raise AssertionError(f"asked about {len(shown)} full grids")

    decoded = decode(never, full, DecodingSettings())
    assert torch.equal(decoded.tokens, full.tokens)
    assert not decoded.num_forwards.any()


@pytest.mark.parametrize(
    "bad", [{"threshold": 0.0}, {"threshold": 1.2}, {"temperature": -1.0}]
)
def test_settings_without_a_meaning_are_refused(bad: dict[str, float]) -> None:
    """The message names the value."""
    with pytest.raises(SettingsError, match=str(next(iter(bad.values())))):
        DecodingSettings(**bad)
