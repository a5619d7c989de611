"""The numbers of one vector register, as a value of compiled code (numba).

A loop over lanes is either unrolled into scalars by LLVM or carried through memory.
Code that says `Lanes` means a register of 64 bytes, that is eight numbers of fp64 or
sixteen of fp32: `+ - * /` and unary minus work on all of them, LLVM takes two or four
narrower registers where a processor has none of this width. Memory is reached by
address, as `castwise.optim.addresses` does; whoever calls answers for what stands
there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import (
    intrinsic,
    lower_builtin,
    models,
    register_model,
)

WIDTH = 64  # bytes

_Function = TypeVar("_Function", bound=Callable[..., Any])


def part(function: _Function) -> _Function:
    """Compile what entry points call; a product and a sum may become one operation."""
    njit: Any = numba.njit  # its types know fewer options than it takes
    compile_ = njit(
        fastmath={"contract"},
        error_model="numpy",
        no_cpython_wrapper=True,  # nobody calls it from Python
        no_cfunc_wrapper=True,
    )
    return cast("_Function", compile_(function))


class LanesType(types.Type):
    """The type of a register full of numbers of one format."""

    def __init__(self, scalar: Any) -> None:
        self.scalar = scalar
        self.count = WIDTH * 8 // scalar.bitwidth
        super().__init__(f"Lanes[{scalar}]")


FP64, FP32 = LanesType(types.float64), LanesType(types.float32)


def lanes_of(scalar: Any) -> LanesType:
    """Return the type of a register of such numbers."""
    return FP64 if scalar == types.float64 else FP32


def element(scalar: Any) -> Any:
    """Return what LLVM calls a number of this format."""
    if scalar == types.int64:
        return ir.IntType(64)
    return ir.DoubleType() if scalar == types.float64 else ir.FloatType()


def _vector(scalar: Any, count: int | None = None) -> ir.VectorType:
    return ir.VectorType(element(scalar), count or lanes_of(scalar).count)


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    """A vector register."""

    def __init__(self, manager: Any, kind: LanesType) -> None:
        super().__init__(manager, kind, _vector(kind.scalar))  # type: ignore[no-untyped-call]


class _Binary(AbstractTemplate):
    """Lanes and lanes of one format give lanes."""

    def generic(self, args: Sequence[Any], kws: Any) -> Any:
        if kws or not all(isinstance(arg, LanesType) for arg in args):
            return None
        return signature(args[0], *args) if len(set(args)) == 1 else None  # type: ignore[no-untyped-call]


def _operator(function: Callable[..., Any], instruction: str, arity: int) -> None:
    """Let an operator of Python stand for an instruction on lanes."""

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        del context, sig
        return getattr(builder, instruction)(*values)

    infer_global(function)(type(f"_Lanes_{instruction}", (_Binary,), {"key": function}))  # type: ignore[no-untyped-call]
    lower_builtin(function, *[LanesType] * arity)(generate)  # type: ignore[no-untyped-call]


for _function, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _operator(_function, _instruction, 2)
_operator(operator.neg, "fneg", 1)


def as_format(builder: Any, value: Any, target: Any) -> Any:
    """Convert a number or vector into another format."""
    if value.type == target:
        return value
    widen = isinstance(getattr(target, "element", target), ir.DoubleType)
    return (builder.fpext if widen else builder.fptrunc)(value, target)


def at(builder: Any, address: Any, kind: Any) -> Any:
    """Return an address as a pointer."""
    return builder.inttoptr(address, kind.as_pointer())


def num_bytes(scalar: Any) -> int:
    """Return the bytes of a number of this format."""
    return int(scalar.bitwidth) // 8


def _to_splat(typing_context: Any, number: Any) -> Any:
    del typing_context

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        del context
        kind = _vector(sig.args[0])
        first = builder.insert_element(
            ir.Constant(kind, ir.Undefined), values[0], ir.IntType(32)(0)
        )
        mask = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
        return builder.shuffle_vector(first, first, mask)

    return lanes_of(number)(number), generate


splat: Any = intrinsic(_to_splat)
"""number -> lanes that all hold it."""


def _to_larger(typing_context: Any, one: Any, other: Any) -> Any:
    del typing_context

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        del context, sig
        return builder.select(builder.fcmp_ordered(">", *values), *values)

    return one(one, other), generate


larger: Any = intrinsic(_to_larger)
"""lanes, lanes -> the larger of each pair; the second where they do not compare."""


def _to_count(typing_context: Any, number: Any) -> Any:
    del typing_context
    count = lanes_of(number).count

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        del context, builder, sig, values
        return ir.IntType(64)(count)

    return types.int64(number), generate


num_lanes: Any = intrinsic(_to_count)
"""number -> how many of its format fill a register, a constant."""


def _to_add_wide(typing_context: Any, address: Any, lanes: Any) -> Any:
    del typing_context

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        kind = _vector(types.float64, sig.args[1].count)
        pointer = at(builder, values[0], kind)
        before = builder.load(pointer, align=8)
        more = as_format(builder, values[1], kind)
        builder.store(builder.fadd(before, more), pointer, align=8)
        return context.get_dummy_value()

    return types.void(address, lanes), generate


add_wide: Any = intrinsic(_to_add_wide)
"""address of so many numbers of fp64, lanes to add to them -> nothing."""


def _to_itemsize(typing_context: Any, number: Any) -> Any:
    del typing_context

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        del context, builder, values
        return ir.IntType(64)(num_bytes(sig.args[0]))

    return types.int64(number), generate


itemsize: Any = intrinsic(_to_itemsize)
"""number -> bytes of its format, a constant."""


def _to_load(typing_context: Any, address: Any, stored: Any, wanted: Any) -> Any:
    del typing_context

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        del context
        _, stored, wanted = sig.args
        kind = _vector(stored, lanes_of(wanted).count)
        pointer = at(builder, values[0], kind)
        value = builder.load(pointer, align=num_bytes(stored))
        return as_format(builder, value, _vector(wanted))

    return lanes_of(wanted)(address, stored, wanted), generate


load: Any = intrinsic(_to_load)
"""address, number of the format there, of the format wanted -> lanes."""


def _to_store(typing_context: Any, address: Any, lanes: Any, stored: Any) -> Any:
    del typing_context

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        _, lanes, stored = sig.args
        kind = _vector(stored, lanes.count)
        value = as_format(builder, values[1], kind)
        builder.store(value, at(builder, values[0], kind), align=num_bytes(stored))
        return context.get_dummy_value()

    return types.void(address, lanes, stored), generate


store: Any = intrinsic(_to_store)
"""address, lanes, number of the format to store -> nothing."""


def _to_load_one(typing_context: Any, address: Any, stored: Any, wanted: Any) -> Any:
    del typing_context

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        del context
        _, stored, wanted = sig.args
        pointer = at(builder, values[0], element(stored))
        return as_format(builder, builder.load(pointer), element(wanted))

    return wanted(address, stored, wanted), generate


load_one: Any = intrinsic(_to_load_one)
"""address, number of the format there, of the format wanted -> one number."""


def _to_store_one(typing_context: Any, address: Any, number: Any, stored: Any) -> Any:
    del typing_context

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        kind = element(sig.args[2])
        value = as_format(builder, values[1], kind)
        builder.store(value, at(builder, values[0], kind))
        return context.get_dummy_value()

    return types.void(address, number, stored), generate


store_one: Any = intrinsic(_to_store_one)
"""address, number, number of the format to store -> nothing."""


def _to_count_up(typing_context: Any, address: Any) -> Any:
    del typing_context

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        del context, sig
        where = at(builder, values[0], ir.IntType(64))
        return builder.atomic_rmw("add", where, ir.IntType(64)(1), "seq_cst")

    return types.int64(address), generate


count_up: Any = intrinsic(_to_count_up)
"""address of an int64 -> what it was; it is one more from now on, for all threads, who
then see all that was stored before, past the caches or not."""


def _prefetcher(written: int) -> Any:
    def to_prefetch(typing_context: Any, address: Any) -> Any:
        del typing_context

        def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            del sig
            number = ir.IntType(32)
            kinds = [cgutils.voidptr_t, number, number, number]
            function = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
                builder.module,
                ir.FunctionType(ir.VoidType(), kinds),
                "llvm.prefetch.p0i8",
            )
            where = builder.inttoptr(values[0], cgutils.voidptr_t)
            builder.call(function, [where, number(written), number(3), number(1)])
            return context.get_dummy_value()

        return types.void(address), generate

    return intrinsic(to_prefetch)


prefetch: Any = _prefetcher(0)
"""address -> nothing; asks for the 64 bytes around, to be read."""

prefetch_to_write: Any = _prefetcher(1)
"""address -> nothing; asks for the 64 bytes around, to be written."""
