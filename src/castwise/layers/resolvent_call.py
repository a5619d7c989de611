"""Calls of the resolvent's machine code, made ready for batches of one shape.

What a batch shares with the one before it stands in a table already: a short chain is
walked in less time than it takes to say in Python what it is. Tables and scratch belong
to the thread that calls, which lends them to the threads that help it.
"""

from __future__ import annotations

import threading
from array import array
from typing import Any

import numpy as np

from castwise import torch_threads
from castwise.layers import resolvent_kernel as kernel
from castwise.layers.lanes import WIDTH
from castwise.layers.resolvent_arms import HEAD
from castwise.layers.resolvent_task import (
    AT_BOND,
    AT_BROKEN,
    AT_D,
    AT_GRAD,
    AT_K,
    AT_MEMORY,
    AT_OUT,
    AT_PAST,
    AT_POINT,
    AT_TAKEN,
    AT_THREADS,
    AT_Z,
    AT_Z_STRIDE,
    Kind,
    Task,
)

MOST_CALLS = 64  # shapes that a thread keeps a table for


class Call:
    """Machine code and its table."""

    def __init__(
        self,
        kind: Kind,
        num_rows: int,
        num_sites: int,
        causal: bool,
        num_threads: int,
    ) -> None:
        fields = (4 if kind.grad else 2) + (not kind.shared)
        tile, held = _tiling(num_sites, fields, joined=not causal)
        size = 8 if kind.wide_io else 4
        self.bad = np.empty(num_rows, np.int64)
        self._work = kernel.machine_code(kind).address
        self._num_threads = num_threads
        self._num_bytes = num_threads * held
        blank = Task(*[0] * len(Task._fields))._replace(
            k_stride=0 if kind.shared else (num_sites - 1) * size,
            num_rows=num_rows,
            num_sites=num_sites,
            tile=tile,
            side=not causal,
            held=held,
            bad=self.bad.ctypes.data,
        )
        self._table = array("q", blank)
        self._address, _ = self._table.buffer_info()

    def __call__(
        self,
        d: int,
        k: int,
        z: int,
        z_stride: int,
        past: bool,
        out: int,
        grad: int,
        bond: int,
        point: int,
    ) -> bool:
        """Run on these addresses; return whether a row broke: `bad` says which."""
        table = self._table
        table[AT_TAKEN] = table[AT_THREADS] = table[AT_BROKEN] = 0
        table[AT_D], table[AT_K], table[AT_Z], table[AT_Z_STRIDE] = d, k, z, z_stride
        table[AT_PAST], table[AT_MEMORY] = past, _scratch(self._num_bytes)
        table[AT_OUT], table[AT_GRAD] = out, grad
        table[AT_BOND], table[AT_POINT] = bond, point
        torch_threads.run(self._work, self._address, self._num_threads)
        return table[AT_BROKEN] != 0


class _OfThread(threading.local):
    """What a thread that calls keeps from call to call."""

    def __init__(self) -> None:
        self.calls: dict[tuple[object, ...], Call] = {}
        self.num_bytes = 0
        self.address = 0
        self.memory: Any = None


_of_thread = _OfThread()


def call_for(
    kind: tuple[bool, bool, bool, bool, bool], shape: tuple[int, int, bool, int]
) -> Call:
    """Return what runs batches of this kind and shape in this thread.

    Args:
        kind: The fields of a `Kind`.
        shape: Rows, sites, whether nothing comes from the right, and threads.
    """
    calls = _of_thread.calls
    key = kind, shape, kernel.WHOLE, kernel.TILE
    found = calls.get(key)
    if found is None:
        if len(calls) >= MOST_CALLS:
            calls.clear()
        found = calls[key] = Call(Kind(*kind), *shape)
    return found


def _tiling(length: int, fields: int, *, joined: bool) -> tuple[int, int]:
    """Return the tile, and the bytes of scratch that a thread needs.

    Two arms that meet have half a chain each.
    """
    steps, record = length // 2 if joined else length, fields * WIDTH
    tile = max(steps, 1) if 2 * steps * record <= kernel.WHOLE else kernel.TILE
    held = 3 * (HEAD + (tile + kernel.SPARE) * record)
    return tile, held + (steps // tile + 1) * 8 * WIDTH


def _scratch(num_bytes: int) -> int:
    """Return the address of memory in which nothing outlives a call.

    One for each thread that calls: mapping its pages anew would cost as much as a short
    chain.
    """
    mine = _of_thread
    if mine.num_bytes < num_bytes:
        mine.memory = np.empty(num_bytes + WIDTH, dtype=np.uint8)
        mine.address = (mine.memory.ctypes.data + WIDTH - 1) // WIDTH * WIDTH
        mine.num_bytes = num_bytes
    return mine.address
