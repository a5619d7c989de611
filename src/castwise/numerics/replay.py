"""Replays: a model, or a function, run again in a wider format on the same draws.

A reference is a deep copy whose weights, buffers and plain tensor attributes are wide,
on inputs that are wide, and it must not fall back: a `.float()`, a `dtype=` or a new
`torch.zeros(n)` in the user's own code would quietly cut float64 down to fp32. While a
replay runs, `Wide` stands between the code and PyTorch and widens those as well; where
it did is kept, with the line. What cannot run wide is told by operator and line.

Dropout makes two runs incomparable unless both drop the same elements, and PyTorch
draws other numbers for other dtypes. Under `SameDraws` every random operator draws in
fp32 from the state of the generator, and what it drew is cast. With equal seeds all
replays then see the same masks and the same noise.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from castwise.dtypes import dtype_of
from castwise.errors import TargetError
from castwise.numerics.call_site import CallSites, is_of_user
from castwise.numerics.error import tensors_of
from castwise.numerics.operator_call import format_name

_COMPLEX = {"fp64": torch.complex128, "fp32": torch.complex64}
_HAND_CASTS = frozenset({"float", "half", "bfloat16", "double"})
_ACCESSORS = frozenset({"__get__", "__set__", "__delete__"})
_MAKES_FLOATS = frozenset(
    {"zeros", "ones", "empty", "eye", "linspace", "logspace", "rand", "randn"}
)
_MAKES_WHAT_IT_IS_GIVEN = frozenset({"full", "tensor", "as_tensor", "arange"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Lifted:
    """A format that the user's code names, and that a replay widened."""

    call: str
    """What names it: `float`, `to`, `zeros`."""

    module: str | None
    """fqn of the module; none outside of the model."""

    where: str
    """`file:line`."""

    format: str
    """The format that was asked for there."""


