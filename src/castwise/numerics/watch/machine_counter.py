"""What is counted by machine code: plain tensors on the CPU, read where they stand.

Everything else (another device, fp64, a view with holes) is counted by operators, in
`samples`. Rows and columns of what is counted are the same, so that both are added up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray

from castwise.numerics.half_table import halves
from castwise.numerics.watch import counting_kernel as kernel
from castwise.numerics.watch.exponents import NUM_BINS
from castwise.numerics.watch.samples import NEIGHBOURS, STRETCHES, half_ulps

_FORMATS = {
    torch.float32: kernel.FP32,
    torch.bfloat16: kernel.BF16,
    torch.float16: kernel.FP16,
}
_PLAIN = (torch.Tensor, torch.nn.Parameter)


@final
class MachineCounter:
    """Counts exponents by row, and updates that weights did not take.

    Args:
        num_rows: One for each tensor that is watched.
        formats: For which it is counted what updates they would lose.
        stretches: Of how many a sample consists, of eight neighbours each.
    """

    def __init__(
        self, num_rows: int, formats: tuple[str, ...], *, stretches: int = STRETCHES
    ) -> None:
        self._formats = formats
        self._counts = np.zeros((num_rows, NUM_BINS), np.int64)
        self._of_step = np.zeros_like(self._counts)
        self._lost = np.zeros((2 + len(formats), num_rows), np.int64)
        self._sample = stretches * NEIGHBOURS
        self._scratch = np.zeros(self._sample, np.int32)
        self._halves = halves()
        self._draws: NDArray[np.float64] = np.zeros(0)
        self._weights: list[tuple[str, torch.dtype, int]] = []
        self._table = np.zeros((0, kernel.NUM_COLUMNS), np.int64)
        self._old = self._gradients = np.zeros(0, np.int32)
        self._arrays: tuple[int, ...] = ()

    def renew(self, draws: torch.Tensor) -> None:
        """Look at other places from here on: [stretches] in [0, 1)."""
        self._draws = draws.numpy()
        arrays = self._draws, self._halves, self._scratch, self._of_step
        addresses = (array.ctypes.data for array in arrays)
        self._arrays = (*addresses, len(self._draws), NEIGHBOURS, NUM_BINS)

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether such a tensor can be read: plain, and one block of memory."""
        return (
            type(tensor) in _PLAIN
            and tensor.dtype in _FORMATS
            and tensor.is_cpu
            and (tensor.is_contiguous() or _is_one_block(tensor))
        )

    def fit(self, weight: torch.Tensor, gradient: torch.Tensor) -> bool:
        """Whether a weight and its gradient can be read side by side."""
        return (
            self.fits(weight)
            and self.fits(gradient)
            and weight.stride() == gradient.stride()
        )

    def see(self, row: int, tensor: torch.Tensor) -> int:
        """Count a tensor that `fits` in a row; return how many numbers it has."""
        size = tensor.numel()
        kernel.count_tensor(
            tensor.data_ptr(),
            _FORMATS[tensor.dtype],
            size,
            *self._arrays,
            row,
        )
        return size

    def see_weights(
        self, weights: Sequence[tuple[str, int, torch.Tensor, int, torch.Tensor]]
    ) -> None:
        """Count weights and their gradients, and remember both until the update.

        Args:
            weights: Names; row and tensor of the weight, row and tensor of the
                gradient. Each pair must `fit`.
        """
        if not weights:
            return
        sizes = np.array([weight.numel() for _, _, weight, _, _ in weights], np.int64)
        taken = np.minimum(sizes, self._sample)
        self._weights = [(name, w.dtype, w.numel()) for name, _, w, _, _ in weights]
        rows = [
            (
                row,
                _FORMATS[weight.dtype],
                weight.data_ptr(),
                gradient_row,
                _FORMATS[gradient.dtype],
                gradient.data_ptr(),
            )
            for _, row, weight, gradient_row, gradient in weights
        ]
        self._table = np.empty((len(rows), kernel.NUM_COLUMNS), np.int64)
        self._table[:, kernel.WEIGHT_ROW :] = rows
        self._table[:, kernel.SIZE] = sizes
        self._table[:, kernel.PLACE] = np.cumsum(taken) - taken
        if len(self._old) != taken.sum():
            self._old = np.zeros(taken.sum(), np.int32)
            self._gradients = np.zeros_like(self._old)
        kernel.count_weights(
            self._table,
            self._draws,
            NEIGHBOURS,
            self._halves,
            self._old,
            self._gradients,
            self._of_step,
        )

    def see_updates(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Compare with the weights after the update; those that are gone are not."""
        kept = []
        for at, (name, dtype, size) in enumerate(self._weights):
            weight = weights.get(name)
            if weight is None or (weight.dtype, weight.numel()) != (dtype, size):
                continue
            self._table[at, kernel.WEIGHT] = weight.data_ptr()
            kept.append(at)
        if not kept:
            return
        kernel.count_lost(
            self._table[kept],
            self._draws,
            NEIGHBOURS,
            self._halves,
            self._scratch,
            self._old,
            self._gradients,
            *half_ulps(self._formats),
            self._lost,
        )

    def count(self) -> None:
        """The step is over: keep what was counted in it."""
        self._counts += self._of_step
        self.forget()

    def forget(self) -> None:
        """Drop what was counted since the last step that was over."""
        self._of_step.fill(0)
        self._weights.clear()

    def take(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return counts [rows, bins] and updates [columns, rows]; begin with none."""
        found = self._counts.copy(), self._lost.copy()
        self._counts.fill(0)
        self._lost.fill(0)
        return found


def _is_one_block(tensor: torch.Tensor) -> bool:
    """Whether a tensor fills its memory, in whatever order of its dimensions."""
    size = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length != 1:
            if stride != size:
                return False
            size *= length
    return True
