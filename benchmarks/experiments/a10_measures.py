"""A10: an oracle scores one, a cheat zero, and chance what chance must.

Beside the recipe's measures stands the one of the first description, which compares
tokens with digits: it gives an oracle nothing, which is the control.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from castwise.recipes.kenken import posterior
from castwise.recipes.kenken.alphabets import EMPTY, PAD, Mode
from castwise.recipes.kenken.batches import PuzzleBatch, batch_of
from castwise.recipes.kenken.dataset import generate_puzzle_set
from castwise.recipes.kenken.decoding import DecodingSettings, Order, decode
from castwise.recipes.kenken.evaluation import EvaluationSettings, evaluate
from castwise.recipes.kenken.measures import Rate, hidden_accuracy, valid_rate
from castwise.recipes.kenken.puzzle_set import Kind, PuzzleSet, Split
from experiments import kit, tested
from experiments.contract import Check, Experiment, Results

ORACLE, CHEATS, EXACT, CHANCE, TESTS = "oracle", "cheats", "exact", "chance", "tests"
NUM = 200
NUM_CHANCE = 5000
KNOWN = {
    "random 4": 0.147,
    "random 5": 0.022,
    "row_major 4": 0.591,
    "row_major 5": 0.280,
    "most_certain_first 4": 1.0,  # among equals the first in reading order
    "most_certain_first 5": 0.971,
}
"""Legal random filling, measured by other code."""
FILES = (
    "tests/recipes/kenken/test_measures.py",
    "tests/recipes/kenken/test_posterior.py",
    "tests/recipes/kenken/test_evaluation.py",
    "tests/recipes/kenken/test_decoding.py",
)

Grids = Callable[[PuzzleBatch], Tensor]


@final
class Measuring(Experiment):
    """The measures themselves, measured."""

    name = "A10"
    question = "Do the measures give an oracle all, a cheat nothing, chance its due?"
    arms = (ORACLE, CHEATS, EXACT, CHANCE, TESTS)
    settings: ClassVar[Mapping[str, Any]] = {
        "num": [NUM, NUM_CHANCE],
        "known": KNOWN,
        "files": list(FILES),
    }
    rooms = (kit,)

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Measure one kind of predictor."""
        if arm == ORACLE:
            return _oracle(seed)
        if arm == CHEATS:
            return {name: _cheat(cheat) for name, cheat in _CHEATS.items()}
        if arm == EXACT:
            return _exact(seed)
        if arm == CHANCE:
            return _chance()
        return tested.run_tests(*FILES)

    def judge(self, results: Results, limits: Mapping[str, float]) -> list[Check]:
        """Ask for exactly one, exactly zero, and chance within its interval."""
        oracle, cheats = results[ORACLE][0], results[CHEATS][0]
        exact, chance = results[EXACT][0], results[CHANCE][0]
        checks = [
            Check(
                name="least score of an oracle, over measures, sizes, modes and fills",
                value=oracle["least"],
                num=oracle["num"],
                need="1",
                holds=oracle["least"] == 1.0,
            ),
            Check(
                name="score of an oracle by the first description's measure",
                value=oracle["by_first_description"],
                num=NUM,
                need="0: it compares tokens with digits",
                holds=oracle["by_first_description"] == 0.0,
                control=True,
            ),
            Check(
                name=f"highest score of a cheat ({', '.join(cheats)})",
                value=max(cheats.values()),
                num=len(cheats),
                need="0",
                holds=max(cheats.values()) == 0.0,
            ),
            Check(
                name="largest difference from posteriors counted square by square",
                value=exact["apart"],
                num=exact["num"],
                need=f"<= {limits['posterior']:g}",
                holds=exact["apart"] <= limits["posterior"],
            ),
        ]
        for name, known in KNOWN.items():
            rate = Rate(hits=chance[name][0], num=chance[name][1])
            apart = limits["chance"]
            checks.append(
                Check(
                    name=f"legal random filling, {name} (known: {known:g})",
                    value=rate.value,
                    interval=rate.interval,
                    num=rate.num,
                    need=f"within {apart:g} of the known",
                    holds=abs(rate.value - known) <= apart,
                )
            )
        return [*checks, tested.judge_tests(results, TESTS)]


def _knowing(batch: PuzzleBatch) -> Tensor:
    return functional.one_hot(batch.answers, batch.size) * 30.0


