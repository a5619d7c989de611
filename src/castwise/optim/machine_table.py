"""Lays parameters out as a table of addresses, and runs machine code over it.

A chunk is 256 Ki elements of one parameter. Chunks are shared out among as many threads
as torch uses (`machine_jobs`). Sums are added up in the order of the chunks, so that
the number of threads changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from castwise.optim import machine_codes, machine_jobs
from castwise.optim import machine_rows as rows
from castwise.optim.states import BLOCK
from castwise.optim.swept import Sweeper, Swept

if TYPE_CHECKING:
    import numpy.typing as npt

CHUNK = 1024 * BLOCK
_WORTH_THREADS = 4 * CHUNK  # below it, sharing costs more than it saves

_RULES = {"adamw_": rows.ADAMW, "sgd_": rows.SGD, "lion_": rows.LION}
_FORMATS = {
    torch.float32: rows.FP32,
    torch.bfloat16: rows.BF16,
    torch.float16: rows.FP16,
}
_CODES = {
    "signed_quadratic": rows.SIGNED_QUADRATIC,
    "quartic": rows.QUARTIC,
}


class MachineSweeper(Sweeper):
    """Sweeps with machine code, over a table that is laid out once for each step."""

    def __init__(self, swept: list[Swept]) -> None:
        super().__init__(swept)
        self._table, self._owners = _chunks([_row(each) for each in swept])

    def nonfinite(self) -> list[bool]:
        """Return of each gradient whether it holds an infinity or NaN."""
        found = machine_jobs.run_nonfinite(self._table, _num_threads(self._table))
        counts = np.bincount(self._owners, found, minlength=len(self.swept))
        return [bool(count) for count in counts]

    def square_sums(self, factor: float) -> list[float]:
        """Return the sum of the squares of each gradient times a factor, in fp64."""
        return _square_sums(self._table, self._owners, len(self.swept), factor)

    def run(self, update: Callable[..., None]) -> None:
        """Sweep with the machine code that equals the update bit by bit."""
        rule = _RULES[update.__name__]
        places: dict[tuple[float, ...], int] = {}
        used = [places.setdefault(each.numbers, len(places)) for each in self.swept]
        numbers = np.array(list(places), np.float32)
        self._table[:, rows.NUMBERS] = np.array(used, np.int64)[self._owners]
        machine_jobs.run_sweep(rule, self._table, numbers, _num_threads(self._table))


def norms(tensors: Sequence[torch.Tensor]) -> list[float]:
    """Return the 2-norm of each tensor, fp32, bf16 or fp16, contiguous on the CPU."""
    firsts = []
    for each in tensors:
        row = [0] * rows.NUM_COLUMNS
        row[rows.COUNT], row[rows.GRADIENT] = each.numel(), each.data_ptr()
        row[rows.GRADIENT_FORMAT] = _FORMATS[each.dtype]
        firsts.append(row)
    table, owners = _chunks(firsts)
    return [math.sqrt(x) for x in _square_sums(table, owners, len(firsts), 1.0)]


def join(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Do what `pieces.join_16` does, for contiguous tensors on the CPU."""
    full = torch.empty_like(high, dtype=torch.float32)
    addresses = high.data_ptr(), low.data_ptr(), full.data_ptr()
    machine_codes.join(*addresses, full.numel())
    return full


def split(full: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> None:
    """Do what `pieces.split_16` does, for contiguous tensors on the CPU."""
    addresses = high.data_ptr(), low.data_ptr(), full.data_ptr()
    machine_codes.split(*addresses, full.numel())


def _square_sums(
    table: npt.NDArray[np.int64],
    owners: npt.NDArray[np.int64],
    num_owners: int,
    factor: float,
) -> list[float]:
    """Return the sum of the squares of each owner's gradients times a factor."""
    sums = machine_jobs.run_square_sums(table, factor, _num_threads(table))
    with np.errstate(invalid="ignore"):  # inf - inf is a NaN that is looked for
        totals = np.bincount(owners, sums, minlength=num_owners)
    return [float(total) for total in totals]


def _chunks(
    whole: list[list[int]],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return a row for each chunk of whole parameters, and the place of its own."""
    firsts = np.array(whole, np.int64)
    count = firsts[:, rows.COUNT]
    num_chunks = -(-count // CHUNK)
    owners = np.repeat(np.arange(len(whole)), num_chunks)
    first = np.repeat(np.cumsum(num_chunks) - num_chunks, num_chunks)
    starts = (np.arange(len(owners)) - first) * CHUNK
    table = firsts[owners]
    table[:, rows.COUNT] = np.minimum(CHUNK, count[owners] - starts)
    for fmt, address, scales in (
        (rows.GRADIENT_FORMAT, rows.GRADIENT, None),
        (rows.WEIGHT_FORMAT, rows.WEIGHT, None),
        (rows.FIRST_FORMAT, rows.FIRST, rows.FIRST_SCALES),
        (rows.SECOND_FORMAT, rows.SECOND, rows.SECOND_SCALES),
    ):
        table[:, address] += starts * _WIDTHS[table[:, fmt]]
        if scales is not None:
            table[:, scales] += starts // BLOCK * 4
    table[:, rows.REMAINDER] += starts * 2
    return table, owners


_WIDTHS = np.zeros(7, np.int64)
_WIDTHS[[rows.FP32, rows.BF16, rows.FP16, rows.SPLIT]] = 4, 2, 2, 2
_WIDTHS[[rows.SIGNED_QUADRATIC, rows.QUARTIC, rows.ABSENT]] = 1, 1, 0


def _row(each: Swept) -> list[int]:
    """Return the first chunk's row of a parameter, with the count of all."""
    row = [0] * rows.NUM_COLUMNS
    row[rows.COUNT] = each.weight.numel()
    row[rows.GRADIENT_FORMAT] = _FORMATS[each.gradient.dtype]
    row[rows.GRADIENT] = each.gradient.data_ptr()
    row[rows.WEIGHT] = each.weight.data_ptr()
    if each.remainder is not None:
        row[rows.WEIGHT_FORMAT] = rows.SPLIT
        row[rows.REMAINDER] = each.remainder.data_ptr()
    row[rows.FIRST_FORMAT] = row[rows.SECOND_FORMAT] = rows.ABSENT
    columns = (
        (rows.FIRST_FORMAT, rows.FIRST, rows.FIRST_SCALES),
        (rows.SECOND_FORMAT, rows.SECOND, rows.SECOND_SCALES),
    )
    for place, (fmt, address, scales) in enumerate(columns[: len(each.states)]):
        scale = each.scales[place]
        row[fmt] = rows.FP32 if scale is None else _CODES[each.codes[place]]
        row[address] = each.states[place].data_ptr()
        row[scales] = 0 if scale is None else scale.data_ptr()
    return row


def _num_threads(table: npt.NDArray[np.int64]) -> int:
    """Return in how many threads to work a table off: as torch does, or in one."""
    total = int(table[:, rows.COUNT].sum())
    return torch.get_num_threads() if total >= _WORTH_THREADS else 1
