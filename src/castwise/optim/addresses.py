"""Addresses as memory, and numbers as their bits, inside of compiled code (numba).

Tensors of any number and format go into one call as a table of integers. What stands
behind an address is nobody's business but the caller's: it must live, be contiguous,
and be as long as the code takes it to be.
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
