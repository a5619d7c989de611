"""The approximate gradients of earlier resolvent code, by name, for comparison only.

None of them is the gradient. They reach the diagonal alone (couplings and z get
nothing), and they forget that G_jj depends on every d_i. Measured against the exact
gradient at N = 128, z = 1j, random upstream (`benchmarks/layers.py gradients`):

    name            formula                                     cosine   relative error
    diagonal        -Re(conj(g) G^2)                              0.94             0.34
    unconjugated    -Re(g G^2): wrong sign of the Im part        -0.02              1.4
    hypothesis-7    -Re(g / (G^2 + 1e-6)), clamped               -0.2..0.6      10..30
    blend           half unconjugated, half hypothesis-7          0.55               12

Their clamps and non-finite-to-zero rules are kept, since these are what made a loss
scale useless: they are not linear in the upstream gradient and hide an overflow.
"""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from castwise.errors import SettingsError
from castwise.layers.resolvent import resolvent_diagonal

LegacyGradient = Literal["diagonal", "unconjugated", "hypothesis-7", "blend"]


def resolvent_diagonal_with_legacy_gradient(
    diagonal: Tensor,
    upper: Tensor,
    lower: Tensor,
    z: Tensor | complex,
    *,
    gradient: LegacyGradient,
) -> Tensor:
    """Compute the exact diagonal, but send an approximate gradient to `diagonal` only.

    Raises:
        SettingsError: if the gradient has no such name.
    """
    if gradient not in get_args(LegacyGradient):
        raise SettingsError(
            "A legacy gradient needs one of the names"
            f" {', '.join(get_args(LegacyGradient))}; got {gradient!r}; use"
            " resolvent_diagonal for the exact gradient."
        )
    with torch.no_grad():
        out = resolvent_diagonal(diagonal, upper, lower, z)
    approximate = _Approximate.apply(diagonal, out, gradient)  # type: ignore[no-untyped-call]
    return cast("Tensor", approximate)


class _Approximate(torch.autograd.Function):
    """Hand `out` on, and answer with the named approximation."""

    @staticmethod
    def forward(ctx: Any, diagonal: Tensor, out: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(out)
        ctx.name, ctx.dtype = name, diagonal.dtype
        return out.view_as(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (out,) = ctx.saved_tensors
        square = out * out
        if ctx.name == "diagonal":
            return -(grad.conj() * square).real.to(ctx.dtype), None, None
        plain = -(grad * square).real
        size = square.abs()
        floor = square / (size + 1e-9) * 1e-3
        inverse = -(grad / (torch.where(size < 1e-3, floor, square) + 1e-6)).real
        share = {"unconjugated": 0.0, "blend": 0.5, "hypothesis-7": 1.0}[ctx.name]
        mixed = (1 - share) * plain + share * inverse
        mixed = torch.where(torch.isfinite(mixed), mixed, 0.0).clamp(-1000, 1000)
        return mixed.to(ctx.dtype), None, None
