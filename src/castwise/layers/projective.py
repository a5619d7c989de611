"""The resolvent of one row by projective pairs: never divides before the very end.

A pivot u = p / q is carried as the pair (p, q), scaled to unit size after every site.
A zero pivot is then nothing special: it is p = 0, and the next one has q = 0. This is
the tier for what breaks the ratio form: negative couplings and real z. It is a plain
loop over Python's complex numbers, since only the rows that broke come here.

    p_i = a_i p_(i-1) - k_(i-1) q_(i-1),   q_i = p_(i-1)        from the left
    r_i = a_i r_(i+1) - k_i     t_(i+1),   t_i = r_(i+1)        from the right
    G_i = q_i t_i / (p_i t_i + r_i q_i - a_i q_i t_i)
    dlogdet/dk_i = -q_i t_(i+1) / (p_i r_(i+1) - k_i q_i t_(i+1))

Gradients are tangents: sum_j s_j dG_jj/dx = d/de [dlogdet(a + e s)/dx].
"""

from __future__ import annotations

from typing import NamedTuple

from castwise.errors import SolverError

# value and tangent of one complex number
Dual = tuple[complex, complex]


class RowGradient(NamedTuple):
    """Analytic gradient of one row: change of sum_j s_j G_jj."""

    site: list[complex]
    """With respect to a_i."""

    bond: list[complex]
    """With respect to k_i."""


def row_diagonal(a: list[complex], k: list[complex]) -> list[complex]:
    """Compute the diagonal of the inverse of one tridiagonal matrix.

    Args:
        a: N diagonal entries.
        k: N-1 products of opposite off-diagonals.

    Raises:
        SolverError: if the matrix is singular.
    """
    zero = [0j] * len(a)
    return [value for value, _ in _diagonal(a, zero, k)]


def row_gradient(a: list[complex], k: list[complex], s: list[complex]) -> RowGradient:
    """Compute the gradient of sum_j s_j G_jj by a_i and by k_i."""
    left, right = _pairs(a, s, k), _pairs(a[::-1], s[::-1], k[::-1])[::-1]
    bond = []
    for i, coupling in enumerate(k):
        (p, q), (r, t) = left[i], right[i + 1]
        both = _times(q, t)
        det = _minus(_times(p, r), _scale(coupling, both))
        bond.append(-_over(both, det, i)[1])
    return RowGradient([slope for _, slope in _diagonal(a, s, k)], bond)


def _diagonal(a: list[complex], s: list[complex], k: list[complex]) -> list[Dual]:
    """Compute G_i and its tangent along a + e s."""
    left, right = _pairs(a, s, k), _pairs(a[::-1], s[::-1], k[::-1])[::-1]
    entries = []
    for i, ((p, q), (r, t)) in enumerate(zip(left, right, strict=True)):
        both = _times(q, t)
        outer = _plus(_times(p, t), _times(r, q))
        det = _minus(outer, _times((a[i], s[i]), both))
        entries.append(_over(both, det, i))
    return entries


def _pairs(
    a: list[complex], s: list[complex], k: list[complex]
) -> list[tuple[Dual, Dual]]:
    """Run (p, q) from the first site to the last."""
    p: Dual = (1, 0)
    q: Dual = (0, 0)
    pairs = []
    for i, (value, slope) in enumerate(zip(a, s, strict=True)):
        pulled = _scale(k[i - 1], q) if i else (0, 0)
        p, q = _minus(_times((value, slope), p), pulled), p
        size = max(abs(p[0]), abs(q[0]))
        if size > 0:
            p, q = _scale(1 / size, p), _scale(1 / size, q)
        pairs.append((p, q))
    return pairs


def _times(x: Dual, y: Dual) -> Dual:
    return x[0] * y[0], x[0] * y[1] + x[1] * y[0]


def _plus(x: Dual, y: Dual) -> Dual:
    return x[0] + y[0], x[1] + y[1]


def _minus(x: Dual, y: Dual) -> Dual:
    return x[0] - y[0], x[1] - y[1]


def _scale(factor: complex, x: Dual) -> Dual:
    return factor * x[0], factor * x[1]


def _over(x: Dual, y: Dual, site: int) -> Dual:
    if y[0] == 0:
        raise SolverError(
            "The resolvent needs a z that is no eigenvalue of the matrix; T - z I is"
            f" singular at site {site}; give z an imaginary part."
        )
    ratio = x[0] / y[0]
    return ratio, (x[1] - ratio * y[1]) / y[0]
