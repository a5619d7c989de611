"""Offload: saved activations wait in host memory, or in a file, for their backward.

    offloaded = offload_saves(model)                       # from CUDA to pinned memory
    offloaded = offload_saves(model, folder="/scratch")    # from anywhere to a file
    ...
    offloaded.remove()

Every bit comes back, so gradients are those of a model that keeps everything. The
copies to pinned memory run on the stream of the computation and do not block the host.
A file is made below the folder and unlinked at once: it is gone when the process is,
whatever ends it. What is left alone, and why, is told in `saves`.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from typing import TYPE_CHECKING, Any, cast, final

import torch

from castwise.errors import SettingsError, StorageError
from castwise.memory.save_formats import Kept, Store
from castwise.memory.saves import StoredSaves

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

_EVERY_FORMAT = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.complex64,
        torch.complex128,
    }
)


def offload_saves(model: nn.Module, *, folder: str | Path | None = None) -> StoredSaves:
    """Keep what a model's forward saves for the backward somewhere else.

    Args:
        model: Any module tree; its code stays as it is.
        folder: Where a file is made. Default: host memory, for a model on CUDA.

    Raises:
        SettingsError: The model is in host memory already and no folder was given.
        StorageError: No file can be made in the folder.
    """
    if folder is not None:
        return StoredSaves(model, SpillFile(folder))
    device = next((weight.device for weight in model.parameters()), None)
    if device is None or device.type == "cpu":
        raise SettingsError(
            "activations of a model on the CPU are in host memory already; give "
            "offload_saves a folder= for a file"
        )
    return StoredSaves(model, HostMemory())


@final
class HostMemory(Store):
    """Pinned host memory."""

    takes = _EVERY_FORMAT
    exact = True

    def put(self, flat: torch.Tensor) -> Kept | None:
        """Copy to the host without waiting for it."""
        if flat.device.type == "cpu":
            return None
        host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        host.copy_(flat, non_blocking=True)
        return _OnHost(host, flat.device)


@final
class _OnHost(Kept):
    num_bytes = 0

    def __init__(self, host: torch.Tensor, device: torch.device) -> None:
        self._host, self._device = host, device

    def get(self) -> torch.Tensor:
        return self._host.to(self._device, non_blocking=True)


@final
class SpillFile(Store):
    """A file without a name; its room is used anew when all in it was let go.

    Args:
        folder: Where it is made.

    Raises:
        StorageError: It cannot be.
    """

    takes = _EVERY_FORMAT
    exact = True

    def __init__(self, folder: str | Path) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 -- open as long as the store
        except OSError as error:
            raise StorageError(
                f"offload needs a folder where a file can be made, and {folder} is "
                f"none: {error.strerror or error}; name another one"
            ) from error
        weakref.finalize(self, self._file.close)
        self._end = 0
        self._num_alive = 0

    @property
    def num_bytes(self) -> int:
        """How much of the file is in use."""
        return self._end

    def put(self, flat: torch.Tensor) -> Kept | None:
        """Write it to the end of the file.

        Raises:
            StorageError: The disk is full.
        """
        raw = flat.detach().cpu().contiguous().view(torch.uint8)
        start = self._end
        try:
            _write_all(self._file.fileno(), raw, start)
        except OSError as error:
            raise StorageError(
                f"offload needs {raw.nbytes} bytes on disk for one activation: "
                f"{error.strerror or error}; free some, or name another folder"
            ) from error
        self._end += raw.nbytes
        self._num_alive += 1
        kept = _InFile(self, start, flat)
        weakref.finalize(kept, self._let_go).atexit = False
        return kept

    def read(self, raw: torch.Tensor, start: int) -> None:
        """Fill bytes from a place in the file.

        Raises:
            StorageError: The file ends before.
        """
        view = memoryview(cast("Any", raw.numpy()))
        done = 0
        while done < len(view):
            got = os.preadv(self._file.fileno(), [view[done:]], start + done)
            if got == 0:
                raise StorageError(
                    "the file of offloaded activations was cut short; use another "
                    "folder"
                )
            done += got

    def _let_go(self) -> None:
        self._num_alive -= 1
        if self._num_alive == 0:
            self._end = 0


@final
class _InFile(Kept):
    num_bytes = 0

    def __init__(self, store: SpillFile, start: int, flat: torch.Tensor) -> None:
        self._store, self._start = store, start
        self._num_numbers, self._dtype = flat.numel(), flat.dtype
        self._device = flat.device

    def get(self) -> torch.Tensor:
        read = torch.empty(self._num_numbers, dtype=self._dtype)
        self._store.read(read.view(torch.uint8), self._start)
        return read.to(self._device)


def _write_all(file: int, raw: torch.Tensor, start: int) -> None:
    view = memoryview(cast("Any", raw.numpy()))
    done = 0
    while done < len(view):
        done += os.pwrite(file, view[done:], start + done)