class Wide(TorchFunctionMode):
    """Runs code in one format or wider, whatever formats it names itself."""

    def __init__(self, model: nn.Module | None, fmt: str) -> None:
        super().__init__()
        self._real, self._complex = dtype_of(fmt), _COMPLEX[fmt]
        self._sites = CallSites(nn.Module() if model is None else model)
        self._lifted: dict[tuple[str, str], Lifted] = {}
        self.failed: str | None = None
        """The innermost call that raised, by name."""

    @property
    def lifted(self) -> tuple[Lifted, ...]:
        """What was widened, by line."""
        return tuple(self._lifted.values())

    def widen(self, value: Any) -> Any:
        """Return a tensor or dtype that is narrower as a wide one."""
        if isinstance(value, torch.Tensor):
            wide = self._wide_dtype(value.dtype)
            return value if wide is None else value.to(wide)
        if isinstance(value, torch.dtype):
            return self._wide_dtype(value) or value
        return value

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _ACCESSORS:
            return func(*args, **kwargs)
        try:
            if name in _HAND_CASTS:
                return self._hand_cast(func, name, args, kwargs)
            if name in _MAKES_FLOATS | _MAKES_WHAT_IT_IS_GIVEN:
                return self._make(func, name, args, kwargs)
            return self._call(func, name, args, kwargs)
        except Exception:
            self.failed = self.failed or name
            raise

    def _hand_cast(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        asked: torch.Tensor = func(*args, **kwargs)
        wide = self._wide_dtype(asked.dtype)
        if wide is None:
            return asked
        self._note(name, asked.dtype)
        return args[0].to(wide)

    def _make(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if kwargs.get("dtype") is None and name in _MAKES_FLOATS:
            kwargs = {**kwargs, "dtype": self.widen(torch.get_default_dtype())}
        if kwargs.get("dtype") is None:
            made: torch.Tensor = func(*args, **kwargs)
            wide = self._wide_dtype(made.dtype)
            if wide is None:
                return made
            kwargs = {**kwargs, "dtype": wide}
        return self._call(func, name, args, kwargs)

    def _call(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype) and self._wide_dtype(value) is not None:
                self._note(name, value)
        in_place = name.endswith("_") or name == "__setitem__"
        kept = args[:1] if in_place else ()
        rest = map(self._widened, args[len(kept) :])
        named = {
            key: value if key == "out" else self._widened(value)
            for key, value in kwargs.items()
        }
        return func(*kept, *rest, **named)

    def _widened(self, value: Any) -> Any:
        """Widen whatever a structure holds; most arguments hold nothing."""
        if isinstance(value, (torch.Tensor, torch.dtype)):
            return self.widen(value)
        if isinstance(value, (tuple, list, dict)):
            return tree_map(self.widen, value)
        return value

    def _wide_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        """The wide dtype for one that is narrower; none for all others."""
        if dtype.is_complex:
            return self._complex if dtype.itemsize < self._complex.itemsize else None
        if dtype.is_floating_point and dtype.itemsize < self._real.itemsize:
            return self._real
        return None

    def _note(self, name: str, dtype: torch.dtype) -> None:
        site = self._sites.here()
        if site.author == "user":
            self._lifted.setdefault(
                (name, site.where),
                Lifted(
                    call=name,
                    module=site.module,
                    where=site.where,
                    format=format_name(dtype),
                ),
            )


class SameDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets random operators draw the same numbers whatever dtype they draw for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if is_random(func):
            return _draw(func, args, kwargs)
        return func(*args, **kwargs)


@functools.cache
def is_random(func: Any) -> bool:
    """Whether an operator reads the state of a generator."""
    return torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())


def _draw(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.removeprefix("aten::")  # noqa: SLF001 -- the schema has no public name
    if "attention" in name:  # fused; without dropout it draws nothing
        return func(*args, **kwargs)
    if name == "native_dropout":
        scaled, mask = func(torch.ones_like(args[0], dtype=torch.float32), *args[1:])
        return args[0] * scaled.to(args[0].dtype), mask
    if name.endswith("_"):
        drawn = torch.empty_like(args[0], dtype=_narrow(args[0].dtype))
        func(drawn, *tree_map(_to_fp32, args[1:]), **kwargs)
        return args[0].copy_(drawn)
    dtype = kwargs.get("dtype")
    tensors = [tensor for _, tensor in tensors_of(args)]
    if "dtype" in kwargs:
        if dtype is None and not tensors:
            dtype = torch.get_default_dtype()
        kwargs = {**kwargs, "dtype": _narrow(dtype or tensors[0].dtype)}
    wanted = dtype or (tensors[0].dtype if tensors else None)
    result = func(*tree_map(_to_fp32, args), **kwargs)
    return (
        result if wanted is None else tree_map(lambda each: _to(each, wanted), result)
    )


def _narrow(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex64
    return torch.float32 if dtype.is_floating_point else dtype


def _to_fp32(value: Any) -> Any:
    return value.to(_narrow(value.dtype)) if isinstance(value, torch.Tensor) else value


def _to(value: Any, dtype: torch.dtype) -> Any:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float or _is_complex(value) else value


def _is_complex(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_complex()


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run with random states that a seed gives; afterwards they are what they were.

    Those of torch, of Python's `random` and of numpy's global generator.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 -- the user's code may draw from it
    devices = [] if device.type == "cpu" else [device]
    kind = device.type if devices else "cuda"
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 -- as above
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002 -- as above


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one forward and backward gave."""

    output: Any
    """What the model returned."""

    loss: float
    """The value of the loss."""

    gradients: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Gradients of the weights by name, without the loss scale."""

    input_gradients: tuple[torch.Tensor, ...] = ()
    """Gradients of the floating inputs, in order, without the loss scale."""


def wide_copy(model: nn.Module, fmt: str) -> nn.Module:
    """Copy a model, with whatever it holds in a narrower format widened.

    Raises:
        TargetError: It cannot be copied.
    """
    try:
        copied = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise TargetError(
            f"a reference needs a copy of the model, and {type(model).__name__} "
            f"cannot be copied: {first_line(error)}; keep no tensors with a history as "
            "attributes, or give reference="
        ) from error
    widen = Wide(None, fmt).widen
    copied._apply(widen)  # type: ignore[no-untyped-call]  # noqa: SLF001 -- Module.to would cut complex weights to their real part
    for module in copied.modules():
        for name, value in vars(module).items():
            if name not in {"_parameters", "_buffers", "_modules"}:
                _widen_attribute(module, name, value, widen)
    return copied


def _widen_attribute(
    module: nn.Module, name: str, value: Any, widen: Callable[[Any], Any]
) -> None:
    if isinstance(value, torch.Tensor):
        vars(module)[name] = widen(value)
    elif isinstance(value, (list, dict)) and any(True for _ in tensors_of(value)):
        vars(module)[name] = tree_map(
            lambda each: widen(each) if isinstance(each, torch.Tensor) else each, value
        )


def wide_values(values: Any, fmt: str) -> Any:
    """Copy a structure of inputs with its floating tensors widened."""
    widen = Wide(None, fmt).widen
    return tree_map(
        lambda each: widen(each) if isinstance(each, torch.Tensor) else each, values
    )


def as_leaves(values: Any) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """Copy inputs so that gradients reach them; return them and where gradients land.

    What is handed on is a clone of each leaf, because code may write to its inputs.
    """
    leaves: list[torch.Tensor] = []

    def leaf(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if not (value.is_floating_point() or value.is_complex()):
            return value.clone()
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1].clone()

    return tree_map(leaf, values), tuple(leaves)


@contextlib.contextmanager
def runs_wide(subject: str, model: nn.Module | None, fmt: str) -> Iterator[Wide]:
    """Run code wide; tell what cannot, by operator and line.

    Raises:
        TargetError: Something does not run in that format.
    """
    wide = Wide(model, fmt)
    try:
        with wide:
            yield wide
    except TargetError:
        raise
    except Exception as error:
        raise TargetError(
            f"the reference needs {subject} to run in {fmt}, and "
            f"{wide.failed or 'its code'}{line_of_user(error)} does not: "
            f"{first_line(error)}; give another algorithm as reference=, or let that "
            "line take its format from its input"
        ) from error


def line_of_user(error: BaseException) -> str:
    """` at file:line` of the innermost line of the user's own that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if is_of_user(frame.filename)]
    if not own:
        return ""
    return f" at {own[-1].filename}:{own[-1].lineno}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
