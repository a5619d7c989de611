"""A small causal language model of pre-norm blocks, with any mixing of tokens.

    x <- x + mixing(norm(x));   x <- x + feed_forward(norm(x))

The mixing is what recipes differ in. With causal attention it is the plain transformer
that they are compared with: RMS norms, rotary positions, a gated feed-forward, a head
tied to the embedding. The loss never holds logits of the whole batch.

Shapes: B windows, T tokens of a window, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from castwise.errors import SettingsError
from castwise.layers.chunked_loss import chunked_cross_entropy

INITIAL_STD = 0.02


class Head(nn.Module):
    """Logits, or their loss, by the weights of the embedding."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits `[B, T, V]`; with targets `[B, T]` the mean loss."""
        if targets is None:
            return linear(x, self.weight)
        return chunked_cross_entropy(x, self.weight, targets)


class FeedForward(nn.Module):
    """Gated: `down(silu(gate(x)) * up(x))` (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., D]`."""
        return cast("Tensor", self.down(silu(self.gate(x)) * self.up(x)))


class CausalAttention(nn.Module):
    """Attention to what came before, with rotary positions."""

    turns: Tensor

    def __init__(self, dim: int, num_heads: int, length: int) -> None:
        super().__init__()
        if dim % (2 * num_heads):
            raise SettingsError(
                f"attention needs a width that 2 * {num_heads} heads divide, got {dim}"
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        turns = rotary_turns(length, dim // num_heads // 2)
        self.register_buffer("turns", turns, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, T, D]`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        q, k = (rotate_pairs(each, self.turns) for each in (q, k))
        q, k, v = (each.transpose(-3, -2) for each in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
        return cast("Tensor", self.output(out.transpose(-3, -2).flatten(-2)))


def rotary_turns(length: int, num_pairs: int) -> Tensor:
    """Return angles `[T, pairs]` in fp64 (Su et al. 2021, arXiv 2104.09864)."""
    rates = 10_000.0 ** -(torch.arange(num_pairs, dtype=torch.float64) / num_pairs)
    return torch.arange(length, dtype=torch.float64)[:, None] * rates


def rotate_pairs(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the halves of each head, `[B, T, heads, 2 pairs]`, by their position."""
    turns = turns[: x.shape[-3], None].to(x.device)
    cosine, sine = turns.cos().to(x.dtype), turns.sin().to(x.dtype)
    left, right = x.chunk(2, -1)
    return torch.cat(
        (left * cosine - right * sine, left * sine + right * cosine), dim=-1
    )


class Block(nn.Module):
    """One pre-norm block."""

    def __init__(self, dim: int, mixing: nn.Module, hidden: int) -> None:
        super().__init__()
        self.mixing_norm = nn.RMSNorm(dim)
        self.mixing = mixing
        self.feed_forward_norm = nn.RMSNorm(dim)
        self.feed_forward = FeedForward(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, T, D]`."""
        x = x + self.mixing(self.mixing_norm(x))
        return cast("Tensor", x + self.feed_forward(self.feed_forward_norm(x)))


class CausalLm(nn.Module):
    """Embedding, blocks, norm and a head that shares the embedding's weights.

    Args:
        vocab_size: V.
        dim: D.
        num_blocks: How many blocks.
        hidden: Width of the feed-forward.
        mixing: Makes the mixing of a block.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        dim: int,
        num_blocks: int,
        hidden: int,
        mixing: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(
            Block(dim, mixing(), hidden) for _ in range(num_blocks)
        )
        self.norm = nn.RMSNorm(dim)
        self.head = Head(self.embedding)
        initialize(self, num_blocks)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits `[B, T, V]`, or the mean loss against targets `[B, T]`."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return cast("Tensor", self.head(self.norm(x), targets))


def initialize(model: nn.Module, num_blocks: int) -> None:
    """Draw embeddings and projections; what adds to the stream is drawn smaller."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=INITIAL_STD)
        elif isinstance(module, nn.Linear):
            is_last = name.rsplit(".", 1)[-1] in {"down", "output"}
            share = (2 * num_blocks) ** -0.5 if is_last else 1.0
            nn.init.normal_(module.weight, std=share * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def num_parameters(model: nn.Module) -> int:
    """Count the numbers that are learned, shared ones once."""
    return sum(weight.numel() for weight in model.parameters())


def same_size(target: int, build: Callable[[int], nn.Module], hidden: int) -> nn.Module:
    """Return a model with as many weights as another, by the width of its feed-forward.

    Random states are as if the model alone had been made.

    Args:
        target: Weights of the other.
        build: Makes the model of a width; its size grows evenly with it.
        hidden: Where to start from.

    Raises:
        SettingsError: It is larger even without a feed-forward.
    """
    with torch.random.fork_rng(devices=[]):
        here, wider = (num_parameters(build(hidden + more)) for more in (0, 1))
    width = hidden + round((target - here) / (wider - here))
    if width < 1:
        raise SettingsError(
            f"a model of {target} weights is asked for, and this one has {here} of "
            f"which a feed-forward of {hidden} can give up too few; ask for a wider one"
        )
    return build(width)


def example_loss(logits: Any, targets: Tensor) -> Tensor:
    """Return the mean loss of logits: what evidence is gathered with."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
