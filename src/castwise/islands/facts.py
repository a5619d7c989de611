"""What a policy may know about a model: its modules and buffers, by name and type."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from castwise.islands.swap import own_class
from castwise.policy.keys import ModuleFacts

if TYPE_CHECKING:
    from collections.abc import Iterator

BUFFER = "Buffer"
"""The type under which a rule finds floating buffers."""


def module_facts(model: nn.Module) -> list[ModuleFacts]:
    """List every module and every floating buffer, under each of its names.

    A buffer counts as a module of type `Buffer`, so that a rule can name it.
    """
    facts = [
        ModuleFacts(fqn=fqn, types=type_names(own_class(module)))
        for fqn, module in model.named_modules(remove_duplicate=False)
    ]
    facts.extend(
        ModuleFacts(fqn=join(fqn, name), types=(BUFFER,))
        for fqn, module in model.named_modules(remove_duplicate=False)
        for name, _ in floating_buffers(module)
    )
    return facts


def type_names(cls: type) -> tuple[str, ...]:
    """Bare and qualified names of a class and of the classes above it, once each.

    A class that `torch.nn` exports is also known as `torch.nn.Linear`.
    """
    names: dict[str, None] = {}
    for each in cls.__mro__[:-1]:  # `object` says nothing
        names[each.__name__] = None
        names[f"{each.__module__}.{each.__qualname__}"] = None
        if getattr(nn, each.__name__, None) is each:
            names[f"torch.nn.{each.__name__}"] = None
    return tuple(names)


def floating_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a module's own floating and complex buffers by name."""
    for name, buffer in module._buffers.items():  # noqa: SLF001 -- its own, not those below it
        if buffer is not None and (buffer.is_floating_point() or buffer.is_complex()):
            yield name, buffer


def join(fqn: str, name: str) -> str:
    """Join a module's fqn and the name of something it owns."""
    return f"{fqn}.{name}" if fqn else name


def shown(fqn: str) -> str:
    """Name a module in a message; the root has no name of its own."""
    return repr(fqn) if fqn else "the whole model"
