"""Measured memory: how much is held now, and the peak since a moment that you choose.

    monitor = MemoryMonitor("cpu")
    with monitor.span("epoch 2"):
        train()
    monitor.readings[-1].peak_bytes

On CUDA these are torch's allocator statistics. On the CPU nothing counts tensors, so
the kernel is asked for the resident set of the process: VmRSS now, VmHWM the highest it
ever was. Writing "5" to /proc/self/clear_refs brings VmHWM down to VmRSS, which makes a
peak per epoch possible without a sampling thread that could miss it. Where that door is
closed the peak is ru_maxrss, which never falls; the readings say so.

Two facts to read the CPU figures by. The resident set holds code and caches too, so
differences mean more than totals. And glibc keeps freed blocks of up to 32 MiB for
later: call `steady_allocator()` first, or a saving of activations stays invisible.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch

from castwise.decision import Decision
from castwise.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # see proc(5)

_M_TRIM_THRESHOLD = -1  # see mallopt(3)
_M_MMAP_THRESHOLD = -3
_STEADY_BYTES = 128 * 1024  # glibc's own first value, before it adapts


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryReading:
    """Memory over one named span of a run."""

    name: str
    """What ran, for example "epoch 2"."""

    now_bytes: int
    """Held at the end of the span."""

    peak_bytes: int
    """Highest within the span; within the whole process where `resettable` is false."""

    resettable: bool
    """Whether the peak belongs to this span alone."""

    source: str
    """Where the figures come from."""


@final
class MemoryMonitor:
    """Reads the memory of one device, and its peak since the last reset.

    Args:
        device: "cpu", "cuda", "cuda:1" or a torch device. Default: the CPU.

    Raises:
        SettingsError: Nothing is known about the memory of this device.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._meter = _choose_meter(torch.device(device))
        self._open: list[int] = []  # peaks of the spans that are open, outermost first
        self._readings: list[MemoryReading] = []

    @property
    def source(self) -> Decision[str]:
        """Where the figures come from, and why from there."""
        return self._meter.source

    @property
    def resettable(self) -> bool:
        """Whether `reset_peak` has an effect."""
        return self._meter.resettable

    @property
    def readings(self) -> tuple[MemoryReading, ...]:
        """Every span that was closed, in order."""
        return tuple(self._readings)

    def now_bytes(self) -> int:
        """Return what is held now."""
        return self._meter.now_bytes()

    def peak_bytes(self) -> int:
        """Return the highest since the last reset."""
        return self._meter.peak_bytes()

    def reset_peak(self) -> None:
        """Start the next peak from what is held now; open spans keep theirs."""
        peak = self.peak_bytes()
        self._open = [max(seen, peak) for seen in self._open]
        self._meter.reset_peak()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Measure a named part of the run; spans may nest.

        Args:
            name: Name of the reading that is added to `readings` at the end.
        """
        self._begin()
        try:
            yield
        finally:
            self._end(name)

    @contextmanager
    def modules(self, model: nn.Module) -> Iterator[None]:
        """Make a span of every forward of every module, named by its fqn.

        A module's span holds those of its children; the model itself is "(model)". One
        that runs again for a recompute is read again. Backward passes are no spans:
        what they hold is told by `lifetimes`, and by a span around all of them.

        Args:
            model: not compiled, since compiled code calls no modules.
        """
        handles = []
        for fqn, module in model.named_modules():
            name = fqn or "(model)"
            begin = module.register_forward_pre_hook(lambda *_: self._begin())
            end = module.register_forward_hook(
                lambda *_, name=name: self._end(name), always_call=True
            )
            handles += [begin, end]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self) -> None:
        self.reset_peak()
        self._open.append(0)

    def _end(self, name: str) -> None:
        now, peak = self.now_bytes(), self.peak_bytes()
        reading = MemoryReading(
            name=name,
            now_bytes=now,
            peak_bytes=max(self._open.pop(), peak, now),
            resettable=self.resettable,
            source=self.source.value,
        )
        self._readings.append(reading)
        self._open = [max(seen, reading.peak_bytes) for seen in self._open]


def steady_allocator() -> Decision[bool]:
    """Make glibc hand freed blocks back, so that the resident set follows the tensors.

    Left alone, glibc raises its threshold for separate mappings up to 32 MiB as it sees
    blocks of that size freed, and from then on keeps them on its heap. Fixing the two
    thresholds ends that; no cost per step could be measured. Call it before the model
    is built. It holds for the rest of the process.

    Returns:
        Whether the C library took it, and why.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return Decision(value=False, because="this C library has no mallopt")
    taken = all(
        mallopt(option, _STEADY_BYTES)
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)
    )
    because = "took" if taken else "refused"
    return Decision(
        value=taken, because=f"mallopt {because} fixed thresholds of 128 KiB"
    )


class _Meter(ABC):
    """The seam between the monitor and a device."""

    source: Decision[str]
    resettable: bool = True

    @abstractmethod
    def now_bytes(self) -> int: ...

    @abstractmethod
    def peak_bytes(self) -> int: ...

    @abstractmethod
    def reset_peak(self) -> None: ...


@final
class _ProcMeter(_Meter):
    """The resident set as Linux counts it."""

    source = Decision("resident set (VmRSS, VmHWM)", "the kernel resets its peak")

    def now_bytes(self) -> int:
        return _status_bytes("VmRSS")

    def peak_bytes(self) -> int:
        # The kernel raises VmHWM lazily, so for a moment it may lie below VmRSS.
        return max(_status_bytes("VmHWM"), _status_bytes("VmRSS"))

    def reset_peak(self) -> None:
        _CLEAR_REFS.write_text(_RESET_PEAK)


@final
class _UsageMeter(_Meter):
    """The resident set as POSIX counts it: its peak is that of the whole process."""

    source = Decision(
        "resident set (ru_maxrss)",
        "/proc/self/clear_refs cannot be written here, so the peak never falls",
    )
    resettable = False

    def now_bytes(self) -> int:
        try:
            return _status_bytes("VmRSS")
        except (OSError, LookupError):
            return self.peak_bytes()

    def peak_bytes(self) -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def reset_peak(self) -> None:
        """Do nothing: the peak of this source never falls."""


@final
class _CudaMeter(_Meter):
    """What torch's caching allocator has handed out on one CUDA device."""

    source = Decision("CUDA allocator", "torch counts every block that it hands out")

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now_bytes(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)


def _choose_meter(device: torch.device) -> _Meter:
    if device.type == "cuda":
        return _CudaMeter(device)
    if device.type != "cpu":
        raise SettingsError(
            f"a memory monitor needs a cpu or cuda device, got {device}; nothing is "
            "known about the memory of others"
        )
    try:
        meter = _ProcMeter()
        meter.reset_peak()
        meter.peak_bytes()
    except (OSError, LookupError):
        return _UsageMeter()
    return meter


def _status_bytes(field: str) -> int:
    """Read one line such as `VmRSS:     12345 kB` of /proc/self/status."""
    for line in _STATUS.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * 1024
    raise LookupError(field)
