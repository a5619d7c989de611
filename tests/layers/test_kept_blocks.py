"""Memory that is kept: never the same bytes twice at once, and not without end."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from castwise.layers import kept_blocks


@pytest.fixture(autouse=True)
def _few_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a thread keep a thousand bytes, and nothing of this test for the next."""
    kept_blocks.release()
    monkeypatch.setattr(kept_blocks, "MOST", 1000)
    monkeypatch.setattr(kept_blocks, "_kept", kept_blocks._Kept())
    yield
    kept_blocks.release()


def address(num_bytes: int) -> int:
    """Where a block is that is given back at once."""
    return int(kept_blocks.block(num_bytes).ctypes.data)


def test_a_block_that_is_given_back_comes_again() -> None:
    """It begins on a line, and other sizes do not get it."""
    first = address(300)
    assert first % 64 == 0
    assert address(300) == first
    assert address(301) != first


def test_a_block_in_use_is_nobody_elses() -> None:
    """A tensor, a view of it, an array made of that: each holds its memory."""
    tensor = torch.from_numpy(kept_blocks.block(300)).view(3, 100)
    where = tensor.data_ptr()
    view = tensor[1:]
    assert address(300) != where
    del tensor
    assert address(300) != where
    array = view.numpy()
    del view
    assert address(300) != where
    del array
    assert address(300) == where  # the oldest free one


def test_no_more_is_kept_than_may_be() -> None:
    """The oldest free block goes first; what is in use is never dropped."""
    used = kept_blocks.block(300)
    address(400)
    address(500)  # too much besides the others: the free one goes
    kept = kept_blocks._kept.blocks
    assert [block.nbytes for block in kept] == [364, 564]
    too_large = kept_blocks.block(900)
    assert too_large.nbytes == 900
    assert [block.nbytes for block in kept] == [364]
    kept_blocks.release()
    assert [block.nbytes for block in kept] == [364]
    del used
    kept_blocks.release()
    assert not kept


def test_threads_keep_their_own() -> None:
    """What one gave back, another does not get: it may still be on its way."""
    mine = address(300)
    theirs: list[int] = []
    worker = threading.Thread(target=lambda: theirs.append(address(300)))
    worker.start()
    worker.join()
    assert theirs != [mine]
