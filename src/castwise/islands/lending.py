"""Weights lent to modules for the length of a passage, and taken back.

A forward reads its weights from the module's own slots: its parameters, the plain
attributes that hooks of `torch.nn.utils` compute for it, and in recurrent layers a list
of the parameters. Whoever wants it to see other tensors there, such as casts of the
weights, puts them in and gives the originals back. A module whose weights are lent
belongs to one thread meanwhile.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import torch

from castwise.islands.crossing import cast_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

Slots = list[dict[str, Any]]
"""For each of some modules, what stands in its slots, by name."""

lock = threading.RLock()
"""Held while weights are lent."""

_NOTHING = contextlib.nullcontext()
_FLAT = "_flat_weights"  # the list that recurrent layers of torch.nn read


def slots_of(owners: Sequence[nn.Module]) -> Slots:
    """List what the forwards of modules read; not of those below them.

    What another thread has lent to them meanwhile is not listed: this waits for it.
    """
    with _undisturbed():
        return [dict(_slots(owner)) for owner in owners]


def _undisturbed() -> contextlib.AbstractContextManager[Any]:
    return _NOTHING if torch.compiler.is_compiling() else lock


@contextlib.contextmanager
def lent(owners: Sequence[nn.Module], slots: Slots) -> Iterator[None]:
    """Let modules see other tensors in their slots, and give the originals back."""
    with _undisturbed():
        before = [dict(_slots(owner)) for owner in owners]
        flat = [getattr(owner, _FLAT, None) for owner in owners]
        try:
            for owner, values in zip(owners, slots, strict=True):
                _fill(owner, values)
            yield
        finally:
            for owner, values, each in zip(owners, before, flat, strict=True):
                _fill(owner, values)
                if each is not None:
                    vars(owner)[_FLAT] = each


def cast_weights(
    owners: Sequence[nn.Module], dtype: torch.dtype
) -> contextlib.AbstractContextManager[None]:
    """Let modules see differentiable casts of their weights."""
    casts: dict[int, Any] = {}  # tied weights stay tied
    slots = slots_of(owners)
    for values in slots:
        for name, weight in values.items():
            if weight is not None:
                cast = casts.setdefault(id(weight), cast_tensor(weight, dtype))
                values[name] = cast
    return lent(owners, slots)


def _slots(owner: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from owner._parameters.items()  # noqa: SLF001 -- assignment by name would refuse a tensor
    if torch.compiler.is_compiling():
        return
    for name, value in vars(owner).items():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            yield name, value


def _fill(owner: nn.Module, values: dict[str, Any]) -> None:
    parameters = owner._parameters  # noqa: SLF001 -- as above
    for name, value in values.items():
        if name in parameters:
            parameters[name] = value
        else:
            vars(owner)[name] = value
    if not torch.compiler.is_compiling() and _FLAT in vars(owner):
        names = vars(owner)["_flat_weights_names"]
        vars(owner)[_FLAT] = [getattr(owner, name, None) for name in names]
