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
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from castwise.fp8_products import round_straight_through

if TYPE_CHECKING:
    from collections.abc import Sequence

_PLAIN = (bool, int, float, str, bytes, type(None))  # hold no tensor, and are met often
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


class Walk(ABC):
    """Exchanges leaves of nested values; containers are copied where one changes."""

    __slots__ = ("_seen",)

    def __init__(self) -> None:
        # what was met, by identity, and what it became; a graph knows no identities
        self._seen: dict[int, Any] | None = (
            None if torch.compiler.is_compiling() else {}
        )

    @abstractmethod
    def _leaf(self, value: Any) -> Any:
        """What stands in place of a leaf, or the value itself."""

    def values(self, value: Any) -> Any:
        """Exchange every leaf in `value`, wherever it stands."""
        if isinstance(value, torch.Tensor):
            return self._leaf(value)
        if isinstance(value, _PLAIN):
            return value
        seen = self._seen
        if seen is not None and id(value) in seen:
            return seen[id(value)]
        parts = _parts(value)
        if parts is None:
            return self._leaf(value)
        if seen is not None:
            seen[id(value)] = value  # a container inside itself passes as it is
        changed = {}
        for key, part in parts.items():
            new = self.values(part)
            if new is not part:
                changed[key] = new
        result = _rebuilt(value, parts, changed) if changed else value
        if seen is not None:
            seen[id(value)] = result
        return result


class Crossing(Walk):
    """Casts what crosses a border in one direction, and remembers it.

    Args:
        dtype: What floating tensors become.
    """

    __slots__ = ("_dtype", "made")

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self.made: list[torch.Tensor] = []
        """Tensors that had to be cast, as they are now."""

    def _leaf(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype is self._dtype:
            return value
        seen = self._seen
        if seen is not None and id(value) in seen:
            return seen[id(value)]
        cast = cast_tensor(value, self._dtype)
        if cast is not value:
            self.made.append(cast)
        if seen is not None:
            seen[id(value)] = cast
        return cast


class Rounding(Walk):
    """Rounds what leaves an island to a format in which no tensor is computed with.

    Args:
        fmt: `fp8_e4m3` or `fp8_e5m2`; the numbers are held in bf16.
    """

    __slots__ = ("_fmt",)

    def __init__(self, fmt: str) -> None:
        super().__init__()
        self._fmt = fmt

    def _leaf(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return round_straight_through(value, self._fmt)


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Stands where a tensor stood in a nested value, and says which one."""

    index: int
    """Which of the tensors."""


class TakeOut(Walk):
    """Takes the tensors out of nested values and leaves their places behind."""

    __slots__ = ("tensors",)

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []
        """What was found, each once, in order."""

    def _leaf(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        for index, tensor in enumerate(self.tensors):
            if tensor is value:
                return Place(index)
        self.tensors.append(value)
        return Place(len(self.tensors) - 1)


class PutBack(Walk):
    """Puts tensors into the places that `TakeOut` left.

    Args:
        tensors: One for each that was taken out, in that order.
    """

    __slots__ = ("_tensors",)

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def _leaf(self, value: Any) -> Any:
        return self._tensors[value.index] if isinstance(value, Place) else value


def tensors_in(value: Any) -> list[torch.Tensor]:
    """List the tensors in `value` that a cast would find."""
    found: list[torch.Tensor] = []
    pending, met = [value], set()
    while pending:
        each = pending.pop()
        if isinstance(each, torch.Tensor):
            found.append(each)
        elif not isinstance(each, _PLAIN) and id(each) not in met:
            met.add(id(each))
            pending.extend((_parts(each) or {}).values())
    return found


def _parts(value: Any) -> dict[Any, Any] | None:
    """What a container holds, by key, position or field; `None` for anything else."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if isinstance(value, Place):
        return None
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
