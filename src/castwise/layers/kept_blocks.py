"""Memory of large results, kept for the next result of the same size.

The system hands out pages that it zeroes first, and glibc gives large blocks back to
it: always above 32 MiB, often from 128 KiB on. For a result that is written at the
speed of memory new pages cost half as much again, and several times as much where they
are small ones, hence NumPy, which asks for huge ones from 4 MiB on.

Blocks stay with the thread that took them. One is free as soon as nobody but this room
refers to it, whatever tensors, views and arrays stood on it: reference counts say so.
"""

from __future__ import annotations

import sys
import threading

import numpy as np
from numpy.typing import NDArray

LARGE = 1 << 20  # bytes from which a block is worth keeping
HUGE = 1 << 22  # bytes from which NumPy asks for huge pages
MOST = 1 << 28  # bytes that a thread keeps, in use or not
LINE = 64

Bytes = NDArray[np.uint8]


class _Kept(threading.local):
    """The blocks of a thread, the oldest first."""

    def __init__(self) -> None:
        self.blocks: list[Bytes] = []


_kept = _Kept()


def block(num_bytes: int) -> Bytes:
    """Return memory that nobody uses, where a line of a cache begins; not zeroed."""
    blocks, needed = _kept.blocks, num_bytes + LINE
    raw = None
    for i in range(len(blocks)):
        if blocks[i].nbytes == needed and _is_free(blocks, i):
            raw = blocks[i]
            break
    if raw is None:
        _make_room(blocks, needed)
        raw = np.empty(needed, dtype=np.uint8)
        if sum(each.nbytes for each in blocks) + needed <= MOST:
            blocks.append(raw)
    start = -raw.ctypes.data % LINE
    return raw[start : start + num_bytes]


def release() -> None:
    """Give back what this thread keeps and nobody uses."""
    _make_room(_kept.blocks, MOST)


def _make_room(blocks: list[Bytes], num_bytes: int) -> None:
    """Drop free blocks, the oldest first, until so many bytes may be kept besides."""
    i = 0
    while i < len(blocks) and sum(each.nbytes for each in blocks) + num_bytes > MOST:
        if _is_free(blocks, i):
            del blocks[i]
        else:
            i += 1


def _num_references(blocks: list[Bytes], i: int) -> int:
    return sys.getrefcount(blocks[i])


_ALONE = _num_references([np.empty(0, np.uint8)], 0)


def _is_free(blocks: list[Bytes], i: int) -> bool:
    return _num_references(blocks, i) == _ALONE
