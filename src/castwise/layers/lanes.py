"""Eight numbers in one vector register, as a value of compiled code (numba).

A loop over eight lanes is either unrolled into scalars by LLVM or carried through
memory. Code that says `Lanes` means the register: `+ - * /` and unary minus work on
all eight, LLVM takes two or four narrower registers where a processor has none of this
width. Memory is reached by address, as `castwise.optim.addresses` does; whoever calls
answers for what stands there.

Chains lie row by row in memory, lanes want them site by site: `transposed` turns eight
rows of eight numbers round, with three shuffles a row.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numba
from llvmlite import ir
from numba import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import (
    intrinsic,
    lower_builtin,
    models,
    register_model,
)

NUM_LANES = 8

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
    """The type of eight numbers of one format."""

    def __init__(self, scalar: Any) -> None:
        self.scalar = scalar
        super().__init__(f"Lanes[{scalar}]")


FP64, FP32 = LanesType(types.float64), LanesType(types.float32)


def lanes_of(scalar: Any) -> LanesType:
    """Return the type of eight such numbers."""
    return FP64 if scalar == types.float64 else FP32


def _vector(scalar: Any, length: int = NUM_LANES) -> ir.VectorType:
    kind = ir.DoubleType() if scalar == types.float64 else ir.FloatType()
    return ir.VectorType(kind, length)


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


def _as_format(builder: Any, value: Any, target: Any) -> Any:
    """Convert a number or vector into another format."""
    if value.type == target:
        return value
    element = getattr(target, "element", target)
    widen = isinstance(element, ir.DoubleType)
    return (builder.fpext if widen else builder.fptrunc)(value, target)


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _bytes(scalar: Any) -> int:
    return int(scalar.bitwidth) // 8


def _to_splat(typing_context: Any, number: Any) -> Any:
    del typing_context

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        del context
        kind = _vector(sig.args[0])
        first = builder.insert_element(
            ir.Constant(kind, ir.Undefined), values[0], ir.IntType(32)(0)
        )
        mask = ir.Constant(ir.VectorType(ir.IntType(32), NUM_LANES), [0] * NUM_LANES)
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


def _to_widened(typing_context: Any, lanes: Any) -> Any:
    del typing_context

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        del context, sig
        return _as_format(builder, values[0], _vector(types.float64))

    return FP64(lanes), generate


widened: Any = intrinsic(_to_widened)
"""lanes -> the same in fp64."""


def _to_itemsize(typing_context: Any, number: Any) -> Any:
    del typing_context

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        del context, builder, values
        return ir.IntType(64)(_bytes(sig.args[0]))

    return types.int64(number), generate


itemsize: Any = intrinsic(_to_itemsize)
"""number -> bytes of its format, a constant."""


def _to_load(typing_context: Any, address: Any, stored: Any, wanted: Any) -> Any:
    del typing_context

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        del context
        _, stored, wanted = sig.args
        pointer = _at(builder, values[0], _vector(stored))
        value = builder.load(pointer, align=_bytes(stored))
        return _as_format(builder, value, _vector(wanted))

    return lanes_of(wanted)(address, stored, wanted), generate


load: Any = intrinsic(_to_load)
"""address, number of the format there, of the format wanted -> lanes."""


def _to_load_pairs(typing_context: Any, address: Any, stored: Any, wanted: Any) -> Any:
    del typing_context
    lanes = lanes_of(wanted)
    pair = types.UniTuple(lanes, 2)  # type: ignore[no-untyped-call]

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        _, stored, wanted = sig.args
        pointer = _at(builder, values[0], _vector(stored, 2 * NUM_LANES))
        both = builder.load(pointer, align=_bytes(stored))
        parts = [
            _as_format(
                builder,
                _shuffled(builder, both, both, [2 * i + part for i in range(8)]),
                _vector(wanted),
            )
            for part in range(2)
        ]
        return context.make_tuple(builder, pair, parts)

    return pair(address, stored, wanted), generate


load_pairs: Any = intrinsic(_to_load_pairs)
"""Like `load` of eight complex numbers -> real parts, imaginary parts."""


def _to_store(typing_context: Any, address: Any, lanes: Any, stored: Any) -> Any:
    del typing_context

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        stored = sig.args[2]
        kind = _vector(stored)
        value = _as_format(builder, values[1], kind)
        builder.store(value, _at(builder, values[0], kind), align=_bytes(stored))
        return context.get_dummy_value()

    return types.void(address, lanes, stored), generate


store: Any = intrinsic(_to_store)
"""address, lanes, number of the format to store -> nothing."""


def _to_store_pairs(
    typing_context: Any, address: Any, real: Any, imag: Any, stored: Any
) -> Any:
    del typing_context

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        stored = sig.args[3]
        parts = [_as_format(builder, value, _vector(stored)) for value in values[1:3]]
        mask = [part * NUM_LANES + i for i in range(NUM_LANES) for part in range(2)]
        both = _shuffled(builder, parts[0], parts[1], mask)
        pointer = _at(builder, values[0], _vector(stored, 2 * NUM_LANES))
        builder.store(both, pointer, align=_bytes(stored))
        return context.get_dummy_value()

    return types.void(address, real, imag, stored), generate


store_pairs: Any = intrinsic(_to_store_pairs)
"""address, real parts, imaginary parts, number of the format to store -> nothing."""


def _to_load_one(typing_context: Any, address: Any, stored: Any, wanted: Any) -> Any:
    del typing_context

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        del context
        _, stored, wanted = sig.args
        pointer = _at(builder, values[0], _vector(stored).element)
        return _as_format(builder, builder.load(pointer), _vector(wanted).element)

    return wanted(address, stored, wanted), generate


load_one: Any = intrinsic(_to_load_one)
"""address, number of the format there, of the format wanted -> one number."""


def _to_store_one(typing_context: Any, address: Any, number: Any, stored: Any) -> Any:
    del typing_context

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        kind = _vector(sig.args[2]).element
        value = _as_format(builder, values[1], kind)
        builder.store(value, _at(builder, values[0], kind))
        return context.get_dummy_value()

    return types.void(address, number, stored), generate


store_one: Any = intrinsic(_to_store_one)
"""address, number, number of the format to store -> nothing."""


def _shuffled(builder: Any, one: Any, other: Any, mask: list[int]) -> Any:
    kind = ir.VectorType(ir.IntType(32), len(mask))
    return builder.shuffle_vector(one, other, ir.Constant(kind, mask))


def _to_transposed(typing_context: Any, rows: Any) -> Any:
    del typing_context

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        rows = [builder.extract_value(values[0], i) for i in range(NUM_LANES)]
        columns = range(NUM_LANES)
        for block in (1, 2, 4):  # swap the corners of squares of twice this size
            low = [c if not c & block else NUM_LANES + c - block for c in columns]
            high = [c + block if not c & block else NUM_LANES + c for c in columns]
            for i in range(NUM_LANES):
                if not i & block:
                    one, other = rows[i], rows[i + block]
                    rows[i] = _shuffled(builder, one, other, low)
                    rows[i + block] = _shuffled(builder, one, other, high)
        return context.make_tuple(builder, sig.return_type, rows)

    return rows(rows), generate


transposed: Any = intrinsic(_to_transposed)
"""eight lanes -> eight lanes, number i of lanes j becoming number j of lanes i."""
