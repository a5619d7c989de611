"""Chains on a GPU: pivots and first-order recurrences as associative scans (Triton).

One program works on one row, block by block, with a carry from block to block. The
step from one left pivot to the next, u -> a - k / u, is one of the maps
u -> A - K / (u - B), and these are closed under composition (the star product;
Redheffer 1959): with r = 1 / (A1 - B2), first map 1, then map 2 is

    A = A2 - K2 r,    K = (K1 r) (K2 r),    B = B1 + K1 r

so that a scan of O(log N) depth gives all pivots. Nothing has to be rescaled: with
k >= 0 and Im z = eta > 0 every A1 - B2 keeps |Im| >= eta. Right pivots are the same
scan from the other end. Recurrences x_i = p_i + f_i x_(i-1) compose as
(f2 f1, p2 + f2 p1).

Triton knows no complex numbers; every quantity is a pair. With `TRITON_INTERPRET=1` in
the environment the same code runs on the CPU, slowly, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # sites at a time: wider blocks cost registers, narrower ones carries


@triton.jit
def _product(ar, ai, br, bi):
    return ar * br - ai * bi, ar * bi + ai * br


@triton.jit
def _reciprocal(ar, ai):
    size = ar * ar + ai * ai
    return ar / size, -ai / size


@triton.jit
def _star(ar, ai, kr, ki, br, bi, cr, ci, lr, li, er, ei):
    rr, ri = _reciprocal(ar - er, ai - ei)
    sr, si = _product(kr, ki, rr, ri)
    tr, ti = _product(lr, li, rr, ri)
    mr, mi = _product(sr, si, tr, ti)
    return cr - tr, ci - ti, mr, mi, br + sr, bi + si


@triton.jit
def _linear(fr, fi, pr, pi, gr, gi, qr, qi):
    hr, hi = _product(fr, fi, gr, gi)
    sr, si = _product(pr, pi, gr, gi)
    return hr, hi, qr + sr, qi + si


@triton.jit
def _pivot_rows(
    a,
    k,
    out,
    length,
    k_stride,
    from_right: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    a += row * length * 2
    out += row * length * 2
    k += row * k_stride
    lane = tl.arange(0, block)
    carry_r = tl.full((1,), 1.0, a.dtype.element_ty)  # the first map ignores it
    carry_i = tl.full((1,), 0.0, a.dtype.element_ty)
    for start in range(0, length, block):
        place = start + lane
        site = length - 1 - place if from_right else place
        bond = site if from_right else site - 1
        inside = place < length
        linked = inside & (place > 0)
        ar = tl.load(a + 2 * site, inside, 1.0)
        ai = tl.load(a + 2 * site + 1, inside, 0.0)
        kr = tl.load(k + 2 * bond, linked, 0.0)
        ki = tl.load(k + 2 * bond + 1, linked, 0.0)
        zero = tl.zeros_like(ar)
        ar, ai, kr, ki, br, bi = tl.associative_scan(
            (ar, ai, kr, ki, zero, zero), 0, _star
        )
        rr, ri = _reciprocal(carry_r - br, carry_i - bi)
        tr, ti = _product(kr, ki, rr, ri)
        ur, ui = ar - tr, ai - ti
        tl.store(out + 2 * site, ur, inside)
        tl.store(out + 2 * site + 1, ui, inside)
        last = lane == block - 1
        carry_r = tl.sum(tl.where(last, ur, 0.0), 0, keep_dims=True)
        carry_i = tl.sum(tl.where(last, ui, 0.0), 0, keep_dims=True)


@triton.jit
def _recurrence_rows(
    factor,
    source,
    out,
    length,
    block: tl.constexpr,
) -> None:
    begin = tl.program_id(0).to(tl.int64) * length * 2
    lane = tl.arange(0, block)
    carry_r = tl.full((1,), 0.0, source.dtype.element_ty)
    carry_i = tl.full((1,), 0.0, source.dtype.element_ty)
    for start in range(0, length, block):
        place = start + lane
        inside = place < length
        at = begin + 2 * place
        fr, fi = (
            tl.load(factor + at, inside, 0.0),
            tl.load(factor + at + 1, inside, 0.0),
        )
        pr, pi = (
            tl.load(source + at, inside, 0.0),
            tl.load(source + at + 1, inside, 0.0),
        )
        fr, fi, pr, pi = tl.associative_scan((fr, fi, pr, pi), 0, _linear)
        tr, ti = _product(fr, fi, carry_r, carry_i)
        xr, xi = pr + tr, pi + ti
        tl.store(out + at, xr, inside)
        tl.store(out + at + 1, xi, inside)
        last = lane == block - 1
        carry_r = tl.sum(tl.where(last, xr, 0.0), 0, keep_dims=True)
        carry_i = tl.sum(tl.where(last, xi, 0.0), 0, keep_dims=True)


def pivots(a: Tensor, k: Tensor, *, from_right: bool) -> Tensor:
    """Compute the pivots u_i = a_i - k_(i-1) / u_(i-1), or those from the right.

    Args:
        a: `[B, N]` complex.
        k: `[1 or B, N-1]` complex, products of opposite off-diagonals.
        from_right: Compute w_i = a_i - k_i / w_(i+1) instead.

    Returns:
        `[B, N]` of the dtype of `a`.
    """
    a, k = a.resolve_conj().contiguous(), k.resolve_conj().contiguous()
    out = torch.empty_like(a)
    stride = 0 if len(k) == 1 else 2 * k.shape[-1]
    _pivot_rows[(len(a),)](
        *(torch.view_as_real(x) for x in (a, k, out)),
        a.shape[-1],
        stride,
        from_right=from_right,
        block=BLOCK,
    )
    return out


def linear_scan(factor: Tensor, source: Tensor) -> Tensor:
    """Solve x_i = source_i + factor_i * x_(i-1) along the last dimension, x_(-1) = 0.

    Args:
        factor: `[..., N]` complex.
        source: `[..., N]` complex, of the shape and dtype of `factor`.

    Returns:
        x, of their shape.
    """
    factor, source = (
        factor.resolve_conj().contiguous(),
        source.resolve_conj().contiguous(),
    )
    out = torch.empty_like(source)
    rows = source.numel() // max(source.shape[-1], 1)
    if rows:
        _recurrence_rows[(rows,)](
            *(torch.view_as_real(x) for x in (factor, source, out)),
            source.shape[-1],
            block=BLOCK,
        )
    return out
