"""Machine code as jobs: a table of chunks that any number of threads work off together.

A job is a row of integers. Each thread that is called with it takes the next chunks, a
piece of the table, until none is left; so one that other programs hold up does not hold
up the rest. What a chunk computes depends on no other chunk: the number of threads
changes no bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import cfunc, njit, types
from numba.np.numpy_support import carray

from castwise import torch_threads
from castwise.optim.addresses import count_up, pointer
from castwise.optim.machine import sweep
from castwise.optim.machine_checks import nonfinite, square_sums
from castwise.optim.machine_rows import NUM_COLUMNS

if TYPE_CHECKING:
    import numpy.typing as npt

_PIECES_A_THREAD = 8

(
    _TAKEN,
    _PIECES,
    _BACKWARDS,
    _TABLE,
    _CHUNKS,
    _RULE,
    _NUMBERS,
    _NUM_NUMBERS,
    _OUT,
    _LENGTH,
) = range(10)


@njit(nogil=True, cache=True, error_model="numpy")
def _take(job: Any) -> Any:
    """Return the next piece as the chunks from one to before another; 0, 0 at last."""
    pieces, chunks = job[_PIECES], job[_CHUNKS]
    piece = count_up(job, _TAKEN)
    if piece >= pieces:
        return 0, 0
    if job[_BACKWARDS]:
        piece = pieces - 1 - piece
    return piece * chunks // pieces, (piece + 1) * chunks // pieces


def _sweep(data: Any) -> None:
    """Sweep: the numbers of the update are fp32 [rows, 8]."""
    job = carray(data, (_LENGTH,), np.int64)
    table = carray(pointer(job[_TABLE]), (job[_CHUNKS], NUM_COLUMNS), np.int64)
    numbers = carray(pointer(job[_NUMBERS]), (job[_NUM_NUMBERS], 8), np.float32)
    start, stop = _take(job)
    while start < stop:
        sweep(job[_RULE], table[start:stop], numbers)
        start, stop = _take(job)


def _nonfinite(data: Any) -> None:
    """Check: what was found of each chunk is written as bool [chunks]."""
    job = carray(data, (_LENGTH,), np.int64)
    table = carray(pointer(job[_TABLE]), (job[_CHUNKS], NUM_COLUMNS), np.int64)
    out = carray(pointer(job[_OUT]), (job[_CHUNKS],), np.bool_)
    start, stop = _take(job)
    while start < stop:
        nonfinite(table[start:stop], out[start:stop])
        start, stop = _take(job)


def _square_sums(data: Any) -> None:
    """Sum squares: the one number is the factor; sums are fp64 [chunks], written."""
    job = carray(data, (_LENGTH,), np.int64)
    table = carray(pointer(job[_TABLE]), (job[_CHUNKS], NUM_COLUMNS), np.int64)
    out = carray(pointer(job[_OUT]), (job[_CHUNKS],), np.float64)
    factor = carray(pointer(job[_NUMBERS]), (1,), np.float32)[0]
    start, stop = _take(job)
    while start < stop:
        square_sums(table[start:stop], factor, out[start:stop])
        start, stop = _take(job)


def run_sweep(
    rule: int,
    table: npt.NDArray[np.int64],
    numbers: npt.NDArray[np.float32],
    num_threads: int,
) -> None:
    """Update every chunk of a table, first to last."""
    _run(_sweep, table, num_threads, rule=rule, numbers=numbers)


def run_nonfinite(
    table: npt.NDArray[np.int64], num_threads: int
) -> npt.NDArray[np.bool_]:
    """Return of each chunk whether its gradients hold an infinity or NaN."""
    out = np.zeros(len(table), np.bool_)
    _run(_nonfinite, table, num_threads, out=out)
    return out


def run_square_sums(
    table: npt.NDArray[np.int64], factor: float, num_threads: int
) -> npt.NDArray[np.float64]:
    """Return of each chunk the sum of the squares of its scaled gradients."""
    out = np.zeros(len(table))
    _run(
        _square_sums,
        table,
        num_threads,
        numbers=np.array([factor], np.float32),
        out=out,
    )
    return out


def _run(
    work: Callable[[Any], None],
    table: npt.NDArray[np.int64],
    num_threads: int,
    *,
    rule: int = 0,
    numbers: npt.NDArray[np.float32] | None = None,
    out: npt.NDArray[Any] | None = None,
) -> None:
    """Work a table off; what writes `out` only reads, and goes from last to first."""
    assert table.flags.c_contiguous, "a job reads its table by address"
    job = np.zeros(_LENGTH, np.int64)
    job[_PIECES] = min(_PIECES_A_THREAD * num_threads, len(table))
    job[_BACKWARDS] = out is not None
    job[_TABLE], job[_CHUNKS], job[_RULE] = table.ctypes.data, len(table), rule
    if numbers is not None:
        job[_NUMBERS], job[_NUM_NUMBERS] = numbers.ctypes.data, len(numbers)
    if out is not None:
        job[_OUT] = out.ctypes.data
    torch_threads.run(_compiled(work).address, job.ctypes.data, num_threads)


@functools.cache
def _compiled(work: Callable[[Any], None]) -> Any:
    """Return work as a C function, compiled when it is first wanted."""
    compile_it = cfunc(types.void(types.voidptr), cache=True, error_model="numpy")
    return compile_it(work)
