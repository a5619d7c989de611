"""A sequence layer that mixes tokens by the resolvent of a learned chain.

Each head reads one potential per token, d = -2 + span tanh(v / span), couples
neighbours with one learned strength, and asks for the response G_ii of the chain at
z = energy + i eta. Re G and Im G are two features per head. The reach of the mixing is
set by eta: at eta = 1 some 4 sites hold 99.9 % of it, at 0.1 many more.

A response that looks both ways sees the token that a language model has to predict, so
`causal` is the default. The potential is what bf16 hurts: rounding d alone moves G by
2e-3 at eta = 1 and by 8e-3 at 0.5. `guarded` therefore computes it in fp32 under any
autocast; without the guard the surroundings decide, and a policy can protect it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from castwise.layers.resolvent import (
    DEFAULT_PRECISION,
    ResolventPrecision,
    resolvent_diagonal,
)


class ResolventMixing(nn.Module):
    """Mix tokens: `[..., N, dim]` to `[..., N, dim]`, dtype kept.

    Args:
        dim: width of a token.
        num_heads: number of chains; each has its own potential, coupling and z.
        eta: initial Im z of every head, learned above a floor of 1e-2.
        span: greatest |d + 2|.
        causal: whether a token sees only those before it.
        guarded: whether the layer keeps itself out of autocast.
        precision: arithmetic of the resolvent.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        eta: float = 1.0,
        span: float = 3.0,
        causal: bool = True,
        guarded: bool = True,
        precision: ResolventPrecision = DEFAULT_PRECISION,
    ) -> None:
        super().__init__()
        self.span, self.causal, self.guarded = span, causal, guarded
        self.precision = precision
        self.potential = nn.Linear(dim, num_heads)
        self.output = nn.Linear(2 * num_heads, dim)
        before_softplus = torch.tensor(max(eta - 1e-2, 1e-3)).expm1().log().item()
        self.raw_eta = nn.Parameter(torch.full((num_heads,), before_softplus))
        self.energy = nn.Parameter(torch.zeros(num_heads))
        self.raw_coupling = nn.Parameter(torch.full((num_heads,), 0.5413))  # k = 1

    # complex numbers, for which Inductor has no code, between two graphs
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """Return the response of the chains, mapped back to tokens."""
        device_type = x.device.type
        if not self.guarded:
            return self._mix(x)
        with torch.autocast(device_type, enabled=False):
            return self._mix(x.float() if x.dtype.itemsize < 4 else x).to(x.dtype)

    def in_fp64(self, x: Tensor) -> Tensor:
        """Return what the layer would return if it computed in fp64 throughout."""
        with torch.autocast(x.device.type, enabled=False):
            return self._mix(x.double())

    def _z(self, dtype: torch.dtype) -> Tensor:
        """Return energy + i eta; there is no complex bf16."""
        wide = torch.promote_types(dtype, torch.float32)
        eta = softplus(self.raw_eta.to(wide)) + 1e-2
        return torch.complex(self.energy.to(wide), eta)

    def _mix(self, x: Tensor) -> Tensor:
        weight, bias = self.potential.weight, self.potential.bias
        v = linear(x, weight.to(x.dtype), bias.to(x.dtype)).transpose(-1, -2)
        d = self.span * torch.tanh(v / self.span) - 2  # [..., heads, N]
        coupling = softplus(self.raw_coupling)[:, None].to(d.dtype)
        coupling = coupling.expand(-1, max(d.shape[-1] - 1, 0))
        out = resolvent_diagonal(
            d,
            coupling,
            coupling,
            self._z(d.dtype),
            precision=self.precision,
            causal=self.causal,
        )
        # [..., heads, N, 2] -> [..., N, 2 heads]
        features = torch.view_as_real(out).movedim(-3, -2).flatten(-2).to(x.dtype)
        return linear(
            features, self.output.weight.to(x.dtype), self.output.bias.to(x.dtype)
        )
