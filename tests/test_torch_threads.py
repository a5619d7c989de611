"""Threads that are lent: parts of a range, and what goes wrong in them."""

from __future__ import annotations

import threading

import pytest

from castwise import torch_threads


@pytest.mark.parametrize(("length", "num_threads"), [(1, 3), (7, 1), (7, 3), (63, 2)])
def test_every_place_belongs_to_one_part(length: int, num_threads: int) -> None:
    """Parts neither overlap nor leave a place out, and there is none too many."""
    done: list[slice] = []
    torch_threads.in_parts(done.append, length, num_threads)
    places = sorted(i for part in done for i in range(part.start, part.stop))
    assert places == list(range(length))
    assert len(done) == min(length, num_threads)


def test_parts_run_at_once() -> None:
    """Each waits for the others: one after the other, they would wait for ever."""
    meet = threading.Barrier(3, timeout=30)
    torch_threads.in_parts(lambda _: meet.wait() and None, 3, 3)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_error_is_raised_when_all_have_ended(bad: int) -> None:
    """Whose part it was does not matter; nothing runs on behind the caller's back."""
    ended: list[int] = []

    def work(part: slice) -> None:
        if part.start == bad:
            raise ValueError(f"part {bad}")
        ended.append(part.start)

    with pytest.raises(ValueError, match=f"part {bad}"):
        torch_threads.in_parts(work, 3, 3)
    assert sorted([*ended, bad]) == [0, 1, 2]
