"""One call of an operator, as the dispatcher hands it over: what it read and wrote.

A dispatch mode stands below autocast and autograd, where PyTorch runs its kernels.
`describe` turns what it is given there into plain values: the operator's name, the
formats of its floating inputs, the bytes moved, the operations of a product.

Tensors of no dimension do not count as inputs of a format. Views compute nothing. A
copy from one format to another is a `cast`, and its format reads `fp32->bf16`. Products
of fp32 tensors that the device's switches let it round to tf32 are counted as tf32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils import flop_counter

from castwise.dtypes import DTYPES
from castwise.islands.passage import kind_now
from castwise.islands.products import products_now
from castwise.policy.ops import OUTER_OPERATORS, operator_name

if TYPE_CHECKING:
    from torch._ops import OpOverload

Stage = Literal["forward", "recompute", "backward", "update"]
"""Where a call belongs; a recompute is a forward that a backward pass asked for."""

CAST = "cast"
"""The name under which copies from one format to another are counted."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CONVOLUTIONS = frozenset({"convolution", "convolution_backward", "_convolution"})
_COPIES = frozenset({"_to_copy", "copy_"})


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorCall:
    """What one call of an operator was."""

    op: str
    """ATen name without overload, as the operator table spells it, or `cast`."""

    formats: tuple[str, ...]
    """Formats of the inputs, narrowest first; from where to where for a cast."""

    num_bytes: int
    """Bytes of all floating tensors read and written."""

    num_flops: int
    """Operations of a matrix product or convolution; 0 for other operators."""

    @property
    def format(self) -> str:
        """The formats as one word: `bf16`, `bf16+fp32`, or `fp32->bf16` for a cast."""
        return ("->" if self.op == CAST else "+").join(self.formats)


def describe(
    func: OpOverload,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: Any,
    *,
    counts_flops: bool = True,
) -> OperatorCall | None:
    """Describe a call; none for views and for calls without a floating input.

    Counting operations takes longer than all the rest; without it they are 0.
    """
    if is_view(func):
        return None
    given = list(floating((args, kwargs)))
    if not given:
        return None
    op, formats = _op_and_formats(func, given, result)
    # fp32 products may be rounded first, and flops tell which operators are products
    is_asked = op != CAST and (counts_flops or formats == ("fp32",))
    flops = _flops(func, args, kwargs, result) if is_asked else 0
    if flops and formats == ("fp32",):
        formats = (_product_format(op, given[0].device.type),)
    tensors = (*given, *floating(result))
    return OperatorCall(
        op=op,
        formats=formats,
        num_bytes=sum(tensor.numel() * tensor.itemsize for tensor in tensors),
        num_flops=flops if counts_flops else 0,
    )


def stage_now(*, updating: bool = False) -> Stage:
    """The stage of a call that is being dispatched in this thread."""
    if updating:
        return "update"
    if torch._C._current_graph_task_id() < 0:  # noqa: SLF001 -- no public way to ask
        return "forward"
    is_forward = torch.is_grad_enabled() or kind_now() in {"forward", "again"}
    return "recompute" if is_forward else "backward"


@functools.cache
def is_view(func: OpOverload) -> bool:
    """Whether the result is an input seen otherwise, and nothing is computed."""
    returns = func._schema.returns  # noqa: SLF001 -- the schema has no public name
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def floating(value: Any) -> Iterator[torch.Tensor]:
    """Yield the floating and complex tensors among arguments or results."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from floating(item)
    elif isinstance(value, dict):
        yield from floating(list(value.values()))


def _op_and_formats(
    func: OpOverload, given: list[torch.Tensor], result: Any
) -> tuple[str, tuple[str, ...]]:
    name = _bare_name(func)
    if name in _COPIES:
        source, made = given[-1].dtype, next(floating(result), None)
        if made is not None and made.dtype != source:
            return CAST, (format_name(source), format_name(made.dtype))
    sized = [tensor for tensor in given if tensor.dim()] or given
    formats = {tensor.dtype for tensor in sized}
    ordered = sorted(formats, key=lambda dtype: (dtype.itemsize, str(dtype)))
    return OUTER_OPERATORS.get(name, name), tuple(map(format_name, ordered))


@functools.cache
def _bare_name(func: OpOverload) -> str:
    name: str = func._schema.name  # noqa: SLF001 -- the schema has no public name
    return operator_name(name)


def format_name(dtype: torch.dtype) -> str:
    """The name of the format; dtypes that are none of them keep PyTorch's name."""
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


def _product_format(op: str, device_type: str) -> str:
    """What a product of fp32 tensors is rounded to first."""
    switches = products_now(device_type)
    switch = switches[op in _CONVOLUTIONS] if switches else "ieee"
    return switch if switch in {"bf16", "tf32"} else "fp32"


def _flops_of_attention(args: Any, *, backward: bool) -> int:
    """Operations of fused attention, where heads may share keys and values.

    PyTorch 2.11 counts none that do; each head of the query multiplies all the same.
    """
    query, key, value = (tensor.shape for tensor in args[backward : 3 + backward])
    key, value = ((*query[:2], *shape[2:]) for shape in (key, value))
    if not backward:
        return int(flop_counter.sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]
    shapes = args[0].shape, query, key, value
    return int(flop_counter.sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _flops(func: OpOverload, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    """Operations of a matrix product; 0 for what is none."""
    packet, name = func.overloadpacket, _bare_name(func)
    if name.startswith("_scaled_dot_product"):
        return _flops_of_attention(args, backward=name.endswith("_backward"))
    if packet in flop_counter.flop_registry:
        count = flop_counter.flop_registry[packet](*args, **kwargs, out_val=result)
        return int(count)
    if name in {"mv", "dot", "vdot"}:
        return 2 * int(args[0].numel())
    if name == "addmv":
        return 2 * int(args[1].numel())
    return 0


def address(tensor: torch.Tensor) -> int:
    """Where a tensor's numbers stand; 0 for wrappers and shards."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # sparse tensors and wrappers have no storage of their own
        return 0
