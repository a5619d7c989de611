"""An island is the module itself under another class: only `forward` is new.

    class Linear'(Linear):                       # one for each class, made on demand
        def forward(self, *args, **kwargs):      # cast in, run Linear.forward, cast out

Nothing is wrapped and nothing is patched on the instance, so `isinstance`, hooks,
`state_dict` keys, attributes and signatures stay as they were. The class cannot be
imported by name, so a module is copied and pickled as its own class plus a note that it
was an island, and becomes one again on arrival; reading such a pickle needs castwise.

A module that `torch.nn.utils.parametrize` gave a class of its own keeps it on top:

    ParametrizedLinear(Linear)   ->   ParametrizedLinear(Linear'(Linear))
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from castwise.islands.border import Island

NOTE = "_castwise_island"
"""The instance attribute that holds the island's borders; no tensor, no module."""

_classes: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()
_bases: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def island_of(module: nn.Module) -> Island | None:
    """The island that a module is, or none."""
    note: Island | None = module.__dict__.get(NOTE)
    return note


def own_class(module: nn.Module) -> type:
    """The class that a module has without castwise."""
    return next(cls for cls in type(module).__mro__ if cls not in _bases)


def make_island(module: nn.Module, island: Island) -> None:
    """Give a module the class of islands, and the note that says what happens."""
    if island_of(module) is None:
        base = type(module)
        if _is_parametrized_class(base):
            base = base.__bases__[0]
        module.__class__ = _with_base(type(module), base, _island_class(base))
    module.__dict__[NOTE] = island


def unmake_island(module: nn.Module) -> None:
    """Give a module its own class back and take the note away."""
    if module.__dict__.pop(NOTE, None) is None:
        return
    island = next(cls for cls in type(module).__mro__ if cls in _bases)
    module.__class__ = _with_base(type(module), island, _bases[island])


def _is_parametrized_class(cls: type) -> bool:
    """Whether `torch.nn.utils.parametrize` made this class for one instance."""
    return (
        cls.__module__ == "torch.nn.utils.parametrize"
        and len(cls.__bases__) == 1
        and cls.__name__ == f"Parametrized{cls.__bases__[0].__name__}"
    )


def _with_base(cls: type, old: type, new: type) -> type:
    """Rebuild a class so that `new` stands where `old` stood below it."""
    if cls is old:
        return new
    if old not in cls.__mro__:
        return cls  # a mixin, such as that of FSDP2, stays itself
    body = {
        name: value
        for name, value in vars(cls).items()
        if name not in ("__dict__", "__weakref__")
    }
    bases = tuple(_with_base(base, old, new) for base in cls.__bases__)
    return type(cls)(cls.__name__, bases, body)


def _island_class(base: type) -> type:
    """The class of islands over a class; made once, and it looks like that class."""
    with _lock:
        found = _classes.get(base)
        if found is None:
            found = _make_class(base)
            _classes[base] = found
            _bases[found] = base
        return found


def _make_class(base: Any) -> type:
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        island = island_of(self)
        if island is None:
            return base.forward(self, *args, **kwargs)
        return island.run(self, base.forward, args, kwargs)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:  # noqa: N807 -- becomes the method of that name
        rebuild, args, *rest = base.__reduce_ex__(self, protocol)
        args = tuple(base if arg is cls else arg for arg in args)
        return _arrive, (rebuild, args), *rest

    cls = type(
        base.__name__,
        (base,),
        {
            "forward": forward,
            "__reduce_ex__": __reduce_ex__,
            "__doc__": base.__doc__,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
        },
    )
    return cls


def _arrive(rebuild: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    """Rebuild a copied or unpickled island; its note comes with its state."""
    module = rebuild(*args)
    module.__class__ = _island_class(type(module))
    return module
