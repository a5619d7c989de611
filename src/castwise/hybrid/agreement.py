"""One decision on every process: what single processes saw, summed over all of them.

Under DDP every process has a batch of its own, and so losses of its own. Weights stay
equal only if all processes jump, refuse and raise alarms together, so whatever decides
goes round once: a few fp64 numbers, one small all-reduce.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


class Agreement(ABC):
    """The seam between a run and other processes of the same run."""

    @abstractmethod
    def sums(self, values: Sequence[float]) -> list[float]:
        """Return each number summed over all processes, with equal bits everywhere."""

    def mean(self, value: float) -> float:
        """Return the mean of a number over all processes."""
        total, num = self.sums([value, 1.0])
        return total / num


@final
class Alone(Agreement):
    """One process: it agrees with itself."""

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the numbers."""
        return list(values)

    def mean(self, value: float) -> float:
        """Return the number, bit by bit."""
        return value


@final
class OverProcesses(Agreement):
    """The processes of a group.

    Args:
        group: Of `torch.distributed`.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        nccl = distributed.get_backend(group) == "nccl"
        self._device = torch.device("cuda" if nccl else "cpu")

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return each number summed over the group."""
        told = torch.tensor(list(values), dtype=torch.float64, device=self._device)
        distributed.all_reduce(told, distributed.ReduceOp.SUM, group=self._group)
        return [float(each) for each in told.cpu()]


def agreement_of(model: nn.Module) -> Agreement:
    """Return whom a model's run has to agree with: the group of DDP, or nobody."""
    if isinstance(model, DistributedDataParallel):
        return OverProcesses(model.process_group)
    return Alone()
