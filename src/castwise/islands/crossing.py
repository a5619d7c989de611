"""Values that cross the border of an island: floating tensors change format, by copy.

A tensor is found in tuples, named tuples, lists, dictionaries and dataclasses, however
deep. Integers, booleans and everything else pass as they are; a complex tensor becomes
the complex format with the digits asked for (complex64 for fp32 and below, complex128
for fp64). A container in which nothing changes passes as the same object, so that a
cache handed in stays the caller's cache, and a tensor that is handed in twice is cast
once, so that `query is key` still holds inside. Casts are ordinary differentiable
operators: the gradient crosses back in the format of the value outside.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_COMPLEX = {torch.float64: torch.complex128}


def complex_of(dtype: torch.dtype) -> torch.dtype:
    """The complex format with at least the digits of a real one, complex64 or more."""
    return _COMPLEX.get(dtype, torch.complex64)


def cast_tensor(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast a floating or complex tensor; return any other as it is."""
    if tensor.is_floating_point():
        return tensor if tensor.dtype is dtype else tensor.to(dtype)
    if tensor.is_complex():
        return tensor.to(complex_of(dtype))
    return tensor


def cast_values(value: Any, dtype: torch.dtype) -> Any:
    """Cast every floating tensor in `value`, wherever it stands."""
    if torch.compiler.is_compiling():  # a graph has no use for object identities
        return _walk(value, lambda tensor: cast_tensor(tensor, dtype), None)
    return _walk(value, lambda tensor: cast_tensor(tensor, dtype), {})


def tensors_in(value: Any) -> list[torch.Tensor]:
    """List the tensors in `value` that a cast would find."""
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    _walk(value, note, {})
    return found


def _walk(
    value: Any,
    change: Callable[[torch.Tensor], torch.Tensor],
    seen: dict[int, Any] | None,
) -> Any:
    """Apply `change` to every tensor; `seen` maps what was met to what it became."""
    if isinstance(value, torch.Tensor):
        if seen is None:
            return change(value)
        if id(value) not in seen:
            seen[id(value)] = change(value)
        return seen[id(value)]
    parts = _parts(value)
    if parts is None:
        return value
    if seen is not None:
        if id(value) in seen:
            return seen[id(value)]
        seen[id(value)] = value  # a container inside itself passes as it is
    changed = {}
    for key, part in parts.items():
        new = _walk(part, change, seen)
        if new is not part:
            changed[key] = new
    result = _rebuilt(value, parts, changed) if changed else value
    if seen is not None:
        seen[id(value)] = result
    return result


def _parts(value: Any) -> dict[Any, Any] | None:
    """What a container holds, by key, position or field; `None` for anything else."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if hasattr(value, field.name)
        }
    return None


def _rebuilt(value: Any, parts: dict[Any, Any], changed: dict[Any, Any]) -> Any:
    """Copy a container with some of its parts changed; the original stays."""
    if isinstance(value, tuple):
        items = [changed.get(at, part) for at, part in parts.items()]
        named = hasattr(value, "_fields")
        return type(value)(*items) if named else type(value)(items)
    clone = copy.copy(value)
    if isinstance(value, dict | list):
        for key, part in changed.items():
            clone[key] = part
        return clone
    for name, part in changed.items():
        object.__setattr__(clone, name, part)  # the copy may be frozen, but it is ours
    return clone
