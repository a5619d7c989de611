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

import contextlib
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, final

import torch
from torch._subclasses import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from castwise.errors import SettingsError
from castwise.memory.derived import Recipes
from castwise.memory.save_formats import AS_IS, Kept, Store, store_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

_CLASSES = (torch.Tensor, torch.nn.Parameter, FakeTensor)

SMALL = 4096
"""Bytes below which a tensor is left alone."""

_WEIGHT = "a weight or buffer"
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

    num_derived: int = 0
    """Storages that are computed again from others."""

    left_alone: Mapping[str, int] = field(default_factory=dict)
    """Reason -> saved tensors that were not looked at."""

    def __str__(self) -> str:
        """One line for a log."""
        share = 1 - self.after_bytes / self.before_bytes if self.before_bytes else 0.0
        whole = f", {self.num_derived} derived" if self.num_derived else ""
        whole += f", {self.num_whole} kept whole" if self.num_whole else ""
        return (
            f"saves {self.before_bytes / 2**20:.1f} -> {self.after_bytes / 2**20:.1f} "
            f"MiB (-{share:.0%}) in {self.num_packed} storages{whole}"
        )


def store_saves(
    model: nn.Module, fmt: str | None = None, *, derive: bool = False
) -> StoredSaves:
    """Store what a model's forward saves for the backward in a format.

    Args:
        model: Any module tree; its code stays as it is.
        fmt: fp16, bf16 or int8. Default: as they are.
        derive: Whether not to store what one cheap operator computes again from other
            saves (`castwise.memory.derived`); alone it costs no bit. Default: False.

    Raises:
        SettingsError: The format is none of these, or nothing was asked for.
    """
    if fmt is None and not derive:
        raise SettingsError(
            "store_saves needs a format, or derive=True, or both, and got neither"
        )
    return StoredSaves(model, store_of(fmt or AS_IS), derive=derive)


