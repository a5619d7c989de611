"""Lays parameters out as a table of addresses, and runs machine code over it.

A chunk is 64 Ki elements of one parameter. Chunks are shared out among as many threads
as torch uses; the code holds no lock of Python. What a chunk computes depends on no
other chunk, and sums are added up in the order of the chunks: the number of threads
changes no bit.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from castwise.optim import machine
from castwise.optim.states import BLOCK
from castwise.optim.swept import Swept

if TYPE_CHECKING:
    import numpy.typing as npt

CHUNK = 256 * BLOCK
_WORTH_A_THREAD = 16 * CHUNK  # below it, waking a thread costs more than it saves

_RULES = {"adamw": machine.ADAMW, "sgd": machine.SGD, "lion": machine.LION}
_FORMATS = {
    torch.float32: machine.FP32,
    torch.bfloat16: machine.BF16,
    torch.float16: machine.FP16,
}
_CODES = {
    "signed_quadratic": machine.SIGNED_QUADRATIC,
    "quartic": machine.QUARTIC,
}


def run_machine(rule: str, swept: list[Swept]) -> None:
    """Sweep over parameters on the CPU."""
    rows = {each.numbers: None for each in swept}
    places = {numbers: place for place, numbers in enumerate(rows)}
    table, _ = _table(swept, places)
    numbers = np.array(list(rows), np.float32)
    _in_threads(
        lambda start, stop: machine.sweep(_RULES[rule], table[start:stop], numbers),
        table,
    )


def square_sums(swept: list[Swept], factor: float) -> list[float]:
    """Return the sum of the squares of each scaled gradient, in fp64."""
    table, owners = _table(swept, {(): 0})
    sums = np.zeros(len(table))
    scaled = np.float32(factor)
    _in_threads(
        lambda start, stop: machine.square_sums(
            table[start:stop], scaled, sums[start:stop]
        ),
        table,
    )
    with np.errstate(invalid="ignore"):  # inf - inf is a NaN that is looked for
        totals = np.bincount(owners, sums, minlength=len(swept))
    return [float(total) for total in totals]


def nonfinite(swept: list[Swept]) -> list[bool]:
    """Return of each gradient whether it holds an infinity or NaN."""
    table, owners = _table(swept, {(): 0})
    found = np.zeros(len(table), np.bool_)
    _in_threads(
        lambda start, stop: machine.nonfinite(table[start:stop], found[start:stop]),
        table,
    )
    counts = np.bincount(owners, found, minlength=len(swept))
    return [bool(count) for count in counts]


def join(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Do what `pieces.join_16` does, for contiguous tensors on the CPU."""
    full = torch.empty_like(high, dtype=torch.float32)
    addresses = high.data_ptr(), low.data_ptr(), full.data_ptr()
    machine.join(*addresses, full.numel())
    return full


def split(full: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> None:
    """Do what `pieces.split_16` does, for contiguous tensors on the CPU."""
    addresses = high.data_ptr(), low.data_ptr(), full.data_ptr()
    machine.split(*addresses, full.numel())


def _table(
    swept: list[Swept], places: dict[tuple[float, ...], int]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return a row for each chunk, and the place of its parameter."""
    if not swept:
        return np.zeros((0, machine.NUM_COLUMNS), np.int64), np.zeros(0, np.int64)
    rows = np.array([_row(each, places) for each in swept], np.int64)
    count = rows[:, machine.COUNT]
    num_chunks = -(-count // CHUNK)
    owners = np.repeat(np.arange(len(swept)), num_chunks)
    first = np.repeat(np.cumsum(num_chunks) - num_chunks, num_chunks)
    starts = (np.arange(len(owners)) - first) * CHUNK
    table = rows[owners]
    table[:, machine.COUNT] = np.minimum(CHUNK, count[owners] - starts)
    for fmt, address, scales in (
        (machine.GRADIENT_FORMAT, machine.GRADIENT, None),
        (machine.WEIGHT_FORMAT, machine.WEIGHT, None),
        (machine.FIRST_FORMAT, machine.FIRST, machine.FIRST_SCALES),
        (machine.SECOND_FORMAT, machine.SECOND, machine.SECOND_SCALES),
    ):
        table[:, address] += starts * _WIDTHS[table[:, fmt]]
        if scales is not None:
            table[:, scales] += starts // BLOCK * 4
    table[:, machine.REMAINDER] += starts * 2
    return table, owners


_WIDTHS = np.zeros(7, np.int64)
_WIDTHS[[machine.FP32, machine.BF16, machine.FP16, machine.SPLIT]] = 4, 2, 2, 2
_WIDTHS[[machine.SIGNED_QUADRATIC, machine.QUARTIC, machine.ABSENT]] = 1, 1, 0


def _row(each: Swept, places: dict[tuple[float, ...], int]) -> list[int]:
    """Return the first chunk's row of a parameter, with the count of all."""
    row = [0] * machine.NUM_COLUMNS
    row[machine.COUNT] = each.weight.numel()
    row[machine.GRADIENT_FORMAT] = _FORMATS[each.gradient.dtype]
    row[machine.GRADIENT] = each.gradient.data_ptr()
    row[machine.WEIGHT] = each.weight.data_ptr()
    if each.remainder is not None:
        row[machine.WEIGHT_FORMAT] = machine.SPLIT
        row[machine.REMAINDER] = each.remainder.data_ptr()
    row[machine.FIRST_FORMAT] = row[machine.SECOND_FORMAT] = machine.ABSENT
    columns = (
        (machine.FIRST_FORMAT, machine.FIRST, machine.FIRST_SCALES),
        (machine.SECOND_FORMAT, machine.SECOND, machine.SECOND_SCALES),
    )
    for place, (fmt, address, scales) in enumerate(columns[: len(each.states)]):
        scale = each.scales[place]
        row[fmt] = machine.FP32 if scale is None else _CODES[each.codes[place]]
        row[address] = each.states[place].data_ptr()
        row[scales] = 0 if scale is None else scale.data_ptr()
    row[machine.NUMBERS] = places.get(each.numbers, 0)
    return row


def _in_threads(work: Callable[[int, int], Any], table: npt.NDArray[np.int64]) -> None:
    """Run `work(start, stop)` over all rows, in threads where that pays."""
    total = int(table[:, machine.COUNT].sum())
    num_threads = min(torch.get_num_threads(), 1 + total // _WORTH_A_THREAD)
    if num_threads <= 1:
        work(0, len(table))
        return
    edges = np.linspace(0, len(table), num_threads + 1).astype(int).tolist()
    pool = _pool(os.getpid(), num_threads)
    done = [pool.submit(work, start, stop) for start, stop in itertools.pairwise(edges)]
    for each in done:
        each.result()


@functools.cache
def _pool(pid: int, num_threads: int) -> ThreadPoolExecutor:
    """Return the threads of this process; a fork inherits none, hence the pid."""
    del pid
    return ThreadPoolExecutor(num_threads, thread_name_prefix="castwise-sweep")
