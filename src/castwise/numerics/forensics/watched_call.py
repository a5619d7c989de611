"""One call of an operator, watched: what it read, what it wrote, and once more in fp64.

Contents are looked at before an operator runs that writes over its operands, and after
it otherwise. Operands never written to, as `empty` returns them, do not count.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from castwise.numerics.operator_call import address, describe, floating

if TYPE_CHECKING:
    from torch._ops import OpOverload

_OVERWRITES = frozenset({"copy_", "fill_", "zero_", "normal_", "uniform_"})
_GROWS = frozenset(
    {"add", "addmm", "baddbmm", "bmm", "convolution", "cosh", "cumsum", "dot", "exp"}
    | {"exp2", "expm1", "matmul", "mm", "mul", "mv", "prod", "sinh", "sub", "sum"}
)
_OF_TWO = frozenset({"add", "div", "mul", "pow", "sub"})
_ZERO_BY_RANGE = frozenset({"exp", "exp2", "sigmoid", "softmax"})
_ZERO_OF_NONZERO = frozenset({"cast", "div", "mul", "pow", "reciprocal"})


@dataclass(kw_only=True)
class WatchedCall:
    """A call that runs now, or has run."""

    func: OpOverload
    """What was called."""

    args: tuple[Any, ...]
    """With contents as they were before."""

    kwargs: dict[str, Any]
    """As `args`."""

    given: tuple[tuple[Any, ...], dict[str, Any]]
    """The arguments as they were given, to be written to."""

    read: list[torch.Tensor]
    """Floating operands whose contents count."""

    overwritten: list[torch.Tensor] | None
    """Those that were not finite before they were written over; none if none were."""

    name: str = ""
    """ATen name without overload, as the operator table spells it, or `cast`."""

    written: list[torch.Tensor] = field(default_factory=list)
    """Floating results and operands that were written to."""

    @classmethod
    def opened(
        cls,
        func: OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        unwritten: Container[int],
    ) -> Self:
        """Look at what a call is about to read."""
        counted = args[1:] if _bare_name(func) in _OVERWRITES else args
        read = [
            each
            for each in floating((counted, kwargs))
            if address(each) not in unwritten
        ]
        overwritten, before = None, (args, kwargs)
        if func._schema.is_mutable:  # noqa: SLF001 -- the schema has no public name
            overwritten = [each for each in read if not is_finite(each)]
            before = tree_map(_copied, before)
        return cls(
            func=func,
            args=before[0],
            kwargs=before[1],
            given=(args, kwargs),
            read=read,
            overwritten=overwritten,
        )

    def close(self, result: Any) -> None:
        """Look at what it wrote."""
        described = describe(self.func, *self.given, result)
        name = described.op if described else _bare_name(self.func)
        self.name = name.removesuffix("_") or name
        self.written = _written(self.func, *self.given, result)

    @functools.cached_property
    def bad_read(self) -> list[torch.Tensor]:
        """The operands that are not finite; asked when a result is not."""
        if self.overwritten is not None:
            return self.overwritten
        return [each for each in self.read if not is_finite(each)]

    @property
    def is_unwritten(self) -> bool:
        """Whether it only makes memory, whose contents mean nothing."""
        return self.name.startswith(("empty", "new_empty", "resize"))

    @property
    def grows(self) -> bool:
        """Whether an infinity among its results has grown, and is no pole."""
        return self.name in _GROWS

    def largest_input(self) -> float:
        """The largest finite magnitude among the operands."""
        return max(map(_largest, self.read), default=0.0)

    def is_told_inf(self) -> bool:
        """Whether an infinity stands among its numbers, as in masked_fill."""
        return any(map(math.isinf, self.numbers()))

    def numbers(self) -> list[float]:
        """The Python numbers among its arguments."""
        given = (*self.args, *self.kwargs.values())
        return [each for each in given if type(each) in {int, float}]

    def in_fp64(self) -> list[torch.Tensor] | None:
        """What it gives in fp64; none where the operator has no such form."""
        args, kwargs = tree_map(_widened, (self.args, self.kwargs))
        try:
            result = self.func(*args, **kwargs)
        # What an operator without an fp64 kernel raises is its own choice: PyTorch's
        # raise both. The caller then judges by the operands, and by whether
        # the operator can grow.
        except (RuntimeError, TypeError):  # no fp64 kernel
            return None
        return _written(self.func, args, kwargs, result)

    def flushes(self, made: torch.Tensor) -> bool:
        """Whether it made 0 out of numbers that are not."""
        if made.is_sparse or not self.read:
            return False
        zero = _numbers(made) == 0
        if self.name in _ZERO_BY_RANGE:
            return bool(zero.any())
        if self.name not in _ZERO_OF_NONZERO or 0 in self.numbers():
            return False
        for each in self.read[:1] if self.name == "pow" else self.read:
            zero = zero & (_numbers(each) != 0)
        return bool(zero.any())

    def values_at(self, made: torch.Tensor) -> tuple[float, ...]:
        """The operands at the first bad place, where all have the result's shape."""
        operands = [each for each in floating((self.args, self.kwargs)) if each.numel()]
        fits = all(each.dim() == 0 or each.shape == made.shape for each in operands)
        odd = any(each.is_sparse or each.is_complex() for each in (*operands, made))
        if not operands or not fits or odd:
            return ()
        place = int((~torch.isfinite(_numbers(made))).flatten().nonzero()[0])
        told = tuple(
            float(_numbers(each).flatten()[place if each.dim() else 0])
            for each in operands
        )
        number = self.numbers() if self.name in _OF_TWO else []
        return (*told, *map(float, number[:1])) if len(told) == 1 else told


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers of a floating or complex tensor are finite.

    A finite 2-norm is the fast answer; its squares may overflow, so only the numbers
    themselves can say no.
    """
    numbers = _numbers(tensor)
    wide = torch.promote_types(numbers.dtype, torch.float32)
    norm = torch.linalg.vector_norm(numbers, dtype=wide)
    return math.isfinite(norm.item()) or bool(torch.isfinite(numbers).all())


def has_zero(tensor: torch.Tensor) -> bool:
    """Whether a number of a tensor is 0."""
    return bool((_numbers(tensor) == 0).any())


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor in a form that every operator can read."""
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor._values()  # noqa: SLF001 -- the only view of them
    return tensor.float() if tensor.itemsize == 1 else tensor


