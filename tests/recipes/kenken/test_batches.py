"""Batches: stateless, of one size, mixed as the mixture says."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from castwise.errors import DataError, SettingsError
from castwise.recipes.kenken.alphabets import EMPTY, Mode, tokens
from castwise.recipes.kenken.batches import (
    UNKNOWN,
    Fill,
    Mixture,
    PuzzleBatch,
    assemble,
    batch_of,
    draw_batch,
)
from castwise.recipes.kenken.dataset import generate_puzzle_set
from castwise.recipes.kenken.puzzle_set import Kind, PuzzleSet
from castwise.recipes.kenken.relations import MODES

Sets = dict[tuple[int, Mode, Kind], PuzzleSet]
MIXTURE = Mixture(sizes=(3, 4), size_shares=(0.25, 0.75), cells_per_step=400)


@cache
def puzzle_sets() -> Sets:
    """Make a few puzzles of every kind."""
    return {
        (size, mode, kind): generate_puzzle_set(
            size, mode, 50, 3, "train", kind=kind, workers=1
        )
        for size in (3, 4)
        for mode in Mode
        for kind in Kind
    }


def same(a: PuzzleBatch, b: PuzzleBatch) -> bool:
    """Compare every tensor of two batches."""
    names = ("tokens", "modes", "alphabet", "cage_ids", "cage_ops", "answers")
    pairs = [(getattr(a, name), getattr(b, name)) for name in names]
    pairs += list(zip(a.relations, b.relations, strict=True))
    return all(torch.equal(x, y) for x, y in pairs)


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    """Any order of drawing gives the same batches; other steps and seeds, others."""
    sets = puzzle_sets()
    forth = [draw_batch(sets, MIXTURE, seed=7, step=step) for step in range(6)]
    back = [draw_batch(sets, MIXTURE, seed=7, step=step) for step in range(5, -1, -1)]
    assert all(same(a, b) for a, b in zip(forth, back[::-1], strict=True))
    twins = [
        (a, b)
        for i, a in enumerate(forth)
        for b in forth[:i]
        if a.size == b.size and torch.equal(a.answers, b.answers)
    ]
    assert not twins
    other = draw_batch(sets, MIXTURE, seed=8, step=0)
    assert other.size != forth[0].size or not same(other, forth[0])


def test_shares_of_sizes_modes_kinds_and_empty_grids_come_out() -> None:
    """Over 200 steps each share is within five standard errors."""
    mixture = replace(
        MIXTURE,
        mode_shares=(0.5, 0.3, 0.2),
        latin_share=0.2,
        fills=(Fill(empty_share=0.4),),
    )
    drawn = [draw_batch(puzzle_sets(), mixture, seed=1, step=s) for s in range(200)]
    assert np.mean([b.size == 3 for b in drawn]) == pytest.approx(0.25, abs=0.16)
    modes = torch.cat([b.modes for b in drawn])
    num = len(modes)
    for code, share in enumerate(mixture.mode_shares):
        found = (modes == code).float().mean().item()
        assert found == pytest.approx(share, abs=5 * (share * (1 - share) / num) ** 0.5)
    latin = torch.cat([(b.cage_ops == 0).all(dim=1) for b in drawn])
    assert latin.float().mean().item() == pytest.approx(0.2, abs=5 * 0.4 / num**0.5)
    empty = torch.cat([b.hidden.all(dim=1) for b in drawn])[~latin]
    # also some of the others happen to reveal nothing: (1 - f)**16 over f in [0, .7]
    assert 0.4 < empty.float().mean().item() < 0.62


def test_puzzles_show_as_much_as_their_fill_says() -> None:
    """A quarter nearly full, three quarters nearly empty, each cell on its own."""
    fills = (
        Fill(share=0.25, empty_share=0.0, reveal=(0.9, 1.0)),
        Fill(share=0.75, empty_share=0.0, reveal=(0.0, 0.1)),
    )
    mixture = replace(MIXTURE, fills=fills)
    drawn = [draw_batch(puzzle_sets(), mixture, seed=1, step=s) for s in range(60)]
    shown = torch.cat([1 - b.hidden.float().mean(dim=1) for b in drawn])
    full = (shown > 0.5).float()
    assert full.mean().item() == pytest.approx(0.25, abs=5 * 0.43 / len(full) ** 0.5)
    assert shown[shown > 0.5].mean().item() == pytest.approx(0.95, abs=0.02)
    assert shown[shown <= 0.5].mean().item() == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize("change", [{"reveal": (0.5, 0.2)}, {"share": 1.5}])
def test_a_fill_refuses_chances_that_are_none(change: dict[str, Any]) -> None:
    """The message names what must rise or lie in 0..1."""
    with pytest.raises(SettingsError, match=next(iter(change))):
        Fill(**change)


def test_hints_are_answers_in_the_alphabet_of_the_mode() -> None:
    """Tokens show the answer or EMPTY; lengths are n * n, nothing is padded."""
    batch = draw_batch(puzzle_sets(), MIXTURE, seed=2, step=1)
    assert batch.tokens.shape == (400 // batch.size**2, batch.size**2)
    assert torch.equal(batch.tokens[~batch.hidden], batch.answer_tokens[~batch.hidden])
    assert (batch.tokens[batch.hidden] == EMPTY).all()
    for row, code in enumerate(batch.modes.tolist()):
        own = tokens(batch.size, MODES[code])
        assert batch.alphabet[row].tolist() == own.tolist()


def test_selecting_and_showing_touch_what_they_should() -> None:
    """A selection keeps rows of every tensor; new tokens change nothing else."""
    batch = draw_batch(puzzle_sets(), MIXTURE, seed=2, step=3)
    rows = torch.tensor([4, 1])
    chosen = batch.select(rows)
    assert len(chosen) == 2
    ways = batch.relations.by_cage().ways
    assert torch.equal(chosen.relations.by_cage().ways, ways[rows])
    assert torch.equal(chosen.cage_targets, batch.cage_targets[rows])
    shown = chosen.with_tokens(chosen.answer_tokens)
    assert not shown.hidden.any()
    assert same(shown.with_tokens(chosen.tokens), chosen.to("cpu"))


def test_a_puzzle_without_known_answer_is_a_batch_too() -> None:
    """The solver's case: hints and clues, no solution."""
    batch = assemble(
        modes=np.array([2]),
        hints=np.array([[UNKNOWN] * 8 + [0]]),
        cage_ids=np.zeros((1, 9), int),
        cage_ops=np.zeros((1, 1), int),
        cage_targets=np.zeros((1, 1), int),
    )
    assert (batch.answers == UNKNOWN).all()
    assert batch.tokens[0].tolist() == [EMPTY] * 8 + [35 - 1]


def test_sets_of_two_sizes_do_not_mix() -> None:
    """The message names both sizes."""
    sets = puzzle_sets()
    three = sets[3, Mode.STANDARD, Kind.KENKEN]
    four = sets[4, Mode.STANDARD, Kind.KENKEN]
    with pytest.raises(DataError, match="3 and 4"):
        batch_of(
            [(three, np.array([0])), (four, np.array([0]))], np.zeros((2, 9), bool)
        )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"size_shares": (0.5, 0.6)}, "size_shares"),
        ({"size_shares": (1.0,)}, "size_shares"),
        ({"mode_shares": (1.2, -0.1, -0.1)}, "mode_shares"),
        ({"latin_share": 1.5}, "latin_share"),
        ({"fills": (Fill(share=0.5), Fill(share=0.4))}, "fills"),
        ({"cells_per_step": 15}, "cells_per_step"),
    ],
)
def test_a_mixture_refuses_shares_that_are_none(
    change: dict[str, object], named: str
) -> None:
    """The message names the setting."""
    with pytest.raises(SettingsError, match=named):
        replace(MIXTURE, **change)
