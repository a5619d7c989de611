"""A causal language model in complex numbers, with propagators in its middle.

    embedding -> blocks -> propagators -> blocks -> norm -> head

A complex tensor travels as its two planes side by side, `[..., 2 D]`: real numbers that
autocast, Inductor and every optimizer understand. A complex product is one real one,

    [y_re  y_im] = [x_re  x_im] [[A^T, B^T], [-B^T, A^T]]      for the weight A + i B,

attention weighs by Re <q, k>, and a position turns a channel by a phase, which is what
rotary positions are. Between the blocks stands the stack of propagators, each a phase
rotation by intensity and a unitary step along a graph of channels: it keeps the norm of
every token. The logits are Re <e_v, psi>, with the weights of the embedding.

The propagators are unguarded: a policy protects them, or does not (`RECIPE.island`).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from castwise.layers.cayley import CayleyPropagator, Solver
from castwise.recipes.language.causal_lm import (
    CausalAttention,
    CausalLm,
    Head,
    num_parameters,
    rotary_turns,
    same_size,
)
from castwise.recipes.language.plan import Recipe
from castwise.recipes.soliton_lm.settings import SolitonSettings

RECIPE = Recipe(
    name="soliton_lm",
    kind="soliton_lm run",
    model=SolitonSettings,
    island="*propagation",
    because="a unitary step in bf16 leaves a residual of 1e-3, in fp32 of 1e-7",
)
"""What tells this recipe from the other; its island is what a policy has to protect."""


class ComplexLinear(nn.Module):
    """A complex linear map of planes `[..., 2 in]` to `[..., 2 out]`."""

    def __init__(self, num_in: int, num_out: int, *, share: float = 1.0) -> None:
        super().__init__()
        std = share * (2 * num_in) ** -0.5
        self.re = nn.Parameter(std * torch.randn(num_out, num_in))
        self.im = nn.Parameter(std * torch.randn(num_out, num_in))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by `re + i im`."""
        upper = torch.cat((self.re, -self.im), dim=1)
        lower = torch.cat((self.im, self.re), dim=1)
        return linear(x, torch.cat((upper, lower)))


class ComplexNorm(nn.Module):
    """Divide by the root mean square of the moduli; one real gain per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., 2 D]`."""
        return rms_norm(x, x.shape[-1:], self.weight.repeat(2))


