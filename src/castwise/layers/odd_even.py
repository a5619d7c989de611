"""Odd-even reduction of a tridiagonal matrix: the plain-torch way to the resolvent.

Eliminating every odd site leaves a chain of half the length (decimation, or cyclic
reduction; Hockney 1965). Going down and up again takes 2 log2(N) vector steps and O(N)
work, on any device, without a compiler, and autograd can follow every line of it.

    site odd o between even l and r:   q = 1 / a_o
    a_l -= k_l q,  a_r -= k_r q,  new bond  k' = k_l q k_r q
    and back:  G_o = q (1 + p_l + p_r - 2 y'),  p_l = k_l q G_l,  p_r = k_r q G_r
               y_l = y' - p_l,  y_r = y' - p_r

Here a = d - z, k_i = upper_i * lower_i, G_i is the diagonal of the inverse and the bond
y_i = upper_i * G[i+1, i] = lower_i * G[i, i+1]. Nothing grows with N: with k >= 0 and
Im z = eta > 0 every pivot keeps |Im| >= eta, so that |G| <= 1 / eta.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def diagonal_and_bonds(a: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the diagonal `[..., N]` of the inverse, and its bonds `[..., N-1]`.

    Args:
        a: `[..., N]` complex, the diagonal of the matrix, N >= 1.
        k: `[..., N-1]` complex, products of opposite off-diagonals.
    """
    num_sites = a.shape[-1]
    if num_sites == 1:
        return a.reciprocal(), k
    lonely = 1 - num_sites % 2  # an even chain ends in an odd site without right bond
    k_left = k[..., 0::2]
    k_right = pad(k[..., 1::2], (0, lonely))
    inverse = a[..., 1::2].reciprocal()
    pull_left = k_left * inverse
    pull_right = k_right * inverse
    bond_kept = slice(None, -1 if lonely else None)
    halved_a = (
        a[..., 0::2]
        - pad(pull_left, (0, 1 - lonely))
        - pad(pull_right[..., bond_kept], (1, 0))
    )
    halved_k = (pull_left * pull_right)[..., bond_kept]
    even, bond = diagonal_and_bonds(halved_a, halved_k)
    bond = pad(bond, (0, lonely))
    p_left = pull_left * even[..., : inverse.shape[-1]]
    p_right = pull_right * pad(even[..., 1:], (0, lonely))
    odd = inverse * (1 + p_left + p_right - 2 * bond)
    return (
        _interleave(even, odd),
        _interleave(bond - p_left, bond - p_right)[..., : num_sites - 1],
    )


def _interleave(first: Tensor, second: Tensor) -> Tensor:
    """Merge two series into first[0], second[0], first[1], ...; first may be longer."""
    longer = first.shape[-1] - second.shape[-1]
    merged = torch.stack((first, pad(second, (0, longer))), dim=-1).flatten(-2)
    return merged[..., : merged.shape[-1] - longer]


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
