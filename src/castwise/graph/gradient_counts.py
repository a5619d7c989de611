"""Counts of gradients: a row for each value of a graph, counted when autograd comes by.

Of a large gradient a sample is counted: groups of eight neighbours, at a random place
of each of as many stretches as it takes (see `numerics.watch.samples`). Machine code
reads plain gradients on a CPU where they stand; a hook costs more than counting then.
Operators serve every other device and format, and count whole gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch

from castwise.numerics.watch.exponents import NUM_BINS, exponent_bins
from castwise.numerics.watch.samples import NEIGHBOURS, Counter, Places

if TYPE_CHECKING:
    from castwise.numerics.watch.machine_counter import MachineCounter


@final
class GradientCounts:
    """Exponents by row.

    Args:
        num_rows: One for each value whose gradient is counted.
        sample: How many numbers are counted of each gradient, in groups of eight; none
            counts all.
    """

    def __init__(self, num_rows: int, sample: int | None) -> None:
        self._sizes = [0] * num_rows
        self._num_rows = num_rows
        self._whole = sample is None
        self._stretches = max(1, (sample or 0) // NEIGHBOURS)
        self._elsewhere: dict[torch.device, tuple[Places, Counter]] = {}
        self._counts = torch.zeros((num_rows, NUM_BINS), dtype=torch.int64)
        self._machine = None if self._whole else self._machine_counter()

    def see(self, row: int, gradient: torch.Tensor) -> None:
        """Count a gradient in a row."""
        machine = self._machine
        if machine is not None and machine.fits(gradient):
            self._sizes[row] = machine.see(row, gradient)
            return
        self._sizes[row] = gradient.numel()
        if self._whole:
            bins = exponent_bins(gradient.detach().reshape(-1))
            self._counts[row] += torch.bincount(bins, minlength=NUM_BINS).cpu()
            return
        places, counter = self._on(gradient.device)
        counter.add(row, places.sample(gradient))

    def take(self) -> tuple[list[int], torch.Tensor]:
        """Return what was counted, and begin again with nothing.

        Returns:
            How many numbers the gradient of each row had, 0 where none came; and the
            counts, int64 [rows, bins].
        """
        if self._machine is not None:
            self._machine.count()
            self._counts += torch.from_numpy(self._machine.take()[0])
        for _, counter in self._elsewhere.values():
            counter.count()
            self._counts += counter.take().cpu()
        found = self._sizes, self._counts
        self._sizes, self._counts = [0] * self._num_rows, torch.zeros_like(self._counts)
        return found

    def _on(self, device: torch.device) -> tuple[Places, Counter]:
        """What samples and counts by operators, on a device."""
        if device not in self._elsewhere:
            places = Places(device, stretches=self._stretches)
            self._elsewhere[device] = places, Counter(self._num_rows, device)
        return self._elsewhere[device]

    def _machine_counter(self) -> MachineCounter:
        from castwise.numerics.watch.machine_counter import (  # noqa: PLC0415 -- imports numba
            MachineCounter,
        )

        machine = MachineCounter(self._num_rows, (), stretches=self._stretches)
        machine.renew(Places(torch.device("cpu"), stretches=self._stretches).draws)
        return machine
