"""Measures: an oracle scores 1 everywhere, and who cheats scores 0 everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from castwise.errors import SettingsError
from castwise.recipes.kenken.alphabets import EMPTY, PAD, Mode, tokens
from castwise.recipes.kenken.batches import PuzzleBatch, assemble, batch_of
from castwise.recipes.kenken.clues import (
    OP_ADD,
    OP_DIV,
    OP_GIVEN,
    OP_MUL,
    OP_SUB,
)
from castwise.recipes.kenken.dataset import generate_puzzle_set
from castwise.recipes.kenken.measures import (
    Rate,
    hidden_accuracy,
    is_latin,
    is_valid,
    num_distinct,
    satisfies_cages,
    valid_rate,
)
from castwise.recipes.kenken.puzzle_set import Kind
from castwise.recipes.kenken.relations import MODES

Grids = Callable[[PuzzleBatch], Tensor]


@cache
def puzzle_batch(kind: Kind, size: int = 5, hinted: bool = True) -> PuzzleBatch:
    """Show puzzles of every mode, each with two different digits as hints."""
    parts = []
    for mode in Mode:
        made = generate_puzzle_set(size, mode, 40, 6, "train", kind=kind, workers=1)
        parts.append((made, np.arange(40)))
    revealed = np.zeros((120, size * size), bool)
    revealed[:, :2] = hinted  # neighbours in a row: never the same digit
    return batch_of(parts, revealed)


def oracle(batch: PuzzleBatch) -> Tensor:
    """Know the answer."""
    return batch.answer_tokens


def padding(batch: PuzzleBatch) -> Tensor:
    """Answer with padding."""
    return torch.full_like(batch.tokens, PAD)


def emptiness(batch: PuzzleBatch) -> Tensor:
    """Answer with nothing."""
    return torch.full_like(batch.tokens, EMPTY)


def constant(batch: PuzzleBatch) -> Tensor:
    """Answer with the first digit of the alphabet everywhere."""
    return batch.alphabet[:, :1].expand_as(batch.tokens)


def hint_changer(batch: PuzzleBatch) -> Tensor:
    """Answer with a valid Latin square of the right alphabet, but another one."""
    ranks = (batch.answers + 1) % batch.size
    return batch.alphabet.gather(1, ranks)


def one_hint_changer(batch: PuzzleBatch) -> Tensor:
    """Know every answer, and change one hint."""
    grid = batch.answer_tokens.clone()
    grid[:, 0] = grid[:, 1]
    return grid


def wrong_alphabet(batch: PuzzleBatch) -> Tensor:
    """Know every rank, and write it in an alphabet that shares no digit with any."""
    return torch.full_like(batch.tokens, 2 + batch.size + 1) + batch.answers


@pytest.mark.parametrize("kind", list(Kind))
def test_an_oracle_scores_one_on_every_measure(kind: Kind) -> None:
    """In all modes, with and without hints."""
    for hinted in (True, False):
        batch = puzzle_batch(kind, hinted=hinted)
        grid = oracle(batch)
        assert hidden_accuracy(grid, batch).value == 1.0
        assert valid_rate(grid, batch).value == 1.0
        assert num_distinct(grid, batch) == len(torch.unique(grid, dim=0))


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize(
    "cheat",
    [padding, emptiness, constant, hint_changer, one_hint_changer, wrong_alphabet],
)
def test_a_cheat_scores_zero_on_every_measure(kind: Kind, cheat: Grids) -> None:
    """Hints are there to be kept, and alphabets to be used."""
    batch = puzzle_batch(kind)
    grid = cheat(batch)
    assert hidden_accuracy(grid, batch).value == 0.0
    assert valid_rate(grid, batch).value == 0.0
    assert num_distinct(grid, batch) == 0


@pytest.mark.parametrize("cheat", [padding, emptiness, constant, wrong_alphabet])
def test_a_cheat_makes_nothing_valid_from_an_empty_grid(cheat: Grids) -> None:
    """Without hints there is nothing to change, and still nothing is valid."""
    for kind in Kind:
        batch = puzzle_batch(kind, hinted=False)
        assert valid_rate(cheat(batch), batch).value == 0.0


def test_solved_means_equal_to_the_unique_solution() -> None:
    """Valid by the rules alone, judged without the answer, is the answer."""
    batch = puzzle_batch(Kind.KENKEN, hinted=False)
    generator = torch.Generator().manual_seed(0)
    swapped = oracle(batch).view(-1, 5, 5)[:, torch.randperm(5, generator=generator)]
    candidates = torch.where(
        torch.rand(len(batch), 1, generator=generator) < 0.5,
        oracle(batch),
        swapped.reshape(len(batch), -1),
    )
    equal = (candidates == oracle(batch)).all(dim=1)
    assert equal.any()
    assert not equal.all()
    assert torch.equal(is_valid(candidates, batch), equal)
    assert is_latin(candidates, batch).all()


def test_latin_means_each_token_once_in_rows_and_columns() -> None:
    """Against sets, over random grids and squares with one cell changed."""
    batch = puzzle_batch(Kind.LATIN, 3, hinted=False)
    generator = torch.Generator().manual_seed(1)
    ranks = torch.randint(0, 3, (120, 9), generator=generator)
    grids = torch.cat([batch.alphabet.gather(1, ranks), oracle(batch)])
    doubled = batch.select(torch.arange(120).repeat(2))
    for grid, own, verdict in zip(
        grids.tolist(), doubled.alphabet.tolist(), is_latin(grids, doubled), strict=True
    ):
        lines = [grid[3 * r : 3 * r + 3] for r in range(3)]
        lines += [grid[c::3] for c in range(3)]
        assert all(set(line) == set(own) for line in lines) == bool(verdict)


@pytest.mark.parametrize(
    ("mode", "operation", "target", "pair", "holds"),
    [
        (Mode.STANDARD, OP_ADD, 5, (2, 3), True),
        (Mode.STANDARD, OP_ADD, 5, (2, 2), False),
        (Mode.STANDARD, OP_SUB, 2, (1, 3), True),
        (Mode.NEGATIVE, OP_SUB, 3, (1, -2), True),
        (Mode.NEGATIVE, OP_MUL, -2, (-2, 1), True),
        (Mode.NEGATIVE, OP_MUL, 2, (-2, 1), False),
        (Mode.STANDARD, OP_DIV, 3, (1, 3), True),
        (Mode.STANDARD, OP_DIV, 2, (1, 3), False),
        (Mode.NEGATIVE, OP_DIV, -2, (1, -2), True),
        (Mode.ZERO_INCLUSIVE, OP_DIV, 0, (3, 0), True),
        (Mode.ZERO_INCLUSIVE, OP_DIV, 0, (0, 0), False),
        (Mode.ZERO_INCLUSIVE, OP_MUL, 0, (0, 3), True),
    ],
)
def test_a_cage_is_judged_on_the_digits_of_the_mode(
    mode: Mode, operation: int, target: int, pair: tuple[int, int], holds: bool
) -> None:
    """A domino in a 4 x 4 grid, with a given cell and a far cage that hold."""
    shown = dict(zip(_digits(mode), tokens(4, mode).tolist(), strict=True))
    grid = torch.full((1, 16), shown[_digits(mode)[0]])
    grid[0, 0], grid[0, 1] = shown[pair[0]], shown[pair[1]]
    ids = np.full((1, 16), 2)
    ids[0, :2], ids[0, 2] = 0, 1
    first = _digits(mode)[0]
    batch = assemble(
        modes=np.array([MODES.index(mode)]),
        hints=np.full((1, 16), -1),
        cage_ids=ids,
        cage_ops=np.array([[operation, OP_GIVEN, OP_ADD]]),
        cage_targets=np.array([[target, first, 13 * first]]),
    )
    assert bool(satisfies_cages(grid, batch)[0]) is holds


def _digits(mode: Mode) -> list[int]:
    return {
        Mode.STANDARD: [1, 2, 3, 4],
        Mode.ZERO_INCLUSIVE: [0, 1, 2, 3],
        Mode.NEGATIVE: [-2, -1, 1, 2],
    }[mode]


@pytest.mark.parametrize(
    ("hits", "num", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (480, 500, 0.9391, 0.9740),
        (0, 0, 0.0, 1.0),
    ],
)
def test_rates_carry_wilson_intervals(
    hits: int, num: int, low: float, high: float
) -> None:
    """Published values of the score interval."""
    assert Rate(hits=hits, num=num).interval == pytest.approx((low, high), abs=5e-4)


def test_a_rate_of_nothing_is_no_number_and_odd_counts_are_refused() -> None:
    """No trials: NaN. More hits than trials: an error."""
    assert math.isnan(Rate(hits=0, num=0).value)
    with pytest.raises(SettingsError, match="4 of 3"):
        Rate(hits=4, num=3)
