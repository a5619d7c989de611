"""The threads of torch, lent to machine code: several call the same function at once.

Torch computes on a CPU in the threads of an OpenMP library. When an operator ends they
do not sleep: they spin for some milliseconds (3.7 measured, libgomp) and wait for the
next. Threads of our own, woken meanwhile, would share the cores with them; that cost a
tenth of an optimizer's step, which always comes right after a backward. So the work is
given to the very threads that wait, by the call that compilers make of `#pragma omp
parallel`. Where torch uses no such library, and in a forked child, to which OpenMP
threads do not come along, a pool of Python's threads does the work.

Work that begins in Python goes to that pool at once: `in_parts`.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

_STARTED_IN = os.getpid()


def run(work: int, data: int, num_threads: int) -> None:
    """Call `work(data)` in `num_threads` threads at once, of which this is one.

    Args:
        work: Address of a C function void (void *) that takes its share of the work
            until none is left: how many threads really call it is not promised.
        data: Address of what it works on.
        num_threads: How many shall call it.
    """
    call = _callable(work)
    if num_threads == 1:
        call(data)
        return
    parallel = openmp() if os.getpid() == _STARTED_IN else None
    if parallel is not None:
        parallel(work, data, num_threads, 0)
        return
    pool = _pool(os.getpid(), num_threads - 1)
    others = [pool.submit(call, data) for _ in range(num_threads - 1)]
    call(data)
    for each in others:
        if not each.cancel():  # what has not begun finds nothing left to do
            each.result()


def in_parts(work: Callable[[slice], None], length: int, num_threads: int) -> None:
    """Call `work` on parts of a range, at once; this thread does the first one.

    An error is raised when all have ended, and the first one by the order of parts.

    Args:
        work: Python that leaves the interpreter's lock to others while it computes.
        length: Of the range.
        num_threads: How many parts; no more than the range is long.
    """
    num_parts = max(min(num_threads, length), 1)
    edges = [length * i // num_parts for i in range(num_parts + 1)]
    first, *rest = (slice(*edge) for edge in itertools.pairwise(edges))
    if not rest:
        work(first)
        return
    pool = _pool(os.getpid(), len(rest))
    others = [pool.submit(work, part) for part in rest]
    try:
        work(first)
    finally:
        wait(others)
    for each in others:
        each.result()


@functools.cache
def openmp() -> Callable[..., None] | None:
    """Return `GOMP_parallel` of the library that torch itself is linked to, if any."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # A symbol is looked for in a library and in those that it needs.
        parallel: Any = ctypes.CDLL(str(path)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.restype = None
    parallel.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    found: Callable[..., None] = parallel
    return found


@functools.cache
def _callable(work: int) -> Callable[[int], None]:
    """Return a C function to be called from Python, without Python's lock."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)


@functools.cache
def _pool(pid: int, num_threads: int) -> ThreadPoolExecutor:
    """Return the threads of this process; a fork inherits none, hence the pid."""
    del pid
    return ThreadPoolExecutor(num_threads, thread_name_prefix="castwise")
