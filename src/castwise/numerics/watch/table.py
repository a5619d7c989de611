"""The table of a watch: one row for each tensor, the same rows on all ranks.

Rows are fixed at the first look, so that counts can be added up over processes whatever
each of them has seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import distributed, nn

from castwise.numerics.operator_call import format_name
from castwise.numerics.watch.exponents import ExponentHistogram
from castwise.numerics.watch.samples import Counter, LostUpdates, Places
from castwise.numerics.watch.windows import TensorKind, TensorWatch

_WHAT_IF_WEIGHTS = ("bf16", "fp16")


@final
class WatchTable:
    """The rows that are counted, and what was counted in them.

    Args:
        model: Its modules without children hand out what is watched.
        weights: What is trained, by name.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        device = next((w.device for w in weights.values()), torch.device("cpu"))
        self.modules = _with_outputs(model)
        keys: list[tuple[TensorKind, str]] = []
        for name, weight in weights.items():
            if weight.is_floating_point():
                keys += [("weight", name), ("gradient", name)]
        for fqn, _ in self.modules:
            keys += [("output", fqn), ("output_gradient", fqn)]
        self._rows = {key: row for row, key in enumerate(keys)}
        self._seen: dict[tuple[TensorKind, str], tuple[str, int]] = {}
        self.places = Places(device)
        self.counter = Counter(len(keys), device)
        self.lost = LostUpdates(len(keys), _WHAT_IF_WEIGHTS, device)
        self._device = device

    def row(self, kind: TensorKind, name: str) -> int:
        """Where a tensor is counted."""
        return self._rows[kind, name]

    def see(
        self, kind: TensorKind, name: str, tensor: torch.Tensor
    ) -> torch.Tensor | None:
        """Remember a sample of a tensor until the step is over, and return it."""
        key = (kind, name)
        local = _local(tensor)
        if key not in self._rows or local.device != self._device or not local.numel():
            return None
        sample = self.places.sample(local)
        self.counter.add(self._rows[key], sample)
        self._seen[key] = format_name(tensor.dtype), tensor.numel()
        return sample

    def close(self, scale: float, *, is_held: bool) -> tuple[TensorWatch, ...]:
        """Add up over ranks and make records of what was counted."""
        counts, lost = self.counter.take(), self.lost.take()
        if num_ranks() > 1:
            distributed.all_reduce(counts)
            distributed.all_reduce(lost)
        histograms, shares = ExponentHistogram.from_bins(counts.cpu()), lost.T.tolist()
        shift = -math.floor(math.log2(scale))
        found = []
        for (kind, name), row in self._rows.items():
            fmt, size = self._seen.get((kind, name), ("fp32", 0))
            histogram = histograms[row]
            if not histogram.total:
                continue
            if kind in {"gradient", "output_gradient"} and scale != 1:
                histogram = histogram.shifted(shift)
            kept = kind != "weight" or is_held
            found.append(
                TensorWatch(
                    kind=kind,
                    name=name,
                    format=fmt,
                    num_elements=size,
                    histogram=histogram,
                    lost=None if kept else _lost(fmt, shares[row]),
                )
            )
        return tuple(found)


def _with_outputs(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules without children, and the model itself: what hands out tensors."""
    return [
        (fqn, module)
        for fqn, module in model.named_modules()
        if not fqn or not any(True for _ in module.children())
    ]


def _lost(fmt: str, counts: list[int]) -> dict[str, float]:
    updates, lost, *others = counts
    total = max(1, updates)
    what_if = zip(_WHAT_IF_WEIGHTS, others, strict=True)
    return {name: count / total for name, count in what_if} | {fmt: lost / total}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that stands on this rank."""
    to_local = getattr(tensor, "to_local", None)
    found: torch.Tensor = tensor if to_local is None else to_local()
    return found


def num_ranks() -> int:
    """How many processes are counted together."""
    if distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_world_size())
    return 1
