"""How one operator's call is cast: the kernels behind the operator table.

A kernel stands at the dispatcher's Autocast key, above autograd, so that its casts are
part of the graph and gradients come back in the format of what went in. Which formats
the inputs go to depends on the form of the operator, read from its schema:

    functional   the format of the operator's category
    in place     the format of the tensor that is written
    out=         the format of the `out` tensor

Two kinds of operator need more care. Where the caller names a `dtype=`, the caller has
decided. Batch norms write to their running statistics without saying so in the schema:
a cast copy would take the update and be thrown away, so it is written back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame

from castwise.fp8_products import (
    format_now,
    multiplied,
    round_gradient,
    round_operands,
)
from castwise.policy.ops import FP8_PRODUCTS, operator_name

if TYPE_CHECKING:
    from torch._ops import OpOverload

    from castwise.policy.ops import Category

Formats = Mapping[torch.dtype, torch.dtype]
"""The format that an input has -> the one that it goes to; others stay."""

Choice = Callable[[tuple[Any, ...], dict[str, Any]], Formats]
"""From a call's arguments to the formats that they go to."""

Run = Callable[[tuple[Any, ...], dict[str, Any]], Any]
"""Calls the operator with cast arguments."""

_NUMBERS = frozenset({bool, int, float, complex})

LOW_DTYPES = (torch.bfloat16, torch.float16)
"""What a region may compute in."""

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_WIDE = (torch.float32, torch.float64)
_NO_CASTS: Formats = {}
_TO_FP32: Formats = dict.fromkeys((*LOW_DTYPES, *_FP8), torch.float32)
_TO_LOW: Mapping[torch.dtype, Formats] = {
    low: {dtype: low for dtype in (*LOW_DTYPES, *_FP8, torch.float32) if dtype != low}
    for low in LOW_DTYPES
}
_TOWARDS: Mapping[torch.dtype, Formats] = {
    to: {dtype: to for dtype in (*LOW_DTYPES, *_WIDE) if dtype != to}
    for to in (*LOW_DTYPES, *_WIDE)
}

# The gradient of its weight may be sparse, and a sparse gradient cannot go back through
# a cast: the weight stays, and the other inputs go to its format.
_FOLLOW_FIRST = frozenset({"aten::embedding_bag"})

BATCH_NORMS = frozenset(
    {
        "_batch_norm_impl_index",
        "_batch_norm_with_update",
        "_native_batch_norm_legit",
        "batch_norm",
        "instance_norm",
        "native_batch_norm",
    }
)
"""They take (input, weight, bias, running_mean, running_var, ...)."""


def autocast_key(device_type: str) -> str:
    """The dispatch key of a device's autocast kernels."""
    return f"Autocast{device_type.upper()}"


