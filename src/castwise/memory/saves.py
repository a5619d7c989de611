"""Saves: what the forward keeps for the backward, in another format than it ran in.

    stored = store_saves(model, "fp16")         # or "bf16", "int8"
    loss_fn(model(x), y).backward()             # computed as before; kept in 16 bits
    stored.bill                                 # bytes before and after, and what not
    stored.remove()

The precision of storage is apart from that of compute: an fp32 model keeps its
activations in fp16 at a gradient error some ten times below that of computing in bf16.
Autograd hands every tensor that it saves to a hook, and asks for it again in the
backward (`torch.autograd.graph.saved_tensors_hooks`). Here it is packed and unpacked:

    storage      is packed, not the tensor: three views of one memory are packed once
    left alone   integers and bools, fp64 and complex numbers, weights and casts of
                 weights, what came into the model and what it returns (they are held
                 by others, so packing would add to memory), and small tensors
    kept whole   a tensor that does not fit its format; it is counted in the bill

Autograd no longer sees whether a saved tensor was changed in place afterwards. What is
packed is a copy and stays right; of what is left alone the version is checked here, and
a change raises the error that autograd would have raised.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, final

import torch
from torch._subclasses import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from castwise.memory.save_formats import Kept, Store, store_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

_CLASSES = (torch.Tensor, torch.nn.Parameter, FakeTensor)

SMALL = 4096
"""Bytes below which a tensor is left alone."""

_DEPTH = 3  # how deep tensors may hide in objects that go into a model
_MUCH_LARGER = 4  # a storage that is that much larger than what is saved of it


@dataclass(frozen=True, kw_only=True, slots=True)
class SavesBill:
    """What one forward of the model kept for its backward."""

    before_bytes: int
    """Of the storages of all that was packed or kept whole, each once."""

    after_bytes: int
    """What they take now."""

    num_packed: int
    """Storages that were packed."""

    num_whole: int
    """Storages that did not fit the format and were kept whole."""

    left_alone: Mapping[str, int] = field(default_factory=dict)
    """Reason -> saved tensors that were not looked at."""

    def __str__(self) -> str:
        """One line for a log."""
        share = 1 - self.after_bytes / self.before_bytes if self.before_bytes else 0.0
        whole = f", {self.num_whole} kept whole" if self.num_whole else ""
        return (
            f"saves {self.before_bytes / 2**20:.1f} -> {self.after_bytes / 2**20:.1f} "
            f"MiB (-{share:.0%}) in {self.num_packed} storages{whole}"
        )


def store_saves(model: nn.Module, fmt: str) -> StoredSaves:
    """Store what a model's forward saves for the backward in a format.

    Args:
        model: Any module tree; its code stays as it is.
        fmt: fp16, bf16 or int8.

    Raises:
        SettingsError: The format is none of these.
    """
    return StoredSaves(model, store_of(fmt))


@final
class StoredSaves:
    """Puts a store between a model's forward and its backward; see `store_saves`.

    Args:
        model: Any module tree.
        store: Where saved activations go.
        spares_borders: Whether what comes into the model and what it returns is left
            alone; right for a whole model, whose caller holds both. Default: True.
    """

    def __init__(
        self, model: nn.Module, store: Store, *, spares_borders: bool = True
    ) -> None:
        self._model = model
        self._store = store
        self._spares_borders = spares_borders
        self._packer: _Packer | None = None
        self._hooks: list[saved_tensors_hooks] = []
        self._handles = [
            model.register_forward_pre_hook(
                _Before(self), prepend=True, with_kwargs=True
            ),
            model.register_forward_hook(_After(self), always_call=True),
        ]

    @property
    def bill(self) -> SavesBill:
        """What the latest forward kept."""
        if self._packer is None:
            return SavesBill(before_bytes=0, after_bytes=0, num_packed=0, num_whole=0)
        return self._packer.bill()

    def remove(self) -> None:
        """Save activations as before; a second call does nothing."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        """Return itself: the store holds within a `with` block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove it."""
        self.remove()

    def _begin(self, inputs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        spared = inputs if self._spares_borders else ()
        packer = _Packer(self._model, self._store, spared)
        hooks = saved_tensors_hooks(packer.pack, packer.unpack)
        hooks.__enter__()
        self._hooks.append(hooks)
        self._packer = packer

    def _end(self, outputs: Any) -> None:
        if not torch.is_grad_enabled() or not self._hooks:
            return
        self._hooks.pop().__exit__(None, None, None)
        assert self._packer is not None
        self._packer.close(outputs if self._spares_borders else ())


def is_stored(module: nn.Module) -> bool:
    """Whether what this very module saves goes into a store."""
    hooks = module._forward_pre_hooks.values()  # noqa: SLF001 -- no public name
    return any(isinstance(hook, _Before) for hook in hooks)


class _Hook:
    """A hook that a copy of the model does not inherit, and that can be pickled."""

    def __init__(self, owner: StoredSaves | None = None) -> None:
        self._owner = owner

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


@final
class _Before(_Hook):
    def __call__(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if self._owner is not None and not torch.compiler.is_compiling():
            self._owner._begin((args, kwargs))  # noqa: SLF001 -- its own hook


@final
class _After(_Hook):
    def __call__(self, _: nn.Module, __: Any, outputs: Any) -> None:
        if self._owner is not None and not torch.compiler.is_compiling():
            self._owner._end(outputs)  # noqa: SLF001 -- its own hook


class _Packed:
    """One storage, packed or, if it turned out to be held anyway, as it was."""

    __slots__ = ("__weakref__", "before_bytes", "kept", "whole")

    def __init__(self, kept: Kept | None, whole: torch.Tensor) -> None:
        self.kept = kept
        self.before_bytes = whole.nbytes
        self.whole = _Untouched(whole) if kept is None else None

    def get(self) -> torch.Tensor:
        if self.whole is not None:
            return self.whole.get()
        assert self.kept is not None
        return self.kept.get()


class _Untouched:
    """A tensor that is kept by reference, with autograd's own check of its version."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version  # noqa: SLF001 -- no public name

    def get(self) -> torch.Tensor:
        if self._tensor._version != self._version:  # noqa: SLF001 -- as above
            raise RuntimeError(
                "one of the variables needed for gradient computation has been "
                f"modified by an inplace operation: a {self._tensor.dtype} tensor of "
                f"shape {list(self._tensor.shape)} is at version "
                f"{self._tensor._version}; expected version {self._version} instead"  # noqa: SLF001 -- as above
            )
        return self._tensor


