"""Optimizer states that leave the device while nothing steps by them.

A predict phase reads no moment, so they can be elsewhere meanwhile: in the memory of
the host, or in a file. What is left of a tensor is an empty one in its place.
The copy elsewhere is also what a late rollback needs, so none is made beside it. What
else a rollback needs, the weights, is copied to the same place and stays where it is.

    resting.store(weights)          copy the moments, and these, to their place
    marks = resting.marked(tree)    a copy of a tree of states, with marks for those
    resting.release()               free their memory
    resting.wake()                  every bit is back
    resting.filled(marks)           the tree, with every bit
    resting.forget()                the copies are not needed any more

Whoever asks for the optimizer's state or steps it wakes them first, by a hook. A tensor
that shares its storage with others stays where it is, and so do single numbers.
"""

from __future__ import annotations

import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import IO, Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from castwise.errors import SettingsError

Place = Literal["stay", "host", "disk"]
"""Where moments are while nothing steps by them."""

_MARK = "resting"
_PART = 1 << 20  # numbers that are copied at a time
_LEAST_BYTES = 256  # what is smaller is not worth a copy


class _Shelf(ABC):
    """Where copies lie."""

    @abstractmethod
    def put(self, tensors: Sequence[Tensor]) -> None: ...

    @abstractmethod
    def get(self, at: int) -> Tensor: ...

    @abstractmethod
    def clear(self) -> None: ...


@final
class _Host(_Shelf):
    """In main memory, page-locked where the device is a GPU."""

    def __init__(self) -> None:
        self._copies: list[Tensor] = []

    def put(self, tensors: Sequence[Tensor]) -> None:
        for at, tensor in enumerate(tensors):
            found = self._copies[at] if at < len(self._copies) else None
            if found is None or _kind(found) != _kind(tensor):
                pinned = tensor.device.type == "cuda"
                copy = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
                self._copies[at : at + 1] = [copy]
            self._copies[at].copy_(tensor)

    def get(self, at: int) -> Tensor:
        return self._copies[at]

    def clear(self) -> None:
        """Keep the memory: page-locking it again would cost more than the copy."""


@final
class _Disk(_Shelf):
    """In a file without a name, which is gone with the process."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._places: list[tuple[int, Tensor]] = []

    def put(self, tensors: Sequence[Tensor]) -> None:
        self.clear()
        self._file = tempfile.TemporaryFile(prefix="castwise-")  # noqa: SIM115 -- it outlives the call
        weakref.finalize(self, self._file.close)
        place = 0
        for tensor in tensors:
            like = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            self._places.append((place, like))
            flat = tensor.detach().reshape(-1)
            for part in torch.split(flat, _PART):
                part.cpu().view(torch.uint8).numpy().tofile(self._file)
            place += tensor.numel() * tensor.element_size()

    def get(self, at: int) -> Tensor:
        assert self._file is not None, "put comes first"
        place, like = self._places[at]
        self._file.seek(place)
        num_bytes = like.numel() * like.element_size()
        plain = np.fromfile(self._file, dtype=np.uint8, count=num_bytes)
        return torch.from_numpy(plain).view(like.dtype).reshape(like.shape)

    def clear(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._places = None, []


@final
class RestingStates:
    """The moments of an optimizer, and where they are.

    Args:
        optimizer: Whose states they are.
        place: `host` for a GPU's, `disk` for any; `stay` does nothing.

    Raises:
        SettingsError: They are in the memory of the host already.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, place: Place) -> None:
        self._optimizer, self.place = optimizer, place
        self._shelf: _Shelf = _Host() if place == "host" else _Disk()
        self._stored: list[Tensor] = []  # moments of which a copy exists
        self._copied: list[Tensor] = []  # others, which never leave
        self._away: list[Tensor] = []  # their shapes while they rest, else nothing
        if place == "stay":
            return
        devices = {
            weight.device.type
            for group in optimizer.param_groups
            for weight in group["params"]
        }
        if place == "host" and devices == {"cpu"}:
            raise SettingsError(
                "predict_states=host moves moments from a device to main memory, and "
                "these weights are in main memory; use disk, or stay"
            )

        def wake(*_: Any) -> None:
            self.wake()

        optimizer.register_state_dict_pre_hook(wake)
        optimizer.register_step_pre_hook(wake)

    @property
    def is_on(self) -> bool:
        """Whether states ever leave."""
        return self.place != "stay"

    @property
    def num_bytes(self) -> int:
        """Bytes that are away now."""
        return sum(each.numel() * each.element_size() for each in self._away)

    @torch.no_grad()
    def store(self, others: Sequence[Tensor] = ()) -> None:
        """Copy every large tensor of the states to its place, and others there too."""
        self.wake()
        self._stored = [
            value
            for state in self._optimizer.state.values()
            for value in state.values()
            if _can_rest(value)
        ]
        self._copied = [each for each in others if each.nbytes >= _LEAST_BYTES]
        self._shelf.put([*self._stored, *self._copied])

    def release(self) -> None:
        """Give back the memory of what was stored."""
        assert not self._away, "they rest already"
        self._away = [each.to(device="meta") for each in self._stored]
        for each in self._stored:
            # Not by its storage, which cannot shrink once numpy has seen it, as it has
            # when a checkpoint was written.
            each.data = torch.empty(0, dtype=each.dtype, device=each.device)

    @torch.no_grad()
    def wake(self) -> None:
        """Bring every bit back, if it is away."""
        likes, self._away = self._away, []
        for at, like in enumerate(likes):
            each = self._stored[at]
            found = self._shelf.get(at)
            back = torch.empty_like(like, device=each.device)  # strides as they were
            each.data = back.copy_(found)

    def forget(self) -> None:
        """Drop the copies."""
        self.wake()
        self._stored, self._copied = [], []
        self._shelf.clear()

    def marked(self, tree: Any) -> Any:
        """Copy a tree of states, with a mark in place of every stored tensor."""
        every = [*self._stored, *self._copied]
        places = {id(each): at for at, each in enumerate(every)}
        return _copied(tree, places)

    def filled(self, tree: Any) -> Any:
        """Return a tree of `marked` with every mark replaced by its tensor."""
        if isinstance(tree, dict):
            if tree.keys() == {_MARK}:
                return self._shelf.get(tree[_MARK])
            return {key: self.filled(value) for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(self.filled(value) for value in tree)
        return tree


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _can_rest(value: Any) -> bool:
    """Whether a value is a tensor that owns a storage of some size alone."""
    if type(value) is not Tensor:
        return False
    storage = value.untyped_storage()
    num_bytes = value.numel() * value.element_size()
    return _LEAST_BYTES <= num_bytes == storage.nbytes()


def _copied(tree: Any, places: dict[int, int]) -> Any:
    if isinstance(tree, Tensor):
        if id(tree) in places:
            return {_MARK: places[id(tree)]}
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: _copied(value, places) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_copied(value, places) for value in tree)
    return tree
