"""A causal language model whose tokens meet in resolvents, and its two rivals.

Each chain of a block reads a potential from every token and answers with the last entry
of the resolvent of the chain so far: a continued fraction that runs along the text and
forgets at a rate set by Im z. Initial Im z are spread from wide to narrow, so that some
chains hear the last tokens clearly and others many tokens faintly; Re z are spread over
the band of a clean chain, where a wave travels farthest.

The layer is unguarded: a policy protects it, or does not (`RECIPE.island`).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from castwise.layers.resolvent_mixing import ResolventMixing
from castwise.recipes.language.causal_lm import (
    CausalAttention,
    CausalLm,
    num_parameters,
    same_size,
)
from castwise.recipes.language.plan import Recipe
from castwise.recipes.resolvent_lm.settings import ResolventSettings

RECIPE = Recipe(
    name="resolvent_lm",
    kind="resolvent_lm run",
    model=ResolventSettings,
    island="*blocks.*.mixing",
    because="a potential rounded to bf16 moves the response by 2e-3 and more",
)
"""What tells this recipe from the other; its island is what a policy has to protect."""

_FLOOR = 1e-2  # of Im z, in the layer
_BAND = (-3.5, -0.5)  # well inside the band of d = -2, couplings 1


def build_model(settings: ResolventSettings, vocab_size: int, length: int) -> nn.Module:
    """Return the model that settings ask for; rivals have as many weights.

    Args:
        settings: Of the model.
        vocab_size: Tokens that there are.
        length: Tokens of the longest window.
    """
    if settings.variant == "layer":
        return _with_resolvents(settings, vocab_size)
    with torch.random.fork_rng(devices=[]):
        target = num_parameters(_with_resolvents(settings, vocab_size))

    def rival(hidden: int) -> nn.Module:
        return CausalLm(
            vocab_size,
            dim=settings.dim,
            num_blocks=settings.num_blocks,
            hidden=hidden,
            mixing=(
                nn.Identity
                if settings.variant == "identity"
                else lambda: CausalAttention(settings.dim, settings.num_heads, length)
            ),
        )

    return same_size(target, rival, settings.hidden)


def _with_resolvents(settings: ResolventSettings, vocab_size: int) -> nn.Module:
    def mixing() -> nn.Module:
        layer = ResolventMixing(
            settings.dim, num_heads=settings.num_chains, guarded=False
        )
        spread(layer, settings)
        return layer

    return CausalLm(
        vocab_size,
        dim=settings.dim,
        num_blocks=settings.num_blocks,
        hidden=settings.hidden,
        mixing=mixing,
    )


@torch.no_grad()
def spread(layer: ResolventMixing, settings: ResolventSettings) -> None:
    """Give every chain of a layer another z."""
    num = settings.num_chains
    ends = [math.log10(each) for each in (settings.widest_eta, settings.narrowest_eta)]
    eta = torch.logspace(ends[0], ends[1], num, dtype=torch.float64)
    raw = (eta - _FLOOR).clamp_min(1e-3).expm1().log()
    layer.raw_eta.copy_(raw)
    # neighbours in eta are far apart in energy
    energy = torch.linspace(*_BAND, num, dtype=torch.float64)
    order = torch.arange(num) * 7 % num if num % 7 else torch.arange(num)
    layer.energy.copy_(energy[order])
