"""What a captured node is known to produce: its format, size and storage, by its fake.

Dynamo leaves a fake tensor with each node, made by running the operator without its
numbers. Views of one tensor share its storage there, and a write raises the version of
all of them, so that aliases need no list of operators.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import fx

PLANNED = torch.float32
"""Values of this dtype are planned; others stay as they were captured."""


def value_of(node: fx.Node) -> Any:
    """The fake that a node produces; none where Dynamo left none."""
    return node.meta.get("example_value")


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a value, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))


def is_floating(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds floating or complex numbers."""
    return tensor.is_floating_point() or tensor.is_complex()


def is_planned(node: fx.Node) -> bool:
    """Whether a node makes floating values, and all of them fp32."""
    found = [t.dtype for t in tensors_of(value_of(node)) if is_floating(t)]
    return bool(found) and all(dtype is PLANNED for dtype in found)


def is_foreign(node: fx.Node) -> bool:
    """Whether a node makes floating values of another dtype, or complex ones."""
    found = [t.dtype for t in tensors_of(value_of(node)) if is_floating(t)]
    return any(dtype is not PLANNED for dtype in found)


def num_elements(node: fx.Node) -> int:
    """How many floating numbers a node makes, by hint where sizes are symbols."""
    return sum(_numel(t) for t in tensors_of(value_of(node)) if is_floating(t))


def has_dimensions(node: fx.Node) -> bool:
    """Whether a node makes a tensor of at least one dimension."""
    return any(tensor.dim() > 0 for tensor in tensors_of(value_of(node)))


def requires_grad(node: fx.Node) -> bool:
    """Whether a backward will come by here."""
    return any(tensor.requires_grad for tensor in tensors_of(value_of(node)))


def storages(node: fx.Node) -> set[int]:
    """What stands for the storages that a node's tensors live in."""
    return {
        int(tensor.untyped_storage()._cdata)  # noqa: SLF001 -- the identity of a storage that is fake has no public name
        for tensor in tensors_of(value_of(node))
        if tensor.layout is torch.strided  # others have none
    }


def was_written(node: fx.Node) -> bool:
    """Whether one of a node's tensors was written to while the graph was captured."""
    return any(
        not tensor.is_inference()  # those keep no version
        and bool(tensor._version)  # noqa: SLF001 -- no public name
        for tensor in tensors_of(value_of(node))
    )


def _numel(tensor: torch.Tensor) -> int:
    """The product of sizes; comparing a symbol would install a guard, so by hint."""
    return math.prod(map(_hint, tensor.shape))


def _hint(size: Any) -> int:
    if isinstance(size, int):
        return size
    try:
        return int(size.node.hint)
    except (AttributeError, TypeError, ValueError):
        return 1
