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
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, final

import torch
from torch.autograd.graph import saved_tensors_hooks

from castwise.errors import SettingsError
from castwise.memory.packer import Packer
from castwise.memory.save_formats import AS_IS, Store, store_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn


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

    num_paired: int = 0
    """Storages that stay as they are, because one that is derived follows from them."""

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


def total(bills: Iterable[SavesBill]) -> SavesBill:
    """Add bills up."""
    each = list(bills)
    left = Counter[str]()
    for bill in each:
        left.update(bill.left_alone)
    return SavesBill(
        before_bytes=sum(bill.before_bytes for bill in each),
        after_bytes=sum(bill.after_bytes for bill in each),
        num_packed=sum(bill.num_packed for bill in each),
        num_whole=sum(bill.num_whole for bill in each),
        num_derived=sum(bill.num_derived for bill in each),
        num_paired=sum(bill.num_paired for bill in each),
        left_alone=left,
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
        self._packer: Packer | None = None
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
        num = self._packer.num
        return SavesBill(
            before_bytes=self._packer.before_bytes,
            after_bytes=self._packer.after_bytes,
            num_packed=num["packed"],
            num_whole=num["whole"],
            num_derived=num["derived"],
            num_paired=num["paired"],
            left_alone=dict(self._packer.left_alone),
        )

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
        packer = Packer(self._model, self._store, spared, derive=self._derive)
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
