from __future__ import annotations

import logging
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from castwise.errors import DataError, SettingsError, StorageError
from castwise.recipes.kenken import puzzle_set
from castwise.recipes.kenken.alphabets import Mode
from castwise.recipes.kenken.dataset import (
    batch_indices,
    generate_puzzle_set,
    open_puzzle_set,
    reveal_mask,
    world_note,
)
from castwise.recipes.kenken.puzzle_set import (
    Kind,
    PuzzleSet,
    Split,
    load_puzzle_set,
    save_puzzle_set,
)

KENKEN_DIGEST = "04f135fd88055ac943a49ad4f93cfcf3"
LATIN_DIGEST = "ef61497f13d8187133271907902fb080"


def small(seed: int = 0, split: str = "train") -> PuzzleSet:
    """Make a set that takes no time."""
    return generate_puzzle_set(4, Mode.STANDARD, 50, seed, split)


def test_the_number_of_workers_changes_nothing() -> None:
    """Digest and arrays are equal for one thread and for three."""
    sets = [
        generate_puzzle_set(5, Mode.ZERO_INCLUSIVE, 3000, 7, "train", workers=workers)
        for workers in (1, 3)
    ]
    assert sets[0].digest == sets[1].digest
    assert (sets[0].solution == sets[1].solution).all()


def test_the_generator_is_frozen_by_its_version() -> None:
    """The same settings make the same puzzles on every machine, or the version rises.

    If this fails, raise `GENERATOR_VERSION` and write the new digests here.
    """
    assert puzzle_set.GENERATOR_VERSION == 1
    assert small().digest == KENKEN_DIGEST
    latin = generate_puzzle_set(
        7, Mode.NEGATIVE, 20, 3, Split.TEST, kind=Kind.LATIN, workers=1
    )
    assert latin.digest == LATIN_DIGEST


def test_a_shorter_set_is_the_beginning_of_a_longer_one() -> None:
    """Counts do not disturb the sequence."""
    longer = generate_puzzle_set(4, Mode.STANDARD, 500, 0, "train")
    assert (longer.key[:50] == small().key).all()


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("n", [3, 4, 6])
def test_splits_never_share_a_puzzle_whatever_the_seed(n: int, mode: Mode) -> None:
    """Keys of the three splits are disjoint, and no set holds one twice."""
    sets = [
        generate_puzzle_set(n, mode, 300, seed, split)
        for seed, split in enumerate(["train", "validation", "test"])
    ]
    keys = [set(puzzles.key.tolist()) for puzzles in sets]
    assert [len(held) for held in keys] == [300, 300, 300]
    assert not keys[0] & keys[1] | keys[0] & keys[2] | keys[1] & keys[2]


def test_latin_squares_are_split_by_their_canonical_form() -> None:
    """At size 6 no class is shared; squares may repeat, for masks make the puzzle."""
    sets = [
        generate_puzzle_set(6, Mode.STANDARD, 3000, 0, split, kind=Kind.LATIN)
        for split in Split
    ]
    keys = [set(puzzles.key.tolist()) for puzzles in sets]
    assert sum(map(len, keys)) == len(set.union(*keys)) <= 1162
    assert len(keys[0]) > 0.7 * 1162
    assert not any(puzzles.num_cages.any() for puzzles in sets)


def test_a_world_that_is_too_small_is_reported() -> None:
    """Asking for more puzzles of size 3 than there are ends with the number found."""
    with pytest.raises(DataError, match=r"after \d+ of them .* ask for fewer"):
        generate_puzzle_set(3, Mode.STANDARD, 2000, 0, "test")
    for kind in Kind:
        assert all(world_note(n, Mode.STANDARD, kind) for n in (3, 4, 5))
        assert not world_note(7, Mode.STANDARD, kind)
    assert "576" in world_note(4, Mode.NEGATIVE)


def test_a_file_returns_the_set_that_was_written(tmp_path: Path) -> None:
    """Every field and array survives, read-only."""
    for puzzles in (
        small(),
        generate_puzzle_set(9, Mode.NEGATIVE, 5, 2, "test", kind=Kind.LATIN),
    ):
        path = tmp_path / "deep" / "set.safetensors"
        save_puzzle_set(path, puzzles)
        read = load_puzzle_set(path)
        assert read.facts == puzzles.facts
        assert read.digest == puzzles.digest
        assert [p.name for p in path.parent.iterdir()] == [path.name]
        with pytest.raises(ValueError, match="read-only"):
            read.solution[0, 0, 0] = 1


