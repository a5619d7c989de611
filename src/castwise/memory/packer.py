"""Packs what autograd saves while a model runs, and unpacks it in the backward.

    saved tensor --> left alone          a reference, with its version
                 --> a view of a storage, which is ...
                         packed          in the format of a store
                         whole           it did not fit, or another one follows from it
                         derived         computed again

A storage waits until the next one is saved, and is packed then, because only then it is
known whether that one follows from it (`castwise.memory.pairs`).

Hooks run some hundred times a step between large products that leave nothing of them in
the caches, so what they do is kept short.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any, final

import torch
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from castwise.memory.derived import Recipes
from castwise.memory.pairs import Follows, Source, fills_its_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from castwise.memory.save_formats import Kept, Store

_CLASSES = frozenset({torch.Tensor, torch.nn.Parameter, FakeTensor})

SMALL = 4096
"""Bytes below which a tensor is left alone."""

_STRIDED = torch.strided
_WEIGHT = "a weight or buffer"
_DEPTH = 3  # how deep tensors may hide in objects that go into a model
_MUCH_LARGER = 4  # a storage that is that much larger than what is saved of it
_MUCH_SMALLER = 32  # a statistic of a tensor that is that much larger


_Known = tuple[
    weakref.ref[torch.UntypedStorage], int, torch.dtype, "weakref.ref[Packed]"
]
"""A storage, its version, the format of what was saved, and what it was packed into."""


@final
class Untouched:
    """A tensor that is kept by reference, with autograd's own check of its version.

    A result that knows its node would keep it alive, and be kept alive by it; it comes
    here detached.
    """

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version  # noqa: SLF001 -- no public name

    def is_as_it_was(self) -> bool:
        """Whether nobody wrote it since."""
        return self._tensor._version == self._version  # noqa: SLF001 -- as above

    def get(self) -> torch.Tensor:
        """Return it, or raise what autograd would."""
        if not self.is_as_it_was():
            raise RuntimeError(
                "one of the variables needed for gradient computation has been "
                f"modified by an inplace operation: a {self._tensor.dtype} tensor of "
                f"shape {list(self._tensor.shape)} is at version "
                f"{self._tensor._version}; expected version {self._version} instead"  # noqa: SLF001 -- as above
            )
        return self._tensor


@final
class Packed:
    """One storage: as it was, or what is kept in its place.

    Args:
        flat: All of it.
    """

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

    def __init__(self, flat: torch.Tensor) -> None:
        self.what = "whole"
        self.before_bytes = self.after_bytes = flat.nbytes
        self._dtype = flat.dtype
        self._whole: Untouched | None = Untouched(flat)
        self._kept: Kept | None = None
        self._wide: weakref.ref[torch.UntypedStorage] | None = None

    def keep(self, kept: Kept, what: str) -> None:
        """Let it go, and keep that in its place."""
        self._whole, self._kept, self.what = None, kept, what
        self.after_bytes = kept.num_bytes

    def give_back(self, flat: torch.Tensor) -> None:
        """Keep what was packed as it is, by reference."""
        self._whole, self._kept = Untouched(flat), None

    def pack(self, store: Store) -> None:
        """Pack it, if it fits and nobody wrote it; else its readers will be told."""
        assert self._whole is not None, "packed twice"
        if self._whole.is_as_it_was():
            kept = store.put(self._whole.get())
            if kept is not None:
                self.keep(kept, "packed")

    def is_as_it_was(self) -> bool:
        """Whether it is whole, and nobody wrote it since."""
        return self._whole is not None and self._whole.is_as_it_was()

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


@final
class View:
    """A saved tensor: where it lies in what was packed."""

    __slots__ = ("_offset", "_packed", "_size", "_stride")

    def __init__(self, packed: Packed, tensor: torch.Tensor) -> None:
        self._packed = packed
        self._size, self._stride = tensor.shape, tensor.stride()
        self._offset = tensor.storage_offset()

    def get(self) -> torch.Tensor:
        """Return it as it was."""
        return self._packed.get().as_strided(self._size, self._stride, self._offset)


@final
class Packer:
    """Packs and unpacks what one forward saves.

    Args:
        model: Whose weights and buffers are left alone.
        store: Where the rest goes.
        inputs: In which tensors are left alone, too.
        derive: Whether cheap saves are computed again.
    """

    def __init__(
        self, model: nn.Module, store: Store, inputs: Any, *, derive: bool
    ) -> None:
        self._store = store
        self._takes = store.takes
        self.recipes = Recipes(self._source_of) if derive else None
        weights, buffers = _weights_and_buffers(model)
        self._held = dict.fromkeys(map(_key, (*weights, *buffers)), _WEIGHT)
        for tensor in _tensors_in(inputs):
            self._held[_key(tensor)] = "an input"
        self._inputs = inputs  # held, so that no other tensor gets their address
        self._weights = weights
        self._known: dict[int, _Known] = {}
        self._waiting: Packed | None = None
        self._source: Source | None = None  # what waits, as its operator read it
        self._largest = 0
        self.left_alone: Counter[str] = Counter()
        self.before_bytes = self.after_bytes = 0
        self.num: Counter[str] = Counter()

    def pack(self, tensor: torch.Tensor) -> View | Untouched:
        """Take what autograd saves; return what it shall hold in its place."""
        if type(tensor) not in _CLASSES or tensor.layout is not _STRIDED:
            return self._left(tensor.detach(), "not a plain dense tensor")
        storage = tensor.untyped_storage()
        key: int = storage._cdata  # noqa: SLF001 -- no public name
        reason = self._held.get(key)
        if reason is not None:  # a weight is no result of what saves it
            return self._left(tensor if reason is _WEIGHT else tensor.detach(), reason)
        reason = self._reason_to_leave(tensor)
        if reason is not None:
            result = tensor.requires_grad
            return self._left(tensor.detach() if result else tensor, reason)
        packed = self._found(tensor)
        if packed is None:
            if storage.nbytes() > _MUCH_LARGER * tensor.nbytes:
                tensor = tensor.clone()
                return View(self._packed(tensor), tensor)
            packed = self._derived(tensor) or self._packed(tensor)
            self._known[key] = (
                weakref.ref(storage),
                tensor._version,  # noqa: SLF001 -- as above
                tensor.dtype,
                weakref.ref(packed),
            )
        return View(packed, tensor)

    @staticmethod
    def unpack(saved: View | Untouched) -> torch.Tensor:
        """Return what autograd saved."""
        return saved.get()

    def close(self, outputs: Any) -> None:
        """Keep what the model returned as it is: whoever called it holds it anyway."""
        for tensor in _tensors_in(outputs):
            packed = self._found(tensor)
            if packed is None:
                continue
            self.left_alone["an output"] += 1
            if packed is self._waiting:
                self._waiting = self._source = None
            else:
                self._count(packed, -1)
                packed.give_back(_flat(tensor))
        self._settle()
        self._inputs = None
        self._weights = []
        self._known.clear()
        self.recipes = None

    def _left(self, tensor: torch.Tensor, reason: str) -> Untouched:
        self.left_alone[reason] += 1
        return Untouched(tensor)

    def _reason_to_leave(self, tensor: torch.Tensor) -> str | None:
        dtype, num_bytes = tensor.dtype, tensor.nbytes
        reason = None
        takes = dtype in self._takes or tensor.is_floating_point()
        if not takes or tensor.is_neg() or tensor.is_conj():
            reason = _name_of(dtype)
        elif num_bytes < SMALL:
            reason = "small"
        elif self.recipes is None:
            reason = self._reason_not_to_store(tensor)
        if reason is None and num_bytes < self._largest // _MUCH_SMALLER:
            # of a norm or a softmax: few numbers on which many depend
            reason = None if tensor.requires_grad else "a statistic"
        self._largest = max(self._largest, num_bytes)
        return reason

    def _reason_not_to_store(self, tensor: torch.Tensor) -> str | None:
        dtype = tensor.dtype
        if dtype not in self._takes:
            return _name_of(dtype)
        # by shape and format: which weight it is a cast of, nobody knows
        held_in = self._shapes.get(tensor.shape, dtype)
        return None if held_in is dtype else "a cast of a weight"

    @functools.cached_property
    def _shapes(self) -> dict[tuple[int, ...], torch.dtype]:
        """Formats of weights by their shapes, of which casts may be saved."""
        return {
            shape: weight.dtype
            for weight in self._weights
            if weight.ndim > 1 and self._takes != {weight.dtype}
            for shape in (weight.shape, weight.shape[::-1])
        }

    def _packed(self, tensor: torch.Tensor) -> Packed:
        """Pack a storage, or let it wait for the next one."""
        packed = Packed(_flat(tensor))
        if self.recipes is not None:
            reason = self._reason_not_to_store(tensor)
            if reason is not None:  # others may be derived from it
                self.left_alone[reason] += 1
                packed.what = "left alone"
                return packed
        if self._store.halves and self.recipes is None:
            if self._follows(packed, tensor):
                return packed
            self._settle()
            if fills_its_memory(tensor):
                self._waiting = packed
                self._source = Source(tensor, View(packed, tensor).get)
                return packed
        packed.pack(self._store)
        self._count(packed, 1)
        return packed

    def _follows(self, packed: Packed, tensor: torch.Tensor) -> bool:
        """Make a pair of a storage and the one that waits, if it follows from it."""
        waiting, source = self._waiting, self._source
        if waiting is None or source is None or not waiting.is_as_it_was():
            return False
        again = source.leads_to(tensor)
        if again is None:
            return False
        packed.keep(Follows(source.get, again), "derived")
        waiting.what = "paired"
        self._waiting = self._source = None
        self._count(waiting, 1)
        self._count(packed, 1)
        return True

    def _settle(self) -> None:
        """Pack what waits: nothing follows from it."""
        waiting, self._waiting, self._source = self._waiting, None, None
        if waiting is not None:
            waiting.pack(self._store)
            self._count(waiting, 1)

    def _found(self, tensor: torch.Tensor) -> Packed | None:
        """What it was packed into, unless its memory was freed or written since."""
        storage = tensor.untyped_storage()
        known = self._known.get(storage._cdata)  # noqa: SLF001 -- no public name
        if known is None:
            return None
        of, version, dtype, packed = known
        same = of() is storage and version == tensor._version  # noqa: SLF001 -- as above
        return packed() if same and dtype is tensor.dtype else None

    def _source_of(
        self, tensor: torch.Tensor
    ) -> weakref.ref[Packed] | torch.Tensor | None:
        """What gives a tensor in the backward: a weight itself, or a save."""
        if self._held.get(_key(tensor)) == _WEIGHT:
            return tensor
        packed = self._found(tensor)
        return None if packed is None else weakref.ref(packed)

    def _derived(self, tensor: torch.Tensor) -> Packed | None:
        recipe = None if self.recipes is None else self.recipes.recipe_of(tensor)
        held = None if recipe is None else recipe.held()
        if held is None:
            return None
        packed = Packed(_flat(tensor))
        packed.keep(held, "derived")
        self._count(packed, 1)
        return packed

    def _count(self, packed: Packed, sign: int) -> None:
        if packed.what == "left alone":
            return
        self.num[packed.what] += sign
        self.before_bytes += sign * packed.before_bytes
        self.after_bytes += sign * packed.after_bytes


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
    # a view would hold the tensor that it is of, and with it the node that holds it
    return tensor.detach().as_strided((num_numbers,), (1,), 0)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
