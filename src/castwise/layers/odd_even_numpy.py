"""The odd-even reduction of `odd_even` in NumPy, for a CPU without the compiled kernel.

The same formulas. A chain of 1,024 sites takes ten levels of some thirty operations on
ever shorter vectors, so that what counts is the cost of one call: some 0.5 us in NumPy,
some 2 us in PyTorch. Nothing is recorded here; higher derivatives go through
`odd_even`. Inside, k has one entry for each site, the last of which is zero.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.complexfloating[Any, Any]]
DType = np.dtype[Any]

DENSE = 8  # sites that are inverted as a matrix: cheaper than so many vector steps
_NOTHING = np.empty((0, 0), np.complex64)  # stands where nothing is wanted


def diagonal_and_bonds(
    a: Array, k: Array, *, bonds: bool = True, dtype: DType | None = None
) -> tuple[Array, Array]:
    """Compute the diagonal `[B, N]` of the inverse, and its bonds `[B, N-1]`.

    Args:
        a: `[B, N]`, the diagonal of the matrix, N >= 1.
        k: `[1 or B, N-1]`, products of opposite off-diagonals.
        bonds: Whether bonds are wanted; else they are empty.
        dtype: Of the diagonal. Default: that of a.
    """
    with np.errstate(all="ignore"):
        diagonal, h = _solve(a, _longer(k, 0), bonds=bonds, dtype=dtype)
        return diagonal, -k * h[:, :-1] if bonds else h


def diagonal_along(
    a: Array, k: Array, change: Array, dtype: DType, *, bonds: bool = True
) -> tuple[NDArray[Any], Array, Array]:
    """Compute how the diagonal, h where wanted, and the trace change as `a` moves.

    Args:
        a: `[B, N]`, the diagonal of the matrix, N >= 1.
        k: `[1 or B, N-1]`, products of opposite off-diagonals.
        change: `[B, N]`, how `a` moves.
        dtype: Of the change of the diagonal; a real one takes real parts.
        bonds: Whether the change of h is wanted; else it is empty.
    """
    k = _longer(k, 0)
    with np.errstate(all="ignore"):
        if not bonds and a.shape[1] > DENSE and a.shape[1] % 2 == 0:
            parts, dh = _change(a, k, change), _NOTHING
        else:
            _, _, dg, dh = _solve_along(a, k, change, None)
            parts, dh = [dg], dh[:, :-1]
        trace = functools.reduce(np.add, [part.sum(-1) for part in parts])
        wanted = parts if dtype.kind == "c" else [part.real for part in parts]
        return _interleave(wanted, dtype), dh, trace


def _solve(
    a: Array, k: Array, *, bonds: bool = True, dtype: DType | None = None
) -> tuple[Array, Array]:
    """Return G and h where wanted; what h holds at the last site means nothing."""
    length = a.shape[1]
    if length <= DENSE:
        g, h = _entries(_inverse(a, k))
        return g.astype(dtype or a.dtype, copy=False), h
    if length % 2:
        g, h = _solve(_longer(a, 1), _longer(k, 0), bonds=bonds, dtype=dtype)
        return g[:, :length], h[:, :length]
    q: Array = 1 / a[:, 1::2]
    left, right = k[:, 0::2] * q, k[:, 1::2] * q
    g, h = _solve(_without(a[:, 0::2], left, right), left * right)
    h_left, h_right = right * h, left * h
    h_left += g
    h_right[:, :-1] += g[:, 1:]
    h_left *= q
    h_right *= q
    # G_o = q + p_l h_l + p_r h_r
    left *= h_left
    right *= h_right
    left += right
    left += q
    out = _interleave([g, left], dtype or a.dtype)
    return out, _interleave([h_left, h_right], a.dtype) if bonds else _NOTHING


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
    fall = q * da[:, 1::2]  # -dq / q
    d_left, d_right = left * fall, right * fall  # so far, of the other sign
    if dk is None:
        np.negative(d_left, out=d_left)
        np.negative(d_right, out=d_right)
    else:
        np.subtract(dk[:, 0::2] * q, d_left, out=d_left)
        np.subtract(dk[:, 1::2] * q, d_right, out=d_right)
    g, h, dg, dh = _solve_along(
        _without(a[:, 0::2], left, right),
        left * right,
        _without(da[:, 0::2], d_left, d_right),
        d_left * right + left * d_right,
    )
    h_left, h_right = right * h, left * h
    h_left += g
    h_right[:, :-1] += g[:, 1:]
    h_left *= q
    h_right *= q
    dh_left, dh_right = d_right * h, d_left * h
    dh_left += right * dh
    dh_right += left * dh
    dh_left += dg
    dh_right[:, :-1] += dg[:, 1:]
    dh_left *= q
    dh_right *= q
    dh_left -= fall * h_left
    dh_right -= fall * h_right
    # the change of q + p_l h_l + p_r h_r
    d_left *= h_left
    d_right *= h_right
    d_left += d_right
    d_left += left * dh_left
    d_left += right * dh_right
    fall *= q
    d_left -= fall
    left *= h_left
    right *= h_right
    left += right
    left += q
    return (
        _interleave([g, left], a.dtype),
        _interleave([h_left, h_right], a.dtype),
        _interleave([dg, d_left], a.dtype),
        _interleave([dh_left, dh_right], a.dtype),
    )


def _change(a: Array, k: Array, da: Array) -> list[Array]:
    """Return the change of G alone, of even and of odd sites, where the bonds stay.

    That is half of the levels' work: G_o = q (1 + p_l G_l + p_r G_r + 2 k' h') needs
    no change of h at the odd sites, and dp = p dq / q.
    """
    q: Array = 1 / a[:, 1::2]
    fall = q * da[:, 1::2]  # -dq / q
    left, right = k[:, 0::2] * q, k[:, 1::2] * q
    bond = left * right
    d_bond = bond * fall
    d_bond *= -2
    even = da[:, 0::2] + left * fall
    even[:, 1:] += (right * fall)[:, :-1]
    g, h, dg, dh = _solve_along(_without(a[:, 0::2], left, right), bond, even, d_bond)
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
    weight *= fall
    change -= weight
    change *= q
    return [dg, change]


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


def _interleave(series: list[Any], dtype: DType) -> NDArray[Any]:
    """Merge one or two series into first[0], second[0], first[1], ..."""
    num_rows, length = series[0].shape
    out = np.empty((num_rows, len(series) * length), dtype)
    for start, each in enumerate(series):
        out[:, start :: len(series)] = each
    return out