@pytest.mark.parametrize("where", [0, 3, 40, 0.5, -1])
def test_a_damaged_file_is_refused(tmp_path: Path, where: float) -> None:
    """One flipped bit in length, header or data, or one missing byte, is found."""
    path = tmp_path / "set.safetensors"
    save_puzzle_set(path, small())
    whole = bytearray(path.read_bytes())
    place = int(where * len(whole)) if 0 < where < 1 else int(where)
    flipped = bytearray(whole)
    flipped[place] ^= 0x10
    for data in (flipped, whole[:-1], whole[: len(whole) // 2], whole[:5], b""):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"make the set anew|another kind"):
            load_puzzle_set(path)


def test_other_versions_and_kinds_of_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says which version is needed and which came."""
    path = tmp_path / "set.safetensors"
    monkeypatch.setattr(puzzle_set, "GENERATOR_VERSION", 99)
    save_puzzle_set(path, small())
    monkeypatch.undo()
    with pytest.raises(DataError, match="version 1; got 99"):
        load_puzzle_set(path)
    monkeypatch.setattr(puzzle_set, "_FORMAT", "something else")
    save_puzzle_set(path, small())
    monkeypatch.undo()
    with pytest.raises(DataError, match="another kind of file"):
        load_puzzle_set(path)
    with pytest.raises(StorageError, match="no file is there"):
        load_puzzle_set(tmp_path / "missing")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """A folder in the way of the file is a storage error; no partial file stays."""
    (tmp_path / "set").mkdir()
    with pytest.raises(StorageError, match="free space, or choose"):
        save_puzzle_set(tmp_path / "set", small())
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_the_cache_is_used_and_mends_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A second opening makes nothing; a damaged file is made anew with a log line."""
    calls: list[int] = []
    asked = (tmp_path, 4, Mode.STANDARD, 50, 0, "train")
    first = open_puzzle_set(*asked, progress=calls.append)
    assert calls
    calls.clear()
    assert open_puzzle_set(*asked, progress=calls.append).digest == first.digest
    assert not calls
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING):
        assert open_puzzle_set(*asked).digest == first.digest
    assert "anew" in caplog.text
    assert load_puzzle_set(file).digest == first.digest
    other = open_puzzle_set(tmp_path, 4, Mode.STANDARD, 50, 1, "train")
    file.write_bytes(next(p for p in tmp_path.iterdir() if p != file).read_bytes())
    assert open_puzzle_set(*asked).digest == first.digest != other.digest


def open_once(folder: Path) -> str:
    """Open a set in a process of its own."""
    return open_puzzle_set(folder, 4, Mode.STANDARD, 400, 0, "train").digest


@pytest.mark.slow
def test_processes_may_open_the_same_set_at_once(tmp_path: Path) -> None:
    """All get the same puzzles, and one whole file stays."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        digests = list(processes.map(open_once, [tmp_path] * 3))
    assert len(set(digests)) == 1
    (file,) = tmp_path.iterdir()
    assert load_puzzle_set(file).digest == digests[0]


def test_arrays_of_another_shape_are_no_set() -> None:
    """A set checks what it is given."""
    puzzles = small()
    parts = {name: getattr(puzzles, name) for name in puzzle_set._DTYPES}
    named = {"size": 4, "mode": Mode.STANDARD, "kind": Kind.KENKEN, "seed": 0}
    named |= {"split": Split.TRAIN, "num_candidates": 1}
    with pytest.raises(DataError, match=r"nodes as int32 \(50,\); got int64 \(50,\)"):
        PuzzleSet(**named, **(parts | {"nodes": parts["nodes"].astype(np.int64)}))
    with pytest.raises(SettingsError, match="count of 1 or more; got 0"):
        generate_puzzle_set(4, Mode.STANDARD, 0, 0, "train")


def test_masks_are_functions_of_seed_epoch_and_index() -> None:
    """Any item alone equals the item in a batch; the share is as asked."""
    index = np.arange(4000)
    masks = reveal_mask(1, 2, index, 5, 0.3)
    assert masks.shape == (4000, 5, 5)
    assert (reveal_mask(1, 2, 77, 5, 0.3)[0] == masks[77]).all()
    assert (reveal_mask(1, 3, index, 5, 0.3) != masks).any()
    assert stats.binomtest(int(masks.sum()), masks.size, 0.3).pvalue > 1e-5
    shares = reveal_mask(1, [0, 0, 5], [1, 2, 3], 9, [0.0, 1.0, 0.5]).mean((1, 2))
    assert shares[0] == 0
    assert shares[1] == 1
    assert 0.2 < shares[2] < 0.8


def test_batches_run_through_epochs_without_loss() -> None:
    """Each epoch visits each item once, also where batches cross its end."""
    length, size = 70, 32
    drawn = [batch_indices(3, step * size, size, length) for step in range(7)]
    epochs = np.concatenate([epochs for epochs, _ in drawn])
    items = np.concatenate([items for _, items in drawn])
    orders = [items[epochs == epoch] for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(length))
    assert (orders[0] != orders[1]).any()
    assert (batch_indices(4, 0, size, length)[1] != items[:size]).any()
    assert (batch_indices(3, 0, size, length, "b")[1] != items[:size]).any()