@dataclass(frozen=True, slots=True)
class _View:
    """A saved tensor: where it lies in what was packed."""

    packed: _Packed
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    def get(self) -> torch.Tensor:
        return self.packed.get().as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True, slots=True)
class _Known:
    """A storage that was packed before, as long as both live."""

    storage: StorageWeakRef
    version: int
    packed: weakref.ref[_Packed]

    def found(self, version: int) -> _Packed | None:
        """What it was packed into, unless it was freed or written since."""
        if self.version != version or self.storage.expired():  # type: ignore[no-untyped-call]
            return None
        return self.packed()


class _Packer:
    """Packs and unpacks what one forward saves."""

    def __init__(self, model: nn.Module, store: Store, inputs: Any) -> None:
        self._store = store
        weights = [*model.parameters(), *model.buffers()]
        self._held = {_key(tensor): "a weight or buffer" for tensor in weights}
        self._held |= {_key(tensor): "an input" for tensor in _tensors_in(inputs)}
        self._inputs = inputs  # held, so that no other tensor gets their address
        self._shapes = {
            shape: weight.dtype
            for weight in model.parameters()
            if weight.ndim > 1
            for shape in (tuple(weight.shape), tuple(weight.shape[::-1]))
        }
        self._known: dict[tuple[int, torch.dtype], _Known] = {}
        self._made: list[weakref.ref[_Packed]] = []
        self._left_alone: Counter[str] = Counter()
        self._bytes = [0, 0]
        self._num_packed = self._num_whole = 0

    def pack(self, tensor: torch.Tensor) -> _View | _Untouched:
        reason = self._reason_to_leave(tensor)
        if reason is not None:
            self._left_alone[reason] += 1
            return _Untouched(tensor)
        key = _key(tensor), tensor.dtype
        known = self._known.get(key)
        packed = known.found(tensor._version) if known is not None else None  # noqa: SLF001 -- no public name
        if packed is None:
            size = tensor.untyped_storage().nbytes() // tensor.itemsize
            if size > _MUCH_LARGER * tensor.numel():
                own = tensor.clone()
                return _View(self._packed(_flat(own)), own.shape, own.stride(), 0)
            packed = self._packed(_flat(tensor))
            self._known[key] = _Known(
                StorageWeakRef(tensor.untyped_storage()),  # type: ignore[no-untyped-call]
                tensor._version,  # noqa: SLF001 -- as above
                weakref.ref(packed),
            )
        return _View(packed, tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(self, saved: _View | _Untouched) -> torch.Tensor:
        return saved.get()

    def close(self, outputs: Any) -> None:
        """Keep what the model returned as it is: whoever called it holds it anyway."""
        for tensor in _tensors_in(outputs):
            known = self._known.get((_key(tensor), tensor.dtype))
            packed = known.found(tensor._version) if known is not None else None  # noqa: SLF001 -- as above
            if packed is None:
                continue
            self._left_alone["an output"] += 1
            self._bytes[0] -= packed.before_bytes
            if packed.kept is None:
                self._bytes[1] -= packed.before_bytes
                self._num_whole -= 1
            else:
                self._bytes[1] -= packed.kept.num_bytes
                self._num_packed -= 1
            packed.whole, packed.kept = _Untouched(_flat(tensor.detach())), None
        self._inputs = None
        self._known.clear()

    def bill(self) -> SavesBill:
        before, after = self._bytes
        return SavesBill(
            before_bytes=before,
            after_bytes=after,
            num_packed=self._num_packed,
            num_whole=self._num_whole,
            left_alone=dict(self._left_alone),
        )

    def _packed(self, flat: torch.Tensor) -> _Packed:
        kept = self._store.put(flat)
        self._num_packed += kept is not None
        self._num_whole += kept is None
        self._bytes[0] += flat.nbytes
        self._bytes[1] += flat.nbytes if kept is None else kept.num_bytes
        return _Packed(kept, flat)

    def _reason_to_leave(self, tensor: torch.Tensor) -> str | None:
        if type(tensor) not in _CLASSES or tensor.layout is not torch.strided:
            return "not a plain dense tensor"
        reason = None
        if tensor.dtype not in self._store.takes or tensor.is_neg():
            reason = str(tensor.dtype).removeprefix("torch.")
        elif tensor.nbytes < SMALL:
            reason = "small"
        elif _key(tensor) in self._held:
            reason = self._held[_key(tensor)]
        elif self._is_cast_weight(tensor):
            reason = "a cast of a weight"
        return reason

    def _is_cast_weight(self, tensor: torch.Tensor) -> bool:
        """Judge by shape and format: which weight it is a cast of, nobody knows."""
        return self._shapes.get(tuple(tensor.shape), tensor.dtype) is not tensor.dtype


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """All of the memory that a tensor lies in, in its format."""
    num_numbers = tensor.untyped_storage().nbytes() // tensor.itemsize
    return tensor.as_strided((num_numbers,), (1,), 0)


def _key(tensor: torch.Tensor) -> int:
    local = getattr(tensor, "_local_tensor", tensor)  # of a weight that FSDP2 sharded
    key: int = local.untyped_storage()._cdata  # noqa: SLF001 -- no public name
    return key


def _tensors_in(value: Any, depth: int = _DEPTH) -> Iterator[torch.Tensor]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif depth and hasattr(leaf, "__dict__") and not callable(leaf):
            yield from _tensors_in(vars(leaf), depth - 1)