@final
class StoredSaves:
    """Puts a store between a model's forward and its backward; see `store_saves`.

    Args:
        model: Any module tree.
        store: Where saved activations go.
        spares_borders: Whether what comes into the model and what it returns is left
            alone; right for a whole model, whose caller holds both. Default: True.
        derive: Whether cheap saves are computed again. Default: False.
    """

    def __init__(
        self,
        model: nn.Module,
        store: Store,
        *,
        spares_borders: bool = True,
        derive: bool = False,
    ) -> None:
        self._model = model
        self._derive = derive
        self._store = store
        self._spares_borders = spares_borders
        self._packer: _Packer | None = None
        self._open: list[contextlib.ExitStack] = []
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
        packer = _Packer(self._model, self._store, spared, derive=self._derive)
        stack = contextlib.ExitStack()
        stack.enter_context(saved_tensors_hooks(packer.pack, packer.unpack))
        if packer.recipes is not None:
            stack.enter_context(packer.recipes)
        self._open.append(stack)
        self._packer = packer

    def _end(self, outputs: Any) -> None:
        if not torch.is_grad_enabled() or not self._open:
            return
        self._open.pop().close()
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

    __slots__ = (
        "__weakref__",
        "_dtype",
        "_kept",
        "_whole",
        "_wide",
        "after_bytes",
        "before_bytes",
        "what",
    )

    def __init__(self, kept: Kept | None, flat: torch.Tensor, what: str) -> None:
        self.what = what
        self.before_bytes = flat.nbytes
        self.after_bytes = flat.nbytes if kept is None else kept.num_bytes
        self._dtype = flat.dtype
        self._kept = kept
        self._whole = _Untouched(flat) if kept is None else None
        self._wide: weakref.ref[torch.UntypedStorage] | None = None

    def give_back(self, flat: torch.Tensor) -> None:
        """Keep what was packed as it is, by reference."""
        self._whole, self._kept = _Untouched(flat), None

    def get(self) -> torch.Tensor:
        """Return it flat; those who read it at the same time share one memory."""
        if self._whole is not None:
            return self._whole.get()
        assert self._kept is not None, "nothing was packed"
        storage = None if self._wide is None else self._wide()
        if storage is not None:
            shared = torch.empty(0, dtype=self._dtype, device=storage.device)
            return shared.set_(storage)
        flat = self._kept.get()
        if type(flat) is torch.Tensor:
            self._wide = weakref.ref(flat.untyped_storage())
        return flat


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

    def __init__(
        self, model: nn.Module, store: Store, inputs: Any, *, derive: bool
    ) -> None:
        self._store = store
        self.recipes = Recipes(self._source_of) if derive else None
        weights, buffers = _weights_and_buffers(model)
        self._held = dict.fromkeys(map(_key, (*weights, *buffers)), _WEIGHT)
        self._held |= {_key(tensor): "an input" for tensor in _tensors_in(inputs)}
        self._inputs = inputs  # held, so that no other tensor gets their address
        self._shapes = {
            shape: weight.dtype
            for weight in weights
            if weight.ndim > 1
            for shape in (tuple(weight.shape), tuple(weight.shape[::-1]))
        }
        self._known: dict[tuple[int, torch.dtype], _Known] = {}
        self._made: list[weakref.ref[_Packed]] = []
        self._left_alone: Counter[str] = Counter()
        self._bytes = [0, 0]
        self._num: Counter[str] = Counter()

    def pack(self, tensor: torch.Tensor) -> _View | _Untouched:
        reason = self._reason_to_leave(tensor)
        if reason is not None:
            self._left_alone[reason] += 1
            return _Untouched(tensor)
        packed = self._found(tensor)
        if packed is None:
            size = tensor.untyped_storage().nbytes() // tensor.itemsize
            if size > _MUCH_LARGER * tensor.numel():
                own = tensor.clone()
                return _View(self._packed(own), own.shape, own.stride(), 0)
            packed = self._derived(tensor) or self._packed(tensor)
            self._known[_key(tensor), tensor.dtype] = _Known(
                StorageWeakRef(tensor.untyped_storage()),  # type: ignore[no-untyped-call]
                tensor._version,  # noqa: SLF001 -- no public name
                weakref.ref(packed),
            )
        return _View(packed, tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(self, saved: _View | _Untouched) -> torch.Tensor:
        return saved.get()

    def _found(self, tensor: torch.Tensor) -> _Packed | None:
        known = self._known.get((_key(tensor), tensor.dtype))
        return None if known is None else known.found(tensor._version)  # noqa: SLF001 -- as above

    def _source_of(
        self, tensor: torch.Tensor
    ) -> weakref.ref[_Packed] | torch.Tensor | None:
        """What gives a tensor in the backward: a weight itself, or a save."""
        if self._held.get(_key(tensor)) == _WEIGHT:
            return tensor
        packed = self._found(tensor)
        return None if packed is None else weakref.ref(packed)

    def _derived(self, tensor: torch.Tensor) -> _Packed | None:
        recipe = None if self.recipes is None else self.recipes.recipe_of(tensor)
        held = None if recipe is None else recipe.held()
        if held is None:
            return None
        packed = _Packed(held, _flat(tensor), "derived")
        self._count(packed, 1)
        return packed

    def close(self, outputs: Any) -> None:
        """Keep what the model returned as it is: whoever called it holds it anyway."""
        for tensor in _tensors_in(outputs):
            packed = self._found(tensor)
            if packed is not None:
                self._left_alone["an output"] += 1
                self._count(packed, -1)
                packed.give_back(_flat(tensor.detach()))
        self._inputs = None
        self._known.clear()
        self.recipes = None

    def bill(self) -> SavesBill:
        before, after = self._bytes
        return SavesBill(
            before_bytes=before,
            after_bytes=after,
            num_packed=self._num["packed"],
            num_whole=self._num["whole"],
            num_derived=self._num["derived"],
            left_alone=dict(self._left_alone),
        )

    def _packed(self, tensor: torch.Tensor) -> _Packed:
        flat = _flat(tensor)
        reason = self._reason_not_to_store(tensor)
        if reason is not None:  # others may be derived from it
            self._left_alone[reason] += 1
            return _Packed(None, flat, "left alone")
        kept = self._store.put(flat)
        packed = _Packed(kept, flat, "whole" if kept is None else "packed")
        self._count(packed, 1)
        return packed

    def _count(self, packed: _Packed, sign: int) -> None:
        if packed.what != "left alone":
            self._num[packed.what] += sign
            self._bytes[0] += sign * packed.before_bytes
            self._bytes[1] += sign * packed.after_bytes

    def _reason_to_leave(self, tensor: torch.Tensor) -> str | None:
        if type(tensor) not in _CLASSES or tensor.layout is not torch.strided:
            return "not a plain dense tensor"
        reason = None
        takes = tensor.is_floating_point() or tensor.dtype in self._store.takes
        if tensor.is_neg() or tensor.is_conj() or not takes:
            reason = _name_of(tensor)
        elif tensor.nbytes < SMALL:
            reason = "small"
        elif _key(tensor) in self._held:
            reason = self._held[_key(tensor)]
        elif self.recipes is None:
            reason = self._reason_not_to_store(tensor)
        return reason

    def _reason_not_to_store(self, tensor: torch.Tensor) -> str | None:
        if tensor.dtype not in self._store.takes:
            return _name_of(tensor)
        # by shape and format: which weight it is a cast of, nobody knows
        held_in = self._shapes.get(tuple(tensor.shape), tensor.dtype)
        return None if held_in is tensor.dtype else "a cast of a weight"


def _weights_and_buffers(
    model: nn.Module,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return all of them, ten times as fast as by walks that also make names."""
    modules = [model, *_modules_below(model)]
    weights = [w for each in modules for w in each._parameters.values()]  # noqa: SLF001 -- the public walks make names
    buffers = [b for each in modules for b in each._buffers.values()]  # noqa: SLF001 -- as above
    return [w for w in weights if w is not None], [b for b in buffers if b is not None]


def _modules_below(module: nn.Module) -> Iterator[nn.Module]:
    for child in module._modules.values():  # noqa: SLF001 -- as above
        if child is not None:
            yield child
            yield from _modules_below(child)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """All of the memory that a tensor lies in, in its format."""
    num_numbers = tensor.untyped_storage().nbytes() // tensor.itemsize
    return tensor.as_strided((num_numbers,), (1,), 0)


def _name_of(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


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
