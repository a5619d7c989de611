"""1 / (1 + i K) as a Chebyshev series, with a proven bound on its error.

For K with spectrum in [0, 2g], put K = g (1 + X). Then 1 / (1 + i g (1 + x)) has its
pole at x0 = -1 + i/g, and its series on [-1, 1] is known in closed form:

    1 / (x0 - x) = (1 / s) (1 + 2 sum_n rho^-n T_n(x))
    s = sqrt(x0^2 - 1),  rho = x0 + s,  |rho| > 1

so that cutting it after T_m errs by at most 2 |c_0| |rho|^-m / (|rho| - 1): geometric
convergence. Jackson damping, made for functions that jump, would hold an analytic one
at 1e-3 to 1e-2. Coefficients follow the spectrum of every call; none is learned.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable

from torch import Tensor

from castwise.errors import SolverError

MAX_DEGREE = 200


def coefficients(half_width: float, degree: int) -> list[complex]:
    """Return c_0 ... c_degree of 1 / (1 + i K), spectrum of K in [0, 2 half_width]."""
    s, rho = _pole(half_width)
    first = 1j / (half_width * s)
    return [first, *(2 * first * rho**-n for n in range(1, degree + 1))]


def error_bound(half_width: float, degree: int) -> float:
    """Bound the error of the series cut after `degree`, anywhere on the spectrum."""
    s, rho = _pole(half_width)
    first = abs(1 / (half_width * s))
    return 2 * first * abs(rho) ** -degree / (abs(rho) - 1)


def degree_for(half_width: float, tolerance: float) -> int:
    """Return the least degree whose error bound is below the tolerance.

    Raises:
        SolverError: if that takes more than 200 terms.
    """
    _, rho = _pole(half_width)
    excess = math.log(error_bound(half_width, 0) / tolerance)
    degree = max(1, math.ceil(excess / math.log(abs(rho))))
    if degree > MAX_DEGREE:
        raise SolverError(
            f"The Chebyshev series needs degree {degree} for an error of"
            f" {tolerance:.0e} at |K| = {2 * half_width:.3g}; use solver='explicit',"
            " whose cost does not depend on |K|, or a smaller time step."
        )
    return degree


def apply_series(
    apply_k: Callable[[Tensor], Tensor],
    planes: Tensor,
    half_width: float,
    degree: int,
    sign: int,
) -> Tensor:
    """Compute (1 + i sign K)^-1 planes, for planes `[2, ..., D]` (real, imaginary)."""

    def apply_x(x: Tensor) -> Tensor:
        return apply_k(x) / half_width - x

    terms = coefficients(half_width, degree)
    before, now = planes, apply_x(planes)
    total = _times(terms[0], before, sign) + _times(terms[1], now, sign)
    for term in terms[2:]:
        before, now = now, 2 * apply_x(now) - before
        total = total + _times(term, now, sign)
    return total


def _times(factor: complex, planes: Tensor, sign: int) -> Tensor:
    """Multiply by a complex number, conjugated where sign is -1."""
    turned = planes.flip(0)
    turned[0].neg_()
    return factor.real * planes + sign * factor.imag * turned


def _pole(half_width: float) -> tuple[complex, complex]:
    """Return s and rho, on the branch with |rho| > 1."""
    x0 = -1 + 1j / half_width
    s = cmath.sqrt(x0 * x0 - 1)
    if abs(x0 + s) < 1:
        s = -s
    return s, x0 + s
