"""Saves that need not be stored: cheap to compute again from saves that are.

    hidden = gelu(up(x))        gelu saves its input; the next product saves its output
    normed = layer_norm(x)      layer_norm saves its input; the next product its output

Both outputs follow from what is saved anyway, by one cheap operator. While a forward
runs, `Recipes` notes how such tensors came about: the operator, and its arguments as
places among the weights, the saves and other recipes, never as tensors, so that nothing
is held for it. When autograd wants to save one of them, the recipe is saved instead,
with the saves that it starts from. In the backward the same kernel runs on the same
numbers: gradients are the same bits, and of the activations of a transformer some 40 %
are never stored. It is a recompute of the cheap half of a block, without its products.

A recipe holds as long as nothing that it started from was changed in place.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from castwise.memory.save_formats import Kept

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch._ops import OpOverload

_aten = torch.ops.aten

Source = Callable[[torch.Tensor], "weakref.ref[Any] | torch.Tensor | None"]
"""Tensor -> what gives its memory in the backward, or the tensor if it stays anyway."""


def _first(results: Any) -> torch.Tensor:
    tensor: torch.Tensor = results[0] if isinstance(results, tuple) else results
    return tensor


def _batch_norm(*args: Any) -> Any:
    """Normalise by the batch once more, and let the running statistics alone."""
    x, weight, bias, _, _, training, *rest = args
    assert training, "a recipe of a norm that did not train"
    eps = rest[-1] if rest[-1] is not True else rest[-2]
    return _aten.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)


_CHEAP: Mapping[Any, Callable[..., Any]] = {
    **{
        op.default: op.default
        for op in (
            _aten._to_copy,  # noqa: SLF001 -- its name
            _aten.clone,
            _aten.elu,
            _aten.gelu,
            _aten.hardswish,
            _aten.leaky_relu,
            _aten.mish,
            _aten.native_group_norm,
            _aten.native_layer_norm,
            _aten.relu,
            _aten.silu,
            _aten.softplus,
        )
    },
    _aten.mul.Tensor: _aten.mul.Tensor,
    _aten._fused_rms_norm.default: _aten._fused_rms_norm.default,  # noqa: SLF001 -- its name
    _aten.native_batch_norm.default: _batch_norm,
}
"""Operators that are worth running twice, and what runs the second time."""


@dataclass(frozen=True, slots=True)
class _Place:
    """An argument: where it lies in the memory that a source gives."""

    source: Any  # of a tensor that stays: itself; else a weak reference, or a recipe
    size: Sequence[int]
    stride: Sequence[int]
    offset: int
    version: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one storage came about."""

    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    storage: StorageWeakRef
    version: int
    num_numbers: int

    def held(self) -> Held | None:
        """Take hold of all that it starts from; none where something is gone."""
        found = [_held(arg) for arg in self.args]
        if any(each is _GONE for each in found):
            return None
        return Held(self, found)


class _Gone:
    """Stands for an argument that is there no more."""


_GONE = _Gone()


@final
class Held(Kept):
    """A recipe with hold of its sources; what autograd keeps instead of a tensor."""

    num_bytes = 0

    def __init__(self, recipe: Recipe, args: Sequence[Any]) -> None:
        self._recipe = recipe
        self._args = args

    def get(self) -> torch.Tensor:
        """Compute it again, in the formats of then and without a graph."""
        recipe = self._recipe
        args = [arg() if isinstance(arg, _Argument) else arg for arg in self._args]
        with torch.no_grad(), torch._C._DisableAutocast():  # noqa: SLF001 -- no public name
            result = _first(recipe.run(*args, **recipe.kwargs))
        return result.as_strided((recipe.num_numbers,), (1,), 0)


@dataclass(frozen=True, slots=True)
class _Argument:
    """An argument that is there: gives the tensor."""

    source: Any
    place: _Place

    def __call__(self) -> torch.Tensor:
        if isinstance(self.source, torch.Tensor):
            return self.source
        flat: torch.Tensor = self.source.get()
        return flat.as_strided(self.place.size, self.place.stride, self.place.offset)


def _held(arg: Any) -> Any:
    if not isinstance(arg, _Place):
        return arg
    source = arg.source
    if isinstance(source, Recipe):
        source = source.held()
    elif isinstance(source, torch.Tensor):
        unchanged = source._version == arg.version  # noqa: SLF001 -- no public name
        source = source if unchanged else None
    else:
        source = source()
    return _GONE if source is None else _Argument(source, arg)


@final
class Recipes(TorchDispatchMode):
    """Notes how cheap results came about while a forward runs.

    Args:
        source_of: Tells what gives a tensor in the backward.
    """

    def __init__(self, source_of: Source) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._source_of = source_of
        self._known: dict[int, Recipe] = {}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        run = _CHEAP.get(func)
        if run is not None and _can_run_again(func, args):
            self._note(run, args, kwargs, _first(results))
        return results

    def recipe_of(self, tensor: torch.Tensor) -> Recipe | None:
        """Return how the memory of a tensor came about, if that is known and holds."""
        key: int = tensor.untyped_storage()._cdata  # noqa: SLF001 -- no public name
        found = self._known.get(key)
        if (
            found is None
            or found.storage.expired()  # type: ignore[no-untyped-call]
            or found.version != tensor._version  # noqa: SLF001 -- as above
        ):
            return None
        return found

    def _note(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: torch.Tensor,
    ) -> None:
        places = [
            self._place(arg) if isinstance(arg, torch.Tensor) else arg for arg in args
        ]
        if any(place is _GONE for place in places):
            return
        storage = result.untyped_storage()
        self._known[storage._cdata] = Recipe(  # noqa: SLF001 -- no public name
            run=run,
            args=tuple(places),
            kwargs=kwargs,
            storage=StorageWeakRef(storage),  # type: ignore[no-untyped-call]
            version=result._version,  # noqa: SLF001 -- as above
            num_numbers=storage.nbytes() // result.itemsize,
        )

    def _place(self, tensor: torch.Tensor) -> _Place | _Gone:
        source: Any = self._source_of(tensor)
        if source is None:
            source = self.recipe_of(tensor)
        if source is None:
            return _GONE
        return _Place(
            source,
            tensor.shape,
            tensor.stride(),
            int(tensor.storage_offset()),
            tensor._version,  # noqa: SLF001 -- no public name
        )


def _can_run_again(func: OpOverload, args: tuple[Any, ...]) -> bool:
    """Batch norm only where it normalises by the batch."""
    return func is not _aten.native_batch_norm.default or bool(args[5])
