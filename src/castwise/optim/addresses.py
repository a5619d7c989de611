"""Addresses as memory, and numbers as their bits, inside of compiled code (numba).

Tensors of any number and format go into one call as a table of integers. What stands
behind an address is nobody's business but the caller's: it must live, be contiguous,
and be as long as the code takes it to be.

A compiler that cannot tell whether two arrays overlap must not work on many of their
numbers at once. It asks at run time where there are few arrays, and gives up beyond:
a loop over gradient, moments and both halves of a weight stays scalar. `read` and
`write` tell it, by LLVM's `alias.scope` and `noalias`, that arrays given different
places overlap nowhere, or only in one and the same number.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _to_pointer(typing_context: Any, address: Any) -> Any:
    """Return an address as a pointer."""
    del typing_context, address

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        del context, signature
        return builder.inttoptr(values[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


pointer: Any = intrinsic(_to_pointer)
"""int64 -> void *, inside of compiled code; `numba.carray` makes an array of it."""


def _to_prefetch(typing_context: Any, address: Any) -> Any:
    """Ask the second-level cache for the line at an address."""
    del typing_context, address

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        del signature
        number = ir.IntType(32)
        kinds = [cgutils.voidptr_t, number, number, number]
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), kinds), "llvm.prefetch.p0i8"
        )
        where = builder.inttoptr(values[0], cgutils.voidptr_t)
        builder.call(function, [where, number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


prefetch: Any = intrinsic(_to_prefetch)
"""int64 -> nothing; what it points to may be anywhere, and even nowhere."""


def _to_wide(typing_context: Any, number: Any) -> Any:
    """Return a number in fp32 that may come as bits."""
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        del context
        (value,) = values
        if signature.args[0] == types.int16:
            bits = ir.IntType(32)
            value = builder.shl(builder.zext(value, bits), bits(16))
        if signature.args[0] == types.float32:
            return value
        return builder.bitcast(value, ir.FloatType())

    return types.float32(number), generate


wide: Any = intrinsic(_to_wide)
"""fp32, its bits as int32, or the bits of a bf16 as int16 -> fp32."""


def _to_bits(typing_context: Any, number: Any) -> Any:
    """Return the bits of a number in fp32."""
    del typing_context, number

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        del context, signature
        return builder.bitcast(values[0], ir.IntType(32))

    return types.int32(types.float32), generate


bits_of: Any = intrinsic(_to_bits)
"""fp32 -> int32."""


NUM_PLACES = 8  # arrays that one loop can tell apart


def _apart(module: ir.Module, access: Any, place: int) -> None:
    """Say of a load or store that it touches no array of another place."""
    domain = module.add_metadata(["castwise arrays"])
    scopes = [
        module.add_metadata([f"castwise array {each}", domain])
        for each in range(NUM_PLACES)
    ]
    others = [scope for each, scope in enumerate(scopes) if each != place]
    access.set_metadata("alias.scope", module.add_metadata([scopes[place]]))
    access.set_metadata("noalias", module.add_metadata(others))


def _element(context: Any, builder: Any, kind: Any, values: Any) -> Any:
    """Return a pointer to a number of a contiguous array, unchecked."""
    array, index = values
    data = context.make_array(kind)(context, builder, array).data
    return builder.gep(data, [index], inbounds=True)


def _to_read(typing_context: Any, array: Any, index: Any, place: Any) -> Any:
    """Return a number of an array."""
    del typing_context, index

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = signature.args[0]
        where = _element(context, builder, kind, values[:2])
        number = builder.load(where, align=kind.dtype.bitwidth // 8)
        _apart(builder.module, number, place.literal_value)
        return number

    return array.dtype(array, types.int64, place), generate


read: Any = intrinsic(prefer_literal=True)(_to_read)
"""array, index from 0, place of the array (a constant) -> its number there."""


def _to_write(
    typing_context: Any, array: Any, index: Any, number: Any, place: Any
) -> Any:
    """Write a number of an array."""
    del typing_context, index, number

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = signature.args[0]
        where = _element(context, builder, kind, values[:2])
        done = builder.store(values[2], where, align=kind.dtype.bitwidth // 8)
        _apart(builder.module, done, place.literal_value)
        return context.get_dummy_value()

    return types.void(array, types.int64, array.dtype, place), generate


write: Any = intrinsic(prefer_literal=True)(_to_write)
"""array, index from 0, number, place of the array (a constant) -> nothing."""


def _to_count_up(typing_context: Any, array: Any, index: Any) -> Any:
    """Add one to a number of an array, of which several threads know."""
    del typing_context, index

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        where = _element(context, builder, signature.args[0], values)
        return builder.atomic_rmw("add", where, ir.IntType(64)(1), "monotonic")

    return types.int64(array, types.int64), generate


count_up: Any = intrinsic(_to_count_up)
"""int64 array, index -> its number there, which is one more from now on; atomic."""
