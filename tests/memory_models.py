"""Small models whose memory and gradients tests look at: a GPT, a conv net."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Pre-norm attention and an MLP, with dropout."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.leave = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend, then think."""
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, 2, width // 2).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        heard = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        heard = heard.transpose(1, 2).reshape(batch, length, width)
        x = x + functional.dropout(self.leave(heard), self.dropout, self.training)
        hidden = functional.gelu(self.up(self.norm2(x)))
        y: torch.Tensor = x + functional.dropout(
            self.down(hidden), self.dropout, self.training
        )
        return y


class Gpt(nn.Module):
    """A decoder over 61 tokens."""

    def __init__(self, width: int = 32, depth: int = 3, dropout: float = 0.1) -> None:
        super().__init__()
        self.tokens = nn.Embedding(61, width)
        self.places = nn.Embedding(128, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 61, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rate the next token everywhere."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.places(place)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


class ConvBlock(nn.Module):
    """Convolution, batch norm, relu, and the input beside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add what was found."""
        y: torch.Tensor = x + functional.relu(self.norm(self.conv(x)))
        return y


class ConvNet(nn.Module):
    """Three such blocks and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(ConvBlock(8) for _ in range(3)))
        self.leave = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rate five classes."""
        y: torch.Tensor = self.leave(self.blocks(self.enter(x)).mean(dim=(2, 3)))
        return y


def token_loss(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over all places."""
    return functional.cross_entropy(logits.flatten(0, -2).float(), wanted.flatten())


def gpt_batch(batch: int = 3, length: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and the next ones."""
    text = torch.randint(61, (batch, length + 1), generator=_seeded())
    return text[:, :-1], text[:, 1:]


def image_batch(batch: int = 5, side: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and classes."""
    images = torch.randn(batch, 3, side, side, generator=_seeded())
    return images, torch.randint(5, (batch,), generator=_seeded())


def gradients_of(
    model: nn.Module,
    batch: tuple[torch.Tensor, torch.Tensor],
    around: Callable[[Callable[[], torch.Tensor]], torch.Tensor] = lambda call: call(),
    seed: int = 7,
) -> dict[str, torch.Tensor]:
    """Gradients of one batch, with random numbers from a seed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = around(lambda: token_loss(model(batch[0]), batch[1]))
    loss.backward()
    found = {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return found


def relative_error(
    found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]
) -> float:
    """Euclidean norm of the difference over that of what was wanted."""
    ours = torch.cat([found[name].double().flatten() for name in wanted])
    theirs = torch.cat([each.double().flatten() for each in wanted.values()])
    return float((ours - theirs).norm() / theirs.norm())


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of gradients are equal bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(11)
