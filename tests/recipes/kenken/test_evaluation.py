"""Evaluation: records of whole sets, with floors, ceilings and samples."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch.nn import functional

from castwise.errors import DataError, SettingsError
from castwise.recipes.kenken.alphabets import Mode
from castwise.recipes.kenken.dataset import generate_puzzle_set
from castwise.recipes.kenken.evaluation import (
    EvaluationSettings,
    evaluate,
    evaluation_batch,
)
from castwise.recipes.kenken.posterior import posterior
from castwise.recipes.kenken.puzzle_set import Kind, PuzzleSet

if TYPE_CHECKING:
    from torch import Tensor

    from castwise.recipes.kenken.batches import PuzzleBatch

SETTINGS = EvaluationSettings(num_puzzles=60, batch_size=25)


@cache
def puzzles(size: int, kind: Kind, mode: Mode = Mode.NEGATIVE) -> PuzzleSet:
    """Make a few puzzles."""
    return generate_puzzle_set(size, mode, 60, 8, "validation", kind=kind, workers=1)


def oracle(batch: PuzzleBatch) -> Tensor:
    """Know the answer, beyond doubt."""
    known = functional.one_hot(batch.answers, batch.size).bool()
    return torch.zeros(known.shape).masked_fill(~known, -torch.inf)


def bayes(batch: PuzzleBatch) -> Tensor:
    """Know what can be known of a Latin square cell by cell."""
    return posterior(batch).log()


def uniform(batch: PuzzleBatch) -> Tensor:
    """Know nothing."""
    return torch.zeros(len(batch), batch.size**2, batch.size)


def constant(batch: PuzzleBatch) -> Tensor:
    """Say the first rank everywhere, without a doubt."""
    sure = torch.full((len(batch), batch.size**2, batch.size), -torch.inf)
    sure[:, :, 0] = 0
    return sure


def test_an_oracle_scores_one_in_every_bin() -> None:
    """Accuracy, solved rate and ceiling 1; cross-entropy, floor and excess 0."""
    for row in evaluate(oracle, [puzzles(4, Kind.KENKEN)], SETTINGS):
        assert row.cell_accuracy.value == row.valid.value == row.ceiling == 1.0
        assert row.cross_entropy == row.floor == row.excess == 0.0
        assert row.valid.num == row.num_puzzles == 60
        assert row.forwards <= 1.0


def test_a_constant_answer_solves_nothing_and_costs_infinitely() -> None:
    """The same table, the other end."""
    settings = replace(SETTINGS, fills=((0.0, 0.0), (0.0, 0.3)))
    for row in evaluate(constant, [puzzles(4, Kind.KENKEN)], settings):
        assert row.valid.value == 0.0
        assert row.distinct == 0
        assert row.cross_entropy == math.inf


def test_the_exact_posterior_has_no_excess_and_reaches_the_ceiling() -> None:
    """At every fill of Latin squares; accuracy within four standard errors."""
    for size in (3, 4):
        for row in evaluate(bayes, [puzzles(size, Kind.LATIN)], SETTINGS):
            assert row.excess == pytest.approx(0.0, abs=1e-9)
            assert row.ceiling is not None
            error = 4 * (row.ceiling * (1 - row.ceiling) / row.cell_accuracy.num) ** 0.5
            # cells of one puzzle are not independent: half again
            assert row.cell_accuracy.value == pytest.approx(
                row.ceiling, abs=1.5 * error + 0.01
            )


def test_squares_drawn_from_exact_posteriors_are_valid_and_various() -> None:
    """Any order of exact conditional draws gives a uniform square."""
    empty = replace(SETTINGS, fills=((0.0, 0.0),))
    (row,) = evaluate(bayes, [puzzles(4, Kind.LATIN)], empty)
    assert row.valid.value == 1.0
    assert row.forwards < 16  # cells that are forced come at once
    assert row.distinct > 50  # 60 of 576: about 57 are expected
    assert row.distinct_share == row.distinct / 60


def test_knowing_nothing_costs_the_logarithm_of_the_size() -> None:
    """A uniform predictor has ln n nats, and an excess where something is known."""
    (row,) = evaluate(
        uniform, [puzzles(5, Kind.LATIN)], replace(SETTINGS, fills=((0.4, 0.7),))
    )
    assert row.cross_entropy == pytest.approx(math.log(5))
    assert row.excess is not None
    assert row.excess > 0.5


def test_where_no_floor_is_known_none_is_shown() -> None:
    """Latin squares of size 6 have no table: None, not a number."""
    (row,) = evaluate(
        uniform, [puzzles(6, Kind.LATIN)], replace(SETTINGS, fills=((0.1, 0.4),))
    )
    assert row.floor is None
    assert row.ceiling is None
    assert row.excess is None
    assert row.cross_entropy == pytest.approx(math.log(6))


def test_masks_are_the_same_for_the_same_seed_whatever_the_batches() -> None:
    """Rows asked for alone show what they show together; another seed differs."""
    made, fill = puzzles(4, Kind.KENKEN), (0.1, 0.4)
    whole = evaluation_batch(made, fill, np.arange(60), 0)
    part = evaluation_batch(made, fill, np.arange(20, 30), 0)
    assert torch.equal(whole.tokens[20:30], part.tokens)
    other = evaluation_batch(made, fill, np.arange(60), 1)
    assert not torch.equal(whole.tokens, other.tokens)
    shown = 1 - whole.hidden.float().mean().item()
    assert 0.15 < shown < 0.35


def test_too_few_puzzles_are_refused() -> None:
    """A record never rests on fewer samples than it says."""
    with pytest.raises(DataError, match="61 puzzles of size 4"):
        evaluate(uniform, [puzzles(4, Kind.KENKEN)], replace(SETTINGS, num_puzzles=61))


@pytest.mark.parametrize("bad", [{"num_puzzles": 0}, {"fills": ((0.5, 0.1),)}])
def test_settings_without_a_meaning_are_refused(bad: dict[str, object]) -> None:
    """Nothing to measure, or a bin that falls."""
    with pytest.raises(SettingsError):
        replace(SETTINGS, **bad)
