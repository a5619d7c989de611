"""Frozen test sets and `castwise kenken eval`: digests, baselines, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from castwise.errors import DataError, SettingsError
from castwise.recipes.kenken import examining, frozen_sets
from castwise.recipes.kenken.alphabets import Mode
from castwise.recipes.kenken.batches import PuzzleBatch
from castwise.recipes.kenken.dataset import generate_puzzle_set
from castwise.recipes.kenken.decoding import Order
from castwise.recipes.kenken.examining import examine, write_record


def oracle(batch: PuzzleBatch) -> torch.Tensor:
    """Say the answer."""
    return 20.0 * functional.one_hot(batch.answers, batch.size).float()


@pytest.mark.parametrize(
    ("size", "mode"), [(4, Mode.ZERO_INCLUSIVE), (5, Mode.NEGATIVE)]
)
def test_a_frozen_set_is_made_again_to_the_bit(
    size: int, mode: Mode, tmp_path: Path
) -> None:
    """Whatever number of threads makes it; a second opening reads the file."""
    made = frozen_sets.frozen_set(size, mode, tmp_path)
    assert made.digest == frozen_sets.DIGESTS[size, mode.value]
    assert len(made) == frozen_sets.NUM_PUZZLES
    alone = generate_puzzle_set(
        size, mode, frozen_sets.NUM_PUZZLES, frozen_sets.SEED, "test", workers=1
    )
    assert alone.digest == made.digest
    assert frozen_sets.frozen_set(size, mode, tmp_path).digest == made.digest


def test_no_training_puzzle_of_any_seed_stands_in_a_frozen_set(tmp_path: Path) -> None:
    """Shares are disjoint by a key that twins have in common."""
    frozen = frozen_sets.frozen_set(4, Mode.STANDARD, tmp_path)
    for seed in (0, frozen_sets.SEED):
        train = generate_puzzle_set(4, Mode.STANDARD, 500, seed, "train")
        assert not np.isin(train.key, frozen.key).any()


def test_another_generator_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures of other puzzles must not be compared."""
    monkeypatch.setitem(frozen_sets.DIGESTS, (4, "standard"), "0" * 32)
    with pytest.raises(DataError, match="another generator"):
        frozen_sets.frozen_set(4, Mode.STANDARD, tmp_path)
    with pytest.raises(DataError, match="no frozen test set of size 3"):
        frozen_sets.frozen_set(3, Mode.STANDARD, tmp_path)


def test_an_oracle_solves_everything_and_baselines_are_what_they_are(
    tmp_path: Path,
) -> None:
    """Filling without a look at the cages hardly ever solves; logic solves most."""
    puzzles = frozen_sets.frozen_set(4, Mode.STANDARD, tmp_path)
    row = examine(oracle, puzzles, 200, Order.MOST_CERTAIN_FIRST)
    assert row.network.value == 1.0
    assert row.forwards == 1.0
    assert row.legal_random.value < 0.05
    assert row.fewest_first.value < 0.05
    assert row.propagation.value > 0.9
    assert row.most_nodes >= row.median_nodes


def test_the_record_holds_rates_with_their_intervals(tmp_path: Path) -> None:
    """Plain JSON that another tool can read."""
    puzzles = frozen_sets.frozen_set(4, Mode.STANDARD, tmp_path)
    row = examine(oracle, puzzles, 50, Order.ROW_MAJOR)
    write_record({"seed": 1}, [row], tmp_path / "eval.json")
    record = json.loads((tmp_path / "eval.json").read_text())
    assert record["seed"] == 1
    (one,) = record["sets"]
    assert one["network"]["value"] == 1.0
    assert one["network"]["interval"][0] == pytest.approx(0.929, abs=1e-3)
    assert one["digest"] == puzzles.digest


def test_more_puzzles_than_there_are_is_an_error() -> None:
    """Before anything is loaded."""
    with pytest.raises(SettingsError, match="has 1000 puzzles, got --count 1001"):
        examining.evaluate_checkpoint(
            checkpoint=None,
            runs=Path("nowhere"),
            sizes=None,
            modes=("standard",),
            num_puzzles=1001,
            order="random",
            data=None,
        )
