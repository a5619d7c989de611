"""The odd-even reduction of `odd_even` in NumPy, for a CPU without the compiled kernel.

The same formulas. A chain of 1,024 sites takes ten levels of some thirty operations on
ever shorter vectors, so that what counts is the cost of one call: some 0.5 us in NumPy,
some 2 us in PyTorch. Nothing is recorded here; higher derivatives go through
`odd_even`. Inside, k has one entry for each site, the last of which is zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.complexfloating[Any, Any]]

DENSE = 8  # sites that are inverted as a matrix: cheaper than so many vector steps
_NOTHING = np.empty((0, 0), np.complex64)  # stands where nothing is wanted


def diagonal_and_bonds(
    a: Array, k: Array, *, bonds: bool = True
) -> tuple[Array, Array]:
    """Compute the diagonal `[B, N]` of the inverse, and its bonds `[B, N-1]`.

    Args:
        a: `[B, N]`, the diagonal of the matrix, N >= 1.
        k: `[1 or B, N-1]`, products of opposite off-diagonals.
        bonds: Whether bonds are wanted; else they are empty.
    """
    with np.errstate(all="ignore"):
        diagonal, h = _solve(a, _longer(k, 0), bonds=bonds)
        return diagonal, -k * h[:, :-1] if bonds else h


def diagonal_along(
    a: Array, k: Array, change: Array, *, bonds: bool = True
) -> tuple[Array, Array]:
    """Compute the change of the diagonal, and that of h where wanted, as `a` moves."""
    k = _longer(k, 0)
    with np.errstate(all="ignore"):
        if not bonds and a.shape[1] > DENSE and a.shape[1] % 2 == 0:
            return _change(a, k, change), _NOTHING
        _, _, dg, dh = _solve_along(a, k, change, None)
    return dg, dh[:, :-1]


def _solve(a: Array, k: Array, *, bonds: bool = True) -> tuple[Array, Array]:
    """Return G and h where wanted; what h holds at the last site means nothing."""
    length = a.shape[1]
    if length <= DENSE:
        return _entries(_inverse(a, k))
    if length % 2:
        g, h = _solve(_longer(a, 1), _longer(k, 0), bonds=bonds)
        return g[:, :length], h[:, :length]
    q: Array = 1 / a[:, 1::2]
    left, right = k[:, 0::2] * q, k[:, 1::2] * q
    g, h = _solve(_without(a[:, 0::2], left, right), left * right)
    m_left, m_right = right * h, left * h
    m_left += g
    m_right[:, :-1] += g[:, 1:]
    left *= m_left
    right *= m_right
    left += right
    left *= q
    left += q
    if not bonds:
        return _interleave(g, left), _NOTHING
    m_left *= q
    m_right *= q
    return _interleave(g, left), _interleave(m_left, m_right)


def _solve_along(
    a: Array,
    k: Array,
    da: Array,
    dk: Array | None,
) -> tuple[Array, Array, Array, Array]:
    """Return G, h and their changes; dk is None where the bonds stay."""
    length = a.shape[1]
    if length <= DENSE:
        inverse = _inverse(a, k)
        move = _matrix(da, np.zeros_like(k) if dk is None else dk, 0)
        return *_entries(inverse), *_entries(-(inverse @ move @ inverse))
    if length % 2:
        found = _solve_along(
            _longer(a, 1),
            _longer(k, 0),
            _longer(da, 0),
            None if dk is None else _longer(dk, 0),
        )
        g, h, dg, dh = (each[:, :length] for each in found)
        return g, h, dg, dh
    q: Array = 1 / a[:, 1::2]
    left, right = k[:, 0::2] * q, k[:, 1::2] * q
    rise = q * da[:, 1::2]  # dq / q
    np.negative(rise, out=rise)
    d_left, d_right = left * rise, right * rise
    if dk is not None:
        d_left += dk[:, 0::2] * q
        d_right += dk[:, 1::2] * q
    g, h, dg, dh = _solve_along(
        _without(a[:, 0::2], left, right),
        left * right,
        _without(da[:, 0::2], d_left, d_right),
        d_left * right + left * d_right,
    )
    m_left, m_right = right * h, left * h
    m_left += g
    m_right[:, :-1] += g[:, 1:]
    dm_left, dm_right = d_right * h, d_left * h
    dm_left += right * dh
    dm_right += left * dh
    dm_left += dg
    dm_right[:, :-1] += dg[:, 1:]
    odd = left * m_left
    odd += right * m_right
    odd *= q
    odd += q
    # the change of q (1 + p_l m_l + p_r m_r)
    d_left *= m_left
    d_right *= m_right
    left *= dm_left
    right *= dm_right
    left += d_left
    left += right
    left += d_right
    left *= q
    left += rise * odd
    dg = _interleave(dg, left)
    m_left *= q
    m_right *= q
    dm_left *= q
    dm_right *= q
    dm_left += rise * m_left
    dm_right += rise * m_right
    dh = _interleave(dm_left, dm_right)
    return _interleave(g, odd), _interleave(m_left, m_right), dg, dh


def _change(a: Array, k: Array, da: Array) -> Array:
    """Return the change of G alone, where the bonds stay: half of the levels' work.

    G_o = q (1 + p_l G_l + p_r G_r + 2 k' h') needs no m, and dp = p dq / q.
    """
    q: Array = 1 / a[:, 1::2]
    rise = q * da[:, 1::2]  # dq / q
    np.negative(rise, out=rise)
    left, right = k[:, 0::2] * q, k[:, 1::2] * q
    bond = left * right
    d_bond = bond * rise
    d_bond += d_bond
    d_even = _without(da[:, 0::2], left * rise, right * rise)
    even = _without(a[:, 0::2], left, right)
    g, h, dg, dh = _solve_along(even, bond, d_even, d_bond)
    h *= bond
    dh *= bond
    weight, change = left * g, left * dg
    weight[:, :-1] += right[:, :-1] * g[:, 1:]
    change[:, :-1] += right[:, :-1] * dg[:, 1:]
    dh += dh
    change += dh
    h *= 3
    weight += h  # q counts 1 + 2 (p_l G_l + p_r G_r + 3 k' h') times
    weight += weight
    weight += 1
    weight *= rise
    change += weight
    change *= q
    return _interleave(dg, change)


def _matrix(a: Array, k: Array, upper: float) -> Array:
    """Return matrices with `upper` above and k below the diagonal."""
    length = a.shape[1]
    out = np.zeros((a.shape[0], length * length), a.dtype)
    out[:, :: length + 1] = a
    out[:, 1 :: length + 1] = upper
    out[:, length :: length + 1] = k[:, :-1]
    return out.reshape(-1, length, length)


def _inverse(a: Array, k: Array) -> Array:
    """Invert short chains as they are; where one is singular, none has an inverse."""
    matrix = _matrix(a, k, 1)
    try:
        return np.linalg.inv(matrix)
    except np.linalg.LinAlgError:
        return np.full_like(matrix, np.nan)


def _entries(inverse: Array) -> tuple[Array, Array]:
    """Return the diagonal and h of dense inverses."""
    length = inverse.shape[1]
    flat = inverse.reshape(-1, length * length)
    h = np.zeros((len(flat), length), flat.dtype)
    np.negative(flat[:, 1 :: length + 1], out=h[:, :-1])
    return flat[:, :: length + 1], h


def _longer(x: Array, value: float) -> Array:
    """Append a site."""
    out = np.empty((x.shape[0], x.shape[1] + 1), x.dtype)
    out[:, :-1] = x
    out[:, -1] = value
    return out


def _without(even: Array, left: Array, right: Array) -> Array:
    """Take what the odd sites pull off the even ones."""
    even = even - left
    even[:, 1:] -= right[:, :-1]
    return even


def _interleave(first: Array, second: Array) -> Array:
    """Merge two series into first[0], second[0], first[1], ..."""
    out = np.empty((first.shape[0], 2 * first.shape[1]), first.dtype)
    out[:, 0::2] = first
    out[:, 1::2] = second
    return out