class OperatorKernel:
    """One overload at one device's Autocast key.

    It follows the table where `in_force` says so. Elsewhere PyTorch's own kernel is
    called, with its cache of casts and whatever else it does there; where PyTorch has
    none, the operator is left to itself.
    """

    __slots__ = (
        "_autocast",
        "_below",
        "_device_type",
        "_in_force",
        "_native",
        "_op",
        "_run",
        "_tensors_at",
    )

    def __init__(
        self,
        op: OpOverload,
        device_type: str,
        *,
        in_force: Callable[[], bool],
    ) -> None:
        key = getattr(torch._C.DispatchKey, autocast_key(device_type))  # noqa: SLF001 -- dispatch keys have no public name
        self._autocast = torch._C.DispatchKeySet(key)  # noqa: SLF001 -- as above
        self._below = torch._C._dispatch_keyset_full_after(key)  # noqa: SLF001 -- as above
        self._op = op
        self._device_type = device_type
        self._in_force = in_force
        self._tensors_at = [
            place
            for place, argument in enumerate(op._schema.arguments)  # noqa: SLF001 -- as above
            if str(argument.type) == "Tensor" and not argument.kwarg_only
        ]
        self._native = _kernel_before(op, key)
        self._run: Run | None = None

    def follow(self, category: Category) -> None:
        """Treat inputs as the category says from now on."""
        self._run = _run_of(self._op, self._device_type, category)

    def __call__(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        """Called by the dispatcher, which passes the keys still to be served."""
        in_force = self._in_force()
        if self._native is not None and not in_force:
            return self._native(keyset, *args, **kwargs)
        run = self._run if in_force else None
        if run is None and not self._has_number_for_tensor(args):
            return self._op.redispatch(keyset & self._below, *args, **kwargs)
        # Operators inside this one are not cast again, as in PyTorch's own kernels.
        with torch._C._ExcludeDispatchKeyGuard(self._autocast):  # noqa: SLF001 -- as above
            return self._op(*args, **kwargs) if run is None else run(args, kwargs)

    def _has_number_for_tensor(self, args: tuple[Any, ...]) -> bool:
        """Whether a plain number stands for a tensor, which redispatch refuses."""
        return any(
            type(args[place]) in _NUMBERS
            for place in self._tensors_at
            if place < len(args)
        )


def _kernel_before(op: OpOverload, key: Any) -> Callable[..., Any] | None:
    """The kernel at a dispatch key, as it is before ours stands there; none if none."""
    name = op.name()  # type: ignore[no-untyped-call]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, key.name):  # noqa: SLF001 -- dispatch keys have no public name
        return None
    call: Callable[..., Any] = torch.library.get_kernel(op, key).call_boxed
    return call


# Dynamo captures the operator, not how its call is cast. Where it gives a frame up (a
# recurrent layer), it would go on to capture the kernels that the frame calls.
eval_frame.set_code_exec_strategy(
    OperatorKernel.__call__.__code__,
    eval_frame._FrameExecStrategy(  # noqa: SLF001 -- the public ways load Dynamo
        eval_frame._FrameAction.SKIP,  # noqa: SLF001 -- as above
        eval_frame._FrameAction.SKIP,  # noqa: SLF001 -- as above
    ),
)


def needs_kernel(op: OpOverload, category: Category) -> bool:
    """Whether a category changes anything in calls of this overload."""
    if _is_batch_norm(op):
        return True
    if category == "as_is":
        return False
    inputs = sum("Tensor" in str(argument.type) for argument in op._schema.arguments)  # noqa: SLF001 -- as above
    return inputs >= (2 if op._schema.is_mutable else 1)  # noqa: SLF001 -- as above


def _is_batch_norm(op: OpOverload) -> bool:
    arguments = [argument.name for argument in op._schema.arguments]  # noqa: SLF001 -- the schema has no public name
    name = op._schema.name.removeprefix("aten::")  # noqa: SLF001 -- as above
    return name in BATCH_NORMS and arguments[3] == "running_mean"


def _run_of(op: OpOverload, device_type: str, category: Category) -> Run | None:
    """The call that a category asks for; none leaves the operator to itself."""
    on_device = f"is_{device_type}"
    choice = _choice_of(op, device_type, category)
    if _is_batch_norm(op):
        return _batch_norm(op, on_device, choice)
    if category == "as_is":
        return None
    name = operator_name(op._schema.name)  # noqa: SLF001 -- as above
    functional = not op._schema.is_mutable  # noqa: SLF001 -- as above
    if category == "low" and name in FP8_PRODUCTS and functional:
        return _product(op, on_device, choice)

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        formats = choice(args, kwargs)
        if formats:
            args = tuple([_converted(value, formats, on_device) for value in args])
            for name, value in kwargs.items():
                kwargs[name] = _converted(value, formats, on_device)
        return op(*args, **kwargs)

    return run


def _product(op: OpOverload, on_device: str, choice: Choice) -> Run:
    """A low product, whose operands are rounded to fp8 where an island says so."""
    operands = multiplied(op)

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        narrow = format_now()
        if narrow is not None:  # before the cast, so that numbers are rounded once
            args, kwargs = round_operands(args, kwargs, operands, narrow)
        formats = choice(args, kwargs)
        args = tuple([_converted(value, formats, on_device) for value in args])
        for name, value in kwargs.items():
            kwargs[name] = _converted(value, formats, on_device)
        result = op(*args, **kwargs)
        return result if narrow is None else round_gradient(result)

    return run


def _choice_of(op: OpOverload, device_type: str, category: Category) -> Choice:
    """How a call of this overload chooses the formats of its inputs."""
    arguments = op._schema.arguments  # noqa: SLF001 -- as above
    outs = [argument.name for argument in arguments if argument.is_out]
    if outs:
        return lambda _args, kwargs: _towards(kwargs[outs[0]])
    follows_first = op._schema.name in _FOLLOW_FIRST or op._schema.is_mutable  # noqa: SLF001 -- as above
    if follows_first and not _is_batch_norm(op):
        return lambda args, _kwargs: _towards(args[0])
    if category == "low":
        return lambda _args, _kwargs: _TO_LOW[torch.get_autocast_dtype(device_type)]
    if category == "widest":
        return lambda args, kwargs: _to_widest(args, kwargs, f"is_{device_type}")
    if category == "as_is":
        return lambda _args, _kwargs: _NO_CASTS
    names = [argument.name for argument in arguments]
    named = names.index("dtype") if "dtype" in names else len(names)
    return _to_fp32_unless_named(named)


def _to_fp32_unless_named(position: int) -> Choice:
    """To fp32, unless the caller gives `dtype=`."""

    def choice(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Formats:
        named = args[position] if position < len(args) else kwargs.get("dtype")
        return _TO_FP32 if named is None else _NO_CASTS

    return choice


def _towards(written: Any) -> Formats:
    """To the format of the tensor that the operator writes."""
    dtype = written.dtype if isinstance(written, Tensor) else None
    return _NO_CASTS if dtype is None else _TOWARDS.get(dtype, _NO_CASTS)


def _to_widest(
    args: Iterable[Any], kwargs: Mapping[str, Any], on_device: str
) -> Formats:
    """To the widest of the floating formats; bf16 beside fp16 goes to fp32."""
    found = {
        tensor.dtype
        for tensor in _tensors(chain(args, kwargs.values()))
        if tensor.dtype in _TOWARDS and getattr(tensor, on_device)
    }
    if len(found) < 2:
        return _NO_CASTS
    widest = found.pop()
    for dtype in found:
        widest = torch.promote_types(widest, dtype)
    return _TOWARDS[widest]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _converted(value: Any, formats: Formats, on_device: str) -> Any:
    if isinstance(value, Tensor):
        to = formats.get(value.dtype)
        return value if to is None or not getattr(value, on_device) else value.to(to)
    if isinstance(value, (list, tuple)):
        return [_converted(item, formats, on_device) for item in value]
    return value


def _batch_norm(op: OpOverload, on_device: str, choice: Choice) -> Run:
    """Batch norms take affine and statistics all as the input is, or all in fp32."""

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given, rest = args[1:5], args[5:]
        x = _converted(args[0], choice(args, kwargs), on_device)
        dtypes = {tensor.dtype for tensor in given if tensor is not None}
        if dtypes <= {x.dtype} or dtypes <= {torch.float32}:
            return op(x, *given, *rest, **kwargs)
        cast = [_converted(tensor, _TO_FP32, on_device) for tensor in given]
        y = op(x, *cast, *rest, **kwargs)
        if not rest or rest[0] is not False:  # training
            _write_back(cast[2:], given[2:])
        return y

    return run


@torch.no_grad()
def _write_back(updated: Iterable[Any], statistics: Iterable[Any]) -> None:
    """Round updated running statistics into the buffers that hold them."""
    for source, target in zip(updated, statistics, strict=True):
        if target is not None and source is not target:
            target.copy_(source)
