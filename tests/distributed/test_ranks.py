from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from castwise.distributed.ranks import ALONE, Ranks, launched
from castwise.errors import SettingsError
from castwise.recipes.language.token_file import Packing


def team(num_ranks: int) -> list[Ranks]:
    """Every process of a run, as each knows itself."""
    return [Ranks(rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_rows", [7, 12, 72, 101])
def test_parts_cover_a_batch_without_overlap(num_ranks: int, num_rows: int) -> None:
    """In order, and as even as can be."""
    rows = list(range(num_rows))
    parts = [rows[ranks.part(num_rows)] for ranks in team(num_ranks)]
    assert [row for part in parts for row in part] == rows
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def windows_of(packing: Packing, steps: range, num_ranks: int) -> list[int]:
    """Tokens at which the windows of all ranks begin, over some steps."""
    parts = [
        packing.batch(step).part(ranks) for step in steps for ranks in team(num_ranks)
    ]
    return [int(first) for part in parts for first in part.tokens[:, 0]]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_window_is_seen_once_in_an_epoch(num_ranks: int) -> None:
    """Each has its own first token, so that first tokens are ids."""
    stream = np.arange(5 * 12 * 7 + 6, dtype=np.uint32)
    packing = Packing(stream, length=5, batch_size=12, seed=3)
    epoch = range(packing.batches_per_pass)
    seen = windows_of(packing, epoch, num_ranks)
    assert len(seen) == len(set(seen)) == 12 * packing.batches_per_pass
    assert sorted(seen) == sorted(windows_of(packing, epoch, 1))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 3), (4, 3), (3, 1)])
def test_an_epoch_stays_whole_across_a_resume(before: int, after: int) -> None:
    """On another number of ranks, by a process that remembers nothing."""
    stream = np.arange(5 * 12 * 7 + 6, dtype=np.uint32)
    one, other = (Packing(stream, length=5, batch_size=12, seed=3) for _ in range(2))
    middle, end = 2, one.batches_per_pass
    seen = windows_of(one, range(middle), before)
    seen += windows_of(other, range(middle, end), after)
    assert len(seen) == len(set(seen)) == 12 * end


def test_who_was_started_alone_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And who was started by torchrun knows its place."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert launched() is None
    values = {"RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "MASTER_PORT": "1"}
    for name, value in {**values, "TORCHELASTIC_RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="need MASTER_ADDR in their environment"):
        launched()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert launched() == Ranks(rank=3, num_ranks=5, local_rank=1, num_restarts=2)
    monkeypatch.setenv("RANK", "5")
    with pytest.raises(SettingsError, match=r"0\.\.4, got 5"):
        launched()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(SettingsError, match="whole numbers"):
        launched()


def test_one_process_is_the_first_of_one() -> None:
    """It sees every row and speaks for all."""
    assert ALONE.is_first
    assert ALONE.part(9) == slice(0, 9)
    assert not dataclasses.replace(ALONE, rank=1, num_ranks=2).is_first
