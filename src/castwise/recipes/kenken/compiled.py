"""One way to compile a number-crunching function, and to keep it compiled.

`kernel` is numba's nopython compiler without the interpreter lock, so that threads
use every core, and with its result kept on disk, so that the second run starts at
once. The kept code lies beside the source, or in the user's cache folder where the
installation is read-only; where neither can be written, it is compiled anew each run.

A kernel is compiled once more for each *literal* number or bool among its arguments, so
kernels hand each other `typed(0)`.

numba looks only at the file of the function itself when it decides whether kept code
is stale. Whoever edits a kernel that kernels of other files call deletes
`__pycache__/*.nb?` in this folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numba
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function at its first call."""
    try:
        compiled: Callable[P, R] = _compile(function, keep=True)
    except RuntimeError:  # numba found no folder where it may write
        compiled = _compile(function, keep=False)
    return compiled


def _compile(function: Any, *, keep: bool) -> Any:
    return numba.njit(nogil=True, error_model="numpy", cache=keep)(function)


@kernel
def typed(number: int) -> int:
    """Make a number an int64 like any other to the compiler."""
    return int(np.int64(number))
