"""Models for `benchmarks/search.py`: transformers with planted sensitive modules.

Each planted module computes something that 16 bits ruin: a linear layer of large mean
before its LayerNorm, a tridiagonal solve near to singular, a cumulative sum, a rotation
by large phases, a scan that remembers for long; and, apart, a router that nearly ties.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

TOKENS = 17


class LargeMean(nn.Module):
    """A layer whose outputs are 200 and a little, and the norm that takes 200 off."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lift = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        nn.init.constant_(self.lift.bias, 200.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Lift and normalise."""
        return self.norm(self.lift(x))


class Tridiagonal(nn.Module):
    """Solves (2.002 - shift) y = u along the sequence, by elimination."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Eliminate forwards, substitute backwards; scaled to the size of x."""
        rows = self.into(x).unbind(1)
        diagonal = torch.full_like(rows[0], 2.002)
        pivots, values = [diagonal], [rows[0]]
        for row in rows[1:]:
            factor = 1 / pivots[-1]
            pivots.append(diagonal - factor)
            values.append(row + factor * values[-1])
        found = [values[-1] / pivots[-1]]
        for pivot, value in zip(pivots[-2::-1], values[-2::-1], strict=True):
            found.append((value + found[-1]) / pivot)
        return torch.stack(found[::-1], 1) / 200


class CumulativeSum(nn.Module):
    """A running sum with a mean, of which only the differences go on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into = nn.Linear(width, width)
        nn.init.constant_(self.into.bias, 4.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Sum up and take differences over 8 places."""
        total = self.into(x).cumsum(1)
        return functional.pad(total[:, 8:] - total[:, :-8], (0, 0, 8, 0)) / 8 - 4


class LargePhase(nn.Module):
    """Rotates pairs of channels by phases of hundreds of radians."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.phase = nn.Linear(width, width // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate."""
        phase = 100 * self.phase(x)
        a, b = x.chunk(2, -1)
        cos, sin = phase.cos(), phase.sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class LongScan(nn.Module):
    """A state that keeps 0.99 of itself at each place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scan."""
        rows, state = [], torch.zeros_like(x[:, 0])
        for row in (self.into(x) + 1).unbind(1):
            state = state * 0.99 + row
            rows.append(state)
        states = torch.stack(rows, 1)
        return (states - states.mean(-1, keepdim=True)) / 4


class NearTie(nn.Module):
    """A router whose two experts nearly tie for every token."""

    def __init__(self, width: int, gap: float = 3e-4) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        with torch.no_grad():
            other = self.gate.weight[0] + gap * torch.randn(width)
            self.gate.weight[1] = other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take the better expert."""
        share, index = self.gate(x).softmax(-1).topk(1, dim=-1)
        both = torch.stack([expert(x) for expert in self.experts], -1)
        chosen = index.unsqueeze(-2).expand(*x.shape, 1)
        return share * both.gather(-1, chosen).squeeze(-1)


PLANTS = (LargeMean, Tridiagonal, CumulativeSum, LargePhase, LongScan)


class Attention(nn.Module):
    """Four heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend."""
        heads = [
            layer(x).unflatten(-1, (4, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        mixed = functional.scaled_dot_product_attention(*heads)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """A block of a transformer, with a planted module where there is one."""

    def __init__(self, width: int, plant: nn.Module | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.act = nn.GELU()
        self.down = nn.Linear(2 * width, width)
        self.planted = plant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend, compute, and the planted module."""
        x = x + self.attention(self.norm1(x))
        x = x + self.down(self.act(self.up(self.norm2(x))))
        return x if self.planted is None else x + 0.3 * self.planted(x)


class Transformer(nn.Module):
    """Blocks between an embedding and a head.

    Args:
        width: Of the residual stream.
        depth: How many blocks.
        plants: Block -> what is planted in it.
        stream: What the stream is held in when all runs in bf16. An embedding in fp32
            keeps it in fp32; a layer behind it hands out bf16.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        plants: dict[int, nn.Module],
        stream: str = "fp32",
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, width)
        self.blocks = nn.ModuleList(
            Block(width, plants.get(layer)) for layer in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, TOKENS)
        self.into = nn.Linear(width, width) if stream == "bf16" else nn.Identity()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Predict."""
        x = self.into(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every place."""
    return functional.cross_entropy(output.flatten(0, 1), target.flatten())


def large(seed: int, stream: str = "fp32") -> Transformer:
    """10 layers, d=64, the five plants in places that the seed decides."""
    torch.manual_seed(seed)
    places = torch.randperm(10)[: len(PLANTS)].tolist()
    plants = {at: plant(64) for at, plant in zip(places, PLANTS, strict=True)}
    return Transformer(64, 10, plants, stream)


def trained(model: nn.Module, num_steps: int) -> nn.Module:
    """Train a model for a while on sequences that count."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(num_steps):
        start = torch.randint(TOKENS, (4, 1))
        tokens = (start + torch.arange(64)) % TOKENS
        optimizer.zero_grad()
        loss_fn(model(tokens), (tokens + 1) % TOKENS).backward()
        optimizer.step()
    return model


class Small(nn.Module):
    """About ten units, one or two of them planted; see `Transformer` for the stream."""

    def __init__(self, seed: int, stream: str = "fp32") -> None:
        super().__init__()
        self.stream = stream
        torch.manual_seed(seed)
        self.embed = nn.Embedding(TOKENS, 16)
        self.first = nn.Linear(16, 16)
        self.planted = PLANTS[seed % len(PLANTS)](16)
        self.mixer = nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 16))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, TOKENS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Predict."""
        x = self.embed(tokens)
        x = self.first(x) if self.stream == "bf16" else x + self.first(x)
        x = x + 0.3 * self.planted(x)
        return self.head(self.norm(x + self.mixer(x)))


def batches(
    seed: int, count: int, size: int = 2, length: int = 64
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random batches."""
    generator = torch.Generator().manual_seed(seed + 999)
    return [
        (
            torch.randint(TOKENS, (size, length), generator=generator),
            torch.randint(TOKENS, (size, length), generator=generator),
        )
        for _ in range(count)
    ]
