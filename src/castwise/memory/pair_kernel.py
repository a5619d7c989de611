"""Second tensors of pairs, computed once more in one pass of machine code (numba).

    normed = (x - mean) * inverse * weight + bias
    gelu(x) = x / 2 * (1 + erf(x / sqrt(2)))

A norm by operators is three passes or four, of which the statistics are known already.
The error function is one division of two polynomials, without an exponential:

    erf(x / sqrt(2)) ~ x P(x^2) / Q(x^2)      |x| <= 5.7, beyond which it is 1

Coefficients are of least squares, weighted until the largest error was least: 2.4e-8,
and 3.3e-7 with the arithmetic of fp32. The gelu is closer to float64 than torch's is.

Operators decide where torch may use several threads, which the kernels do not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from numba.np.numpy_support import carray

from castwise.memory.half_kernel import runs_here
from castwise.optim.addresses import pointer

_COMPILE: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"contract"},
}
_END = np.float32(5.7)
_ONE, _HALF = np.float32(1), np.float32(0.5)
_P0, _P1, _P2, _P3, _P4, _P5 = map(
    np.float32,
    (
        *(0.797884412, 0.0698818334, 0.00948162545),
        *(0.000358782679, 1.2748289e-05, 4.31606547e-08),
    ),
)
_Q1, _Q2, _Q3, _Q4, _Q5 = map(
    np.float32,
    (0.254249359, 0.0292605461, 0.00194453867, 7.67669285e-05, 1.16496025e-06),
)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _gelu(source: int, result: int, n: int) -> None:
    x = carray(pointer(source), (n,), np.float32)
    y = carray(pointer(result), (n,), np.float32)
    for i in range(n):
        number = x[i]
        # a NaN comes back by `number`; min() and max() would look for one more often
        c = number if number < _END else _END  # noqa: FURB136 -- as above
        c = c if c > -_END else -_END  # noqa: FURB136 -- as above
        u = c * c
        above = ((((_P5 * u + _P4) * u + _P3) * u + _P2) * u + _P1) * u + _P0
        below = ((((_Q5 * u + _Q4) * u + _Q3) * u + _Q2) * u + _Q1) * u + _ONE
        y[i] = _HALF * number * (_ONE + c * above / below)


@njit(**_COMPILE)  # type: ignore[untyped-decorator]
def _norm(
    source: int,
    result: int,
    at_mean: int,
    at_inverse: int,
    at_weight: int,
    at_bias: int,
    rows: int,
    dim: int,
) -> None:
    mean = carray(pointer(at_mean), (rows,), np.float32)
    inverse = carray(pointer(at_inverse), (rows,), np.float32)
    weight = carray(pointer(at_weight), (dim,), np.float32)
    bias = carray(pointer(at_bias), (dim,), np.float32)
    for row in range(rows):
        at = 4 * row * dim
        x = carray(pointer(source + at), (dim,), np.float32)
        y = carray(pointer(result + at), (dim,), np.float32)
        middle, scale = mean[row], inverse[row]
        for i in range(dim):
            y[i] = (x[i] - middle) * scale * weight[i] + bias[i]


def gelu(x: torch.Tensor) -> torch.Tensor | None:
    """Return the gelu by the error function.

    Args:
        x: fp32 [...], contiguous.

    Returns:
        None where operators of torch have to do it.
    """
    if not runs_here(x):
        return None
    y = torch.empty_like(x)
    _gelu(x.data_ptr(), y.data_ptr(), x.numel())
    return y


def normed(
    x: torch.Tensor,
    mean: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor | None:
    """Return a layer norm whose statistics are known.

    Args:
        x: fp32 [..., D], contiguous.
        mean: fp32 [..., 1].
        inverse: fp32 [..., 1], one over the deviation.
        weight: fp32 [D], or of more dimensions that a row consists of.
        bias: fp32, as the weight.

    Returns:
        None where operators of torch have to do it.
    """
    if not runs_here(x):
        return None
    if not all(map(_is_plain, (mean, inverse, weight, bias))):
        return None
    y = torch.empty_like(x)
    _norm(
        x.data_ptr(),
        y.data_ptr(),
        mean.data_ptr(),
        inverse.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        mean.numel(),
        weight.numel(),
    )
    return y


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.is_contiguous()
