"""The table of a watch: one row for each tensor, the same rows on all ranks.

Rows are fixed at the first look, so that counts can be added up over processes whatever
each of them has seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, final, overload

import torch
from torch import distributed, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from castwise.numerics.operator_call import format_name
from castwise.numerics.watch.exponents import NUM_BINS, ExponentHistogram
from castwise.numerics.watch.samples import Counter, LostUpdates, Places
from castwise.numerics.watch.windows import TensorKind, TensorWatch

if TYPE_CHECKING:
    from castwise.numerics.watch.machine_counter import MachineCounter

_Key = tuple[TensorKind, str]

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
        keys: list[_Key] = []
        for name, weight in weights.items():
            if weight.is_floating_point():
                keys += [("weight", name), ("gradient", name)]
        for fqn, _ in self.modules:
            keys += [("output", fqn), ("output_gradient", fqn)]
        self._rows = {key: row for row, key in enumerate(keys)}
        self._seen: dict[int, tuple[torch.dtype, int]] = {}
        self._device = device
        self._places = Places(device)
        self._counter = Counter(len(keys), device)
        self._lost = LostUpdates(len(keys), _WHAT_IF_WEIGHTS, device)
        self._before: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        self._machine = _machine_counter(len(keys), device)

    def renew(self) -> None:
        """Look at other places from here on."""
        self._places.renew()
        if self._machine is not None:
            self._machine.renew(self._places.draws)

    def see(
        self, kind: TensorKind, name: str, tensor: torch.Tensor
    ) -> torch.Tensor | None:
        """Count a tensor; the sample of it, where operators took one."""
        row = self._rows.get((kind, name))
        if row is None or is_functorch_wrapped_tensor(tensor):  # inside of vmap
            return None
        local = tensor if type(tensor) is torch.Tensor else _local(tensor)
        machine = self._machine
        if machine is not None and machine.fits(local):
            size = machine.see(row, local)
            self._seen[row] = tensor.dtype, size if local is tensor else tensor.numel()
            return None
        if local.device != self._device or not local.numel():
            return None
        self._seen[row] = tensor.dtype, tensor.numel()
        sample = self._places.sample(local)
        self._counter.add(row, sample)
        return sample

    def see_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Count weights and their gradients, and remember both until the update."""
        quick: list[tuple[str, int, torch.Tensor, int, torch.Tensor]] = []
        for name, weight in weights.items():
            if ("weight", name) not in self._rows:
                continue
            gradient = weight.grad
            if gradient is None:
                self.see("weight", name, weight)
                continue
            pair = _local(weight), _local(gradient)
            if self._machine is not None and self._machine.fit(*pair):
                rows = self._rows["weight", name], self._rows["gradient", name]
                self._seen[rows[0]] = weight.dtype, weight.numel()
                self._seen[rows[1]] = gradient.dtype, gradient.numel()
                quick.append((name, rows[0], pair[0], rows[1], pair[1]))
            else:
                before = self._taken("weight", name, weight)
                meant = self._taken("gradient", name, gradient)
                if before is not None and meant is not None:
                    self._before.append((name, before, meant))
        if self._machine is not None:
            self._machine.see_weights(quick)

    def _taken(
        self, kind: TensorKind, name: str, tensor: torch.Tensor
    ) -> torch.Tensor | None:
        """Count a tensor, and return the sample that was counted or would have been."""
        sample = self.see(kind, name, tensor)
        local = _local(tensor)
        if sample is None and local.device == self._device and local.numel():
            return self._places.sample(local)
        return sample

    def see_updates(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Compare weights after the update with what they were before it."""
        known = [each for each in self._before if each[0] in weights]
        self._lost.count(
            [self._rows["weight", name] for name, _, _ in known],
            [before for _, before, _ in known],
            [self._places.sample(_local(weights[name])) for name, _, _ in known],
            [gradient for _, _, gradient in known],
        )
        if self._machine is not None:
            self._machine.see_updates({n: _local(w) for n, w in weights.items()})

    def count(self) -> None:
        """The step is over: keep what was seen in it."""
        self._counter.count()
        self._before.clear()
        if self._machine is not None:
            self._machine.count()

    def forget(self) -> None:
        """Drop what was seen since the last step that was over."""
        self._counter.forget()
        self._before.clear()
        if self._machine is not None:
            self._machine.forget()

    def close(self, scale: float, *, is_held: bool) -> WatchedTensors:
        """Add up over ranks what was counted, and begin again with nothing."""
        counts, lost = self._counter.take(), self._lost.take()
        if self._machine is not None:
            counted, updates = self._machine.take()
            counts += torch.from_numpy(counted)
            lost += torch.from_numpy(updates)
        if num_ranks() > 1:
            distributed.all_reduce(counts)
            distributed.all_reduce(lost)
        return WatchedTensors(
            tuple(self._rows),
            dict(self._seen),
            counts.cpu(),
            lost.cpu(),
            scale,
            is_held,
        )


@final
class WatchedTensors(Sequence[TensorWatch]):
    """The records of one window, made when somebody reads them.

    Until then a window is a small table of counts: a run that looks at its numbers
    every hundred steps need not wait for a thousand records each time.
    """

    def __init__(
        self,
        keys: tuple[_Key, ...],
        seen: dict[int, tuple[torch.dtype, int]],
        counts: torch.Tensor,
        lost: torch.Tensor,
        scale: float,
        is_held: bool,
    ) -> None:
        self._keys, self._seen, self._lost = keys, seen, lost
        self._scale, self._is_held = scale, is_held
        self._bins = counts.any(0).nonzero().flatten()
        self._counts = counts[:, self._bins]
        self._found: tuple[TensorWatch, ...] | None = None

    @overload
    def __getitem__(self, place: int) -> TensorWatch: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[TensorWatch, ...]: ...

    def __getitem__(self, place: int | slice) -> TensorWatch | tuple[TensorWatch, ...]:
        return self._read()[place]

    def __len__(self) -> int:
        return len(self._read())

    def __iter__(self) -> Iterator[TensorWatch]:
        return iter(self._read())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return self._read() == tuple(other)

    def __hash__(self) -> int:
        return hash(self._read())

    def __repr__(self) -> str:
        return repr(self._read())

    def _read(self) -> tuple[TensorWatch, ...]:
        if self._found is None:
            self._found = tuple(self._records())
            self._counts = self._lost = torch.empty(0)
        return self._found

    def _records(self) -> Iterator[TensorWatch]:
        counts = torch.zeros((len(self._keys), NUM_BINS), dtype=torch.int64)
        counts[:, self._bins] = self._counts
        histograms, shares = ExponentHistogram.from_bins(counts), self._lost.T.tolist()
        shift = -math.floor(math.log2(self._scale))
        for row, (kind, name) in enumerate(self._keys):
            dtype, size = self._seen.get(row, (torch.float32, 0))
            histogram = histograms[row]
            if not histogram.total:
                continue
            if kind in {"gradient", "output_gradient"} and self._scale != 1:
                histogram = histogram.shifted(shift)
            fmt = format_name(dtype)
            kept = kind != "weight" or self._is_held
            yield TensorWatch(
                kind=kind,
                name=name,
                format=fmt,
                num_elements=size,
                histogram=histogram,
                lost=None if kept else _lost(fmt, shares[row]),
            )


def _machine_counter(num_rows: int, device: torch.device) -> MachineCounter | None:
    """What counts on the CPU; nothing elsewhere."""
    if device.type != "cpu":
        return None
    from castwise.numerics.watch.machine_counter import (  # noqa: PLC0415 -- imports numba
        MachineCounter,
    )

    return MachineCounter(num_rows, _WHAT_IF_WEIGHTS)


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
    if type(tensor) is torch.Tensor:  # as most are
        return tensor
    to_local = getattr(tensor, "to_local", None)
    found: torch.Tensor = tensor if to_local is None else to_local()
    return found


def num_ranks() -> int:
    """How many processes are counted together."""
    if distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_world_size())
    return 1