class ComplexAttention(nn.Module):
    """Causal attention weighed by the real part of the Hermitian product."""

    turns: Tensor

    def __init__(self, dim: int, num_heads: int, length: int, *, share: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = ComplexLinear(dim, 3 * dim)
        self.output = ComplexLinear(dim, dim, share=share)
        turns = rotary_turns(length, dim // num_heads)
        self.register_buffer("turns", turns, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, T, 2 D]`."""
        # [B, T, planes, 3, heads, channels]
        planes = self.qkv(x).unflatten(-1, (2, 3, self.num_heads, -1))
        q, k, v = planes.unbind(-3)
        q, k = (turn(each, self.turns) for each in (q, k))
        # planes of a head side by side: a real product of them is Re <q, k>
        q, k, v = (
            each.transpose(-3, -2).flatten(-2).transpose(1, 2) for each in (q, k, v)
        )
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
        out = out.transpose(1, 2)
        out = out.reshape(*out.shape[:-1], 2, -1).transpose(-3, -2)
        return cast("Tensor", self.output(out.flatten(-3)))


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Multiply `[B, T, planes, heads, channels]` by exp(i turns)."""
    angle = turns[: x.shape[1], None]
    cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    re, im = x.unbind(2)
    return torch.stack((re * cosine - im * sine, re * sine + im * cosine), dim=2)


class ComplexFeedForward(nn.Module):
    """Complex channels, each scaled by a real gate that reads both planes."""

    def __init__(self, dim: int, hidden: int, *, share: float) -> None:
        super().__init__()
        self.up = ComplexLinear(dim, hidden)
        self.gate = nn.Linear(2 * dim, hidden, bias=False)
        self.down = ComplexLinear(hidden, dim, share=share)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., 2 D]`."""
        gate = silu(self.gate(x))
        return cast("Tensor", self.down(self.up(x) * torch.cat((gate, gate), dim=-1)))


class ComplexBlock(nn.Module):
    """One pre-norm block in complex numbers."""

    def __init__(self, settings: SolitonSettings, hidden: int, length: int) -> None:
        super().__init__()
        share = (2 * settings.num_blocks) ** -0.5
        self.attention_norm = ComplexNorm(settings.dim)
        self.attention = ComplexAttention(
            settings.dim, settings.num_heads, length, share=share
        )
        self.feed_forward_norm = ComplexNorm(settings.dim)
        self.feed_forward = ComplexFeedForward(settings.dim, hidden, share=share)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, T, 2 D]`."""
        x = x + self.attention(self.attention_norm(x))
        return cast("Tensor", x + self.feed_forward(self.feed_forward_norm(x)))


class Propagation(nn.Module):
    """A stack of propagators on planes `[..., 2 D]`; never below fp32."""

    def __init__(self, settings: SolitonSettings) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            CayleyPropagator(
                settings.dim,
                dt=settings.dt,
                envelope=settings.envelope,
                sharpness=settings.sharpness,
                sparsity=settings.sparsity,
                solver=cast("Solver", settings.solver),
                guarded=False,
                seed=42 + number,
            )
            for number in range(settings.num_propagators)
        )

    # complex numbers, which Inductor has no code for, between two graphs
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """Return planes in the format that they came in."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        psi = torch.complex(*wide.chunk(2, -1))
        for layer in self.layers:
            psi = layer(psi)
        return torch.cat((psi.real, psi.imag), dim=-1).to(x.dtype)


class SolitonLm(nn.Module):
    """The model; with `propagates=False` nothing stands in place of the propagators."""

    def __init__(
        self,
        settings: SolitonSettings,
        vocab_size: int,
        length: int,
        *,
        hidden: int | None = None,
        propagates: bool = True,
    ) -> None:
        super().__init__()
        width = settings.hidden if hidden is None else hidden
        half = settings.num_blocks // 2
        self.embedding = nn.Embedding(vocab_size, 2 * settings.dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        blocks = [
            ComplexBlock(settings, width, length) for _ in range(settings.num_blocks)
        ]
        self.before = nn.ModuleList(blocks[:half])
        self.propagation = Propagation(settings) if propagates else nn.Identity()
        self.behind = nn.ModuleList(blocks[half:])
        self.norm = ComplexNorm(settings.dim)
        self.head = Head(self.embedding)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits `[B, T, V]`, or the mean loss against targets `[B, T]`."""
        x = self.embedding(tokens)
        for block in self.before:
            x = block(x)
        x = self.propagation(x)
        for block in self.behind:
            x = block(x)
        return cast("Tensor", self.head(self.norm(x), targets))


def build_model(settings: SolitonSettings, vocab_size: int, length: int) -> nn.Module:
    """Return the model that settings ask for; rivals have as many weights.

    Args:
        settings: Of the model.
        vocab_size: Tokens that there are.
        length: Tokens of the longest window.
    """
    if settings.variant == "layer":
        return SolitonLm(settings, vocab_size, length)
    with torch.random.fork_rng(devices=[]):
        target = num_parameters(SolitonLm(settings, vocab_size, length))
    if settings.variant == "identity":
        return same_size(
            target,
            lambda hidden: SolitonLm(
                settings, vocab_size, length, hidden=hidden, propagates=False
            ),
            settings.hidden,
        )
    # half as wide again as the complex channels are many: then attention and
    # feed-forward share the weights as they do in transformers of any size
    step = 2 * settings.num_heads
    dim = max(step, round(1.5 * settings.dim / step) * step)
    return same_size(
        target,
        lambda hidden: CausalLm(
            vocab_size,
            dim=dim,
            num_blocks=settings.num_blocks,
            hidden=hidden,
            mixing=lambda: CausalAttention(dim, settings.num_heads, length),
        ),
        2 * settings.hidden,
    )
