"""Odd-even reduction of a tridiagonal matrix: the plain-torch way to the resolvent.

Eliminating every odd site leaves a chain of half the length (decimation, or cyclic
reduction; Hockney 1965). Going down and up again takes 2 log2(N) vector steps and O(N)
work, on any device, without a compiler, and autograd can follow every line of it. A
chain of even length gets one more site without a bond; a short one is inverted as it
is.

    site odd o between even l and r:   q = 1 / a_o,  p_l = k_l q,  p_r = k_r q
    a_l -= p_l,  a_r -= p_r,  new bond  k' = p_l p_r
    and back:  m_l = G_l + p_r h',  m_r = G_r + p_l h'
               G_o = q (1 + p_l m_l + p_r m_r),  h_l = q m_l,  h_r = q m_r

Here a = d - z, k_i = upper_i * lower_i, G_i is the diagonal of the inverse and h_i that
of its bond without the coupling: G[i+1, i] = -lower_i h_i. Nothing grows with N: with
k >= 0 and Im z = eta > 0 every pivot keeps |Im| >= eta, so that |G| <= 1 / eta.

The exact gradient is one more run: dG_i / da_j is symmetric in i and j, so that the
gradient of sum_i s_i G_i by `a` is how much G changes as `a` moves along s. Hence
`diagonal_along`, which carries the change of every quantity (a forward derivative,
written out: `torch.func.jvp` costs ten times the vector steps themselves).
"""

from __future__ import annotations

import torch
from torch import Tensor, addcmul
from torch.nn.functional import pad

DENSE = 9  # sites that are inverted as a matrix: cheaper than so many vector steps


def diagonal_and_bonds(a: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the diagonal `[..., N]` of the inverse, and its bonds `[..., N-1]`.

    Args:
        a: `[..., N]` complex, the diagonal of the matrix, N >= 1.
        k: `[..., N-1]` complex, products of opposite off-diagonals.

    Returns:
        G_i, and y_i = upper_i * G[i+1, i] = lower_i * G[i, i+1].
    """
    diagonal, h = _solve(a, k)
    return diagonal, -k * h


def diagonal_along(
    a: Tensor, k: Tensor, change: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the diagonal, its change and that of h as `a` moves.

    Args:
        a: `[..., N]` complex, the diagonal of the matrix, N >= 1.
        k: `[..., N-1]` complex, products of opposite off-diagonals.
        change: `[..., N]` complex, how `a` moves.

    Returns:
        G, dG and dh along `change`.
    """
    diagonal, _, by_a, by_h = _solve_along(a, k, change, None)
    return diagonal, by_a, by_h


def _solve(a: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return G and h."""
    length = a.shape[-1]
    if length <= DENSE:
        return _entries(torch.linalg.inv_ex(_dense(a, k, 1)).inverse)
    if length % 2 == 0:
        g, h = _solve(pad(a, (0, 1), value=1), pad(k, (0, 1)))
        return g[..., :length], h[..., : length - 1]
    q = a[..., 1::2].reciprocal()
    left, right = k[..., 0::2] * q, k[..., 1::2] * q
    g, h = _solve(_without(a[..., 0::2], left, right), left * right)
    m_left, m_right = addcmul(g[..., :-1], right, h), addcmul(g[..., 1:], left, h)
    odd = addcmul(q, q, addcmul(left * m_left, right, m_right))
    return _interleave(g, odd), _interleave(q * m_left, q * m_right)


def _solve_along(
    a: Tensor, k: Tensor, da: Tensor, dk: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return G, h and their changes; dk is None where the bonds stay."""
    length = a.shape[-1]
    if length <= DENSE:
        inverse = torch.linalg.inv_ex(_dense(a, k, 1)).inverse
        move = torch.diag_embed(da) if dk is None else _dense(da, dk, 0)
        return *_entries(inverse), *_entries(-inverse @ move @ inverse)
    if length % 2 == 0:
        longer = pad(a, (0, 1), value=1), pad(k, (0, 1)), pad(da, (0, 1))
        g, h, dg, dh = _solve_along(*longer, None if dk is None else pad(dk, (0, 1)))
        last = length - 1
        return g[..., :length], h[..., :last], dg[..., :length], dh[..., :last]
    q = a[..., 1::2].reciprocal()
    left, right = k[..., 0::2] * q, k[..., 1::2] * q
    fall = q * da[..., 1::2]  # -dq / q
    d_left, d_right = left * fall, right * fall  # so far, of the other sign
    if dk is None:
        d_left, d_right = d_left.neg_(), d_right.neg_()
    else:
        d_left = torch.addcmul(-d_left, dk[..., 0::2], q)
        d_right = torch.addcmul(-d_right, dk[..., 1::2], q)
    g, h, dg, dh = _solve_along(
        _without(a[..., 0::2], left, right),
        left * right,
        _without(da[..., 0::2], d_left, d_right),
        (d_left * right).addcmul_(left, d_right),
    )
    m_left, m_right = addcmul(g[..., :-1], right, h), addcmul(g[..., 1:], left, h)
    dm_left = addcmul(dg[..., :-1], d_right, h).addcmul_(right, dh)
    dm_right = addcmul(dg[..., 1:], d_left, h).addcmul_(left, dh)
    odd = addcmul(q, q, (left * m_left).addcmul_(right, m_right))
    d_odd = (d_left * m_left).addcmul_(left, dm_left)
    d_odd = d_odd.addcmul_(d_right, m_right).addcmul_(right, dm_right).mul_(q)
    return (
        _interleave(g, odd),
        _interleave(q * m_left, q * m_right),
        _interleave(dg, d_odd.addcmul_(fall, odd, value=-1)),
        _interleave(
            dm_left.addcmul_(fall, m_left, value=-1).mul_(q),
            dm_right.addcmul_(fall, m_right, value=-1).mul_(q),
        ),
    )


def _dense(a: Tensor, k: Tensor, upper: float) -> Tensor:
    """Return the matrix with couplings `upper` above and k below its diagonal."""
    above = torch.diag_embed(torch.full_like(k, upper), 1)
    return torch.diag_embed(a) + torch.diag_embed(k, -1) + above


def _entries(inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Return the diagonal and h of a dense inverse."""
    return inverse.diagonal(dim1=-2, dim2=-1), -inverse.diagonal(1, -2, -1)


def _without(even: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Take what the odd sites pull off the even ones."""
    even = even.clone()
    even[..., :-1] -= left
    even[..., 1:] -= right
    return even


def _interleave(first: Tensor, second: Tensor) -> Tensor:
    """Merge two series into first[0], second[0], first[1], ...; first may be longer."""
    length = first.shape[-1] + second.shape[-1]
    merged = second.new_empty(*second.shape[:-1], length)
    merged[..., 0::2] = first
    merged[..., 1::2] = second
    return merged


def linear_scan(factor: Tensor, source: Tensor) -> Tensor:
    """Solve x_i = source_i + factor_i * x_(i-1) along the last dimension, x_(-1) = 0.

    Pairs are merged until one is left: 2 log2(N) vector steps, O(N) work.
    """
    length = source.shape[-1]
    if length <= 1:
        return source
    half = length // 2
    even_factor, even_source = factor[..., 0::2], source[..., 0::2]
    odd_factor, odd_source = factor[..., 1::2], source[..., 1::2]
    odd = linear_scan(
        odd_factor * even_factor[..., :half],
        odd_source + odd_factor * even_source[..., :half],
    )
    before = pad(odd, (1, 0))[..., : even_source.shape[-1]]
    return _interleave(even_source + even_factor * before, odd)
