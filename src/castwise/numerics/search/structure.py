"""Tensors inside nested values: changed one by one, or listed in a fixed order.

What a module is called with and what it returns may be tensors in tuples, lists, dicts,
dataclasses and objects with attributes, such as a key-value cache. A search copies
them, makes them leaves of a graph of their own, and must meet them in the same order
every time. Everything else passes as it is.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# what is handed on as it is, though it has attributes
_WHOLE = (
    type,
    nn.Module,
    enum.Enum,
    types.FunctionType,
    types.MethodType,
    types.ModuleType,
)


class EachTensor:
    """Changes each floating or complex tensor of some values, the same one only once.

    Args:
        change: What a tensor becomes.
    """

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._change = change
        # originals are kept, so that no identity is given twice
        self._met: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._objects: dict[int, tuple[Any, Any]] = {}

    def values(self, value: Any) -> Any:
        """Return a value with its tensors changed; the value itself stays."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, tuple):
            parts = [self.values(each) for each in value]
            named = hasattr(value, "_fields")
            return type(value)(*parts) if named else type(value)(parts)
        if isinstance(value, list):
            return [self.values(each) for each in value]
        if isinstance(value, dict):
            return self._mapping(value)
        if isinstance(value, _WHOLE) or not hasattr(value, "__dict__"):
            return self._dataclass(value) if _has_slots(value) else value
        return self._object(value)

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        if id(tensor) not in self._met:
            self._met[id(tensor)] = tensor, self._change(tensor)
        return self._met[id(tensor)][1]

    def _mapping(self, value: dict[Any, Any]) -> dict[Any, Any]:
        clone = copy.copy(value)  # an ordered dict or a model's output stays what it is
        for key, part in value.items():
            clone[key] = self.values(part)
        return clone

    def _object(self, value: Any) -> Any:
        """Copy an object with state, such as a cache that a call appends to."""
        if id(value) in self._objects:
            return self._objects[id(value)][1]
        try:
            clone = copy.copy(value)
        except TypeError:
            return value  # it refuses to be copied, and so to be kept
        self._objects[id(value)] = value, clone
        for name, part in vars(value).items():
            clone.__dict__[name] = self.values(part)
        return clone

    def _dataclass(self, value: Any) -> Any:
        """Copy a dataclass that has slots in place of a dictionary."""
        clone = copy.copy(value)
        for field in dataclasses.fields(value):
            if hasattr(value, field.name):
                part = self.values(getattr(value, field.name))
                object.__setattr__(clone, field.name, part)  # it may be frozen; ours
        return clone


def _has_slots(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def copied(*values: Any) -> tuple[Any, ...]:
    """Copy values with their tensors, out of any graph."""
    each = EachTensor(lambda tensor: tensor.detach().clone())
    return tuple(map(each.values, values))


def floating_in(*values: Any) -> list[torch.Tensor]:
    """List floating and complex tensors, each once, in the order of a copy."""
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    each = EachTensor(note)
    for value in values:
        each.values(value)
    return found


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return the numbers of a tensor in a row, in float64, out of any graph."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.to(torch.float64).reshape(-1)