def has_nan(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether a tensor holds NaN."""
    return any(bool(torch.isnan(_numbers(each)).any()) for each in tensors)


def _largest(tensor: torch.Tensor) -> float:
    sizes = _numbers(tensor).abs()
    if not sizes.numel():
        return 0.0
    sizes = sizes.to(torch.promote_types(sizes.dtype, torch.float32))
    finite = torch.where(sizes.isfinite(), sizes, torch.zeros_like(sizes))
    return float(finite.max())


def is_fake(value: Any) -> bool:
    """Whether a graph is being captured, and nothing runs."""
    return any(isinstance(each, FakeTensor) for each in floating(value))


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.is_complex():
            return value.detach().to(torch.complex128)
        return value.detach().double() if value.is_floating_point() else value
    low = isinstance(value, torch.dtype) and value.is_floating_point
    return torch.float64 if low else value


def _bare_name(func: OpOverload) -> str:
    name: str = func._schema.name  # noqa: SLF001 -- the schema has no public name
    return name.rpartition("::")[2]


def _written(
    func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> list[torch.Tensor]:
    """The floating tensors that a call wrote, in place ones included."""
    found = list(floating(result))
    for place, argument in enumerate(func._schema.arguments):  # noqa: SLF001 -- as above
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            found.extend(floating(given))
    return list({id(each): each for each in found}.values())