def _oracle(seed: int) -> dict[str, Any]:
    """Let someone who knows the answers be measured everywhere."""
    sets = [
        generate_puzzle_set(size, mode, NUM, seed, Split.TEST, kind=kind, workers=1)
        for size in (3, 4, 5)
        for mode in Mode
        for kind in Kind
    ]
    fills = ((0.0, 0.0), (0.1, 0.4), (0.4, 0.7))
    with_hints = EvaluationSettings(num_puzzles=NUM, fills=fills)
    rows = [
        row
        for row in evaluate(_knowing, sets, with_hints)
        if row.kind is Kind.KENKEN or row.fill != (0.0, 0.0)
    ]
    scores = [rate.value for row in rows for rate in (row.cell_accuracy, row.valid)]
    first = sets[0]
    shown = batch_of([(first, np.arange(NUM))], np.zeros((NUM, first.size**2), bool))
    return {
        "least": min(scores),
        "num": len(scores),
        "by_first_description": _tokens_as_digits(shown.answer_tokens, first),
    }


def _tokens_as_digits(tokens: Tensor, puzzles: PuzzleSet) -> float:
    """Judge as was first described: rows and columns of token ids must be 1 to n."""
    size = puzzles.size
    wanted = torch.arange(1, size + 1)
    grid = tokens.view(-1, size, size)
    rows = (grid.sort(dim=2).values == wanted).flatten(1).all(dim=1)
    columns = (grid.sort(dim=1).values == wanted[:, None]).flatten(1).all(dim=1)
    return float((rows & columns).float().mean())


def _one_hint_changed(batch: PuzzleBatch) -> Tensor:
    grid = batch.answer_tokens.clone()
    grid[:, 0] = grid[:, 1]
    return grid


_CHEATS: dict[str, Grids] = {
    "padding": lambda batch: torch.full_like(batch.tokens, PAD),
    "empty": lambda batch: torch.full_like(batch.tokens, EMPTY),
    "one digit": lambda batch: batch.alphabet[:, :1].expand_as(batch.tokens),
    "another alphabet": lambda batch: batch.answers + 3 + batch.size,
    "one hint changed": _one_hint_changed,
}


def _cheat(cheat: Grids) -> float:
    """Return the highest score of a cheat on puzzles with two different hints."""
    scores = []
    for size, mode, kind in itertools.product((4, 5), Mode, Kind):
        made = generate_puzzle_set(size, mode, 40, 6, Split.TRAIN, kind=kind, workers=1)
        revealed = np.zeros((40, size * size), bool)
        revealed[:, :2] = True
        batch = batch_of([(made, np.arange(40))], revealed)
        grid = cheat(batch)
        scores += [hidden_accuracy(grid, batch).value, valid_rate(grid, batch).value]
    return max(scores)


def _exact(seed: int) -> dict[str, Any]:
    """Count squares one by one, in Python, and compare."""
    rows = list(itertools.permutations(range(4)))
    every = [
        sum(four, ())
        for four in itertools.product(rows, repeat=4)
        if all(len(set(column)) == 4 for column in zip(*four, strict=True))
    ]
    made = kit.squares(4, Mode.STANDARD, Split.VALIDATION)
    revealed = np.random.default_rng(seed).random((NUM, 16)) < 0.3
    batch = batch_of([(made, np.arange(NUM))], revealed)
    found = posterior.posterior(batch).numpy()
    apart = 0.0
    for place in range(NUM):
        hints = {
            cell: int(batch.answers[place, cell])
            for cell in np.flatnonzero(revealed[place])
        }
        keeps = [s for s in every if all(s[c] == rank for c, rank in hints.items())]
        counts = np.zeros((16, 4))
        for square in keeps:
            counts[np.arange(16), list(square)] += 1
        apart = max(apart, float(np.abs(counts / len(keeps) - found[place]).max()))
    return {"apart": apart, "num": NUM, "squares": len(every)}


def _chance() -> dict[str, list[int]]:
    """Fill empty squares at random, legally, in three orders."""
    counts = {}
    for size in (4, 5):
        made = generate_puzzle_set(
            size, Mode.STANDARD, NUM_CHANCE, 0, Split.TEST, kind=Kind.LATIN, workers=1
        )
        shown = np.zeros((NUM_CHANCE, size * size), bool)
        batch = batch_of([(made, np.arange(NUM_CHANCE))], shown)
        for order in Order:
            settings = DecodingSettings(order=order, legal=True, temperature=1.0)
            grid = decode(_uniform, batch, settings).tokens
            rate = valid_rate(grid, batch)
            counts[f"{order} {size}"] = [rate.hits, rate.num]
    return counts


def _uniform(batch: PuzzleBatch) -> Tensor:
    return torch.zeros(len(batch), batch.size**2, batch.size)
