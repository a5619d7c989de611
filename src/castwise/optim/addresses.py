"""An address as memory that machine code may read and write (numba).

Tensors of any number and format go into one call as a table of integers. What stands
behind an address is nobody's business but the caller's: it must live, be contiguous,
and be as long as the code takes it to be.
"""

from __future__ import annotations

from typing import Any

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
