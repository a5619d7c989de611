"""Small models, each with one thing that a planner can get wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- its name everywhere
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 24


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model and what to feed it."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (6, WIDTH)
    tokens: int = 0
    """Draw whole numbers below this instead of normal ones."""

    has_rival: bool = True
    """Whether autocast can run it: in a backward by hand it mixes its formats."""

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        """The same input in any format."""
        generator = torch.Generator().manual_seed(seed)
        if self.tokens:
            return torch.randint(self.tokens, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64).to(
            dtype
        )


class Running(nn.Module):
    """Batch norm, and a buffer that averages what it sees, written in place."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """From inputs to outputs."""
        h = self.norm(self.into(x))
        early = F.linear(self.average.clone() + h, self.out.weight)
        self.average.mul_(0.5).add_(h.detach().mean(0), alpha=0.5)
        return self.out(h + self.average) + early + self.norm.running_mean.mean()


class Written(nn.Module):
    """Views, slices assigned to, and sums in place, read before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """From inputs to outputs."""
        h, weight = self.a(x).clone(), self.b.weight.detach()
        before = F.linear(h, weight)
        view = h[:, : WIDTH // 2]
        h += x
        middle = F.linear(h, weight)
        view.mul_(2.0)
        k = F.linear(h, weight).clone()
        k[:2] = 1.0
        h.transpose(0, 1)[3] = 0.25
        return self.b(h) + before * middle + self.b(k)


class InPlaceNet(nn.Module):
    """Convolutions with batch norm and activations in place, and a squeeze."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
        )
        self.squeeze = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """From inputs to outputs."""
        h = self.body(x)
        gate = torch.sigmoid(self.squeeze(h.mean((2, 3))))
        h = F.relu(h * gate[:, :, None, None], inplace=True)
        return self.head(F.adaptive_avg_pool2d(h, 1).flatten(1))


class Cube(torch.autograd.Function):
    """A function with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The third power."""
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Three times the square."""
        (x,) = ctx.saved_tensors
        return 3 * x * x * gradients[0]


class Product(torch.autograd.Function):
    """A linear layer by hand: products in both directions, and a write."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The product with twice the input, and a sum."""
        ctx.save_for_backward(x, weight)
        twice = x.clone()
        twice.mul_(2)
        return twice @ weight.t(), x.square().sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of both."""
        x, weight = ctx.saved_tensors
        to_product, to_sum = gradients
        return 2 * (to_product @ weight + x * to_sum), 2 * to_product.t() @ x


class OwnProduct(nn.Module):
    """A custom autograd function that multiplies, in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.inner = nn.Linear(WIDTH, WIDTH), ByHand()

    def forward(self, x: Tensor) -> Tensor:
        """From inputs to outputs."""
        return self.inner(self.a(x))


class ByHand(nn.Module):
    """A layer whose function and derivative are written out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """A product and a sum."""
        y, total = Product.apply(x, self.weight)
        return y + total / x.numel()


class OwnFunction(nn.Module):
    """A custom autograd function between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """From inputs to outputs."""
        return self.b(Cube.apply(self.a(x)))


class Recomputed(nn.Module):
    """A block under activation checkpointing, and again without."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """From inputs to outputs."""
        h = x + checkpoint(self.block, x, use_reentrant=False)
        return self.block(h) * h


class Branching(nn.Module):
    """A conditional that stays in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """From inputs to outputs."""
        h = self.a(x)
        return torch.cond(
            x.sum() > 0,
            lambda h, weight: F.linear(h.sin(), weight).tanh(),
            lambda h, weight: F.linear(h.cos(), weight),
            (h, self.b.weight),
        ) + self.b(h)


class OwnRegions(nn.Module):
    """Autocast regions of the model's own: one on, one off."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """From inputs to outputs."""
        with torch.autocast("cpu", torch.bfloat16):
            h = self.a(x)
        h = h.to(x.dtype).tanh()
        with torch.autocast("cpu", enabled=False):
            return self.b(h) * h.exp()


class Broken(nn.Module):
    """Graph breaks, with aliases and an assignment across them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """From inputs to outputs."""
        h = self.a(x)
        view = h[:, ::2]
        torch._dynamo.graph_break()
        h = h.clone() if h.requires_grad else h
        twin = h.view(-1)
        torch._dynamo.graph_break()
        h.add_(1.0)
        return self.b(h) + twin.view_as(h) + view.sum()


class Tied(nn.Module):
    """An embedding whose weight is the head's, and a loss inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 31, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """From inputs to outputs."""
        logits = self.head(self.norm(self.embed(tokens)))
        return F.cross_entropy(logits.flatten(0, -2), tokens.flatten())


class Attention(nn.Module):
    """Fused attention with a float mask of the most negative numbers; or by hand."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.mask = mask
        self.into, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.randn(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """From inputs to outputs."""
        q, k, v = self.into(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        length = x.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        if self.mask == "by hand":
            scores = (q @ k.mT) * q.shape[-1] ** -0.5 + self.bias
            scores = scores.masked_fill(~causal, torch.finfo(scores.dtype).min)
            y = scores.softmax(-1) @ v
        else:
            mask: Any = causal
            if self.mask == "float":
                low = torch.finfo(x.dtype).min
                mask = torch.zeros_like(causal, dtype=x.dtype).masked_fill(~causal, low)
                mask = mask + self.bias
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class Constants(nn.Module):
    """Tensors made in the forward, by value and after the shape of others."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """From inputs to outputs."""
        h = self.a(x)
        scale = torch.tensor([1.5, -0.5] * (WIDTH // 2), dtype=x.dtype)
        h = h * scale + torch.ones_like(h) * 0.1 + h.new_full((WIDTH,), 0.2)
        h = h + torch.arange(WIDTH) / 7
        return (
            torch.where(h > 0, h, torch.zeros((), dtype=x.dtype))
            + torch.arange(WIDTH, dtype=x.dtype).cos()
        )


class Indexed(nn.Module):
    """index_add, scatter, gather, and assignment by index."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """From inputs to outputs."""
        h = self.a(x)
        at = torch.tensor([0, 2, 2, 1, 5, 3])
        total = torch.zeros(6, WIDTH, dtype=x.dtype).index_add(0, at, h)
        spread = torch.zeros_like(h).scatter_add(0, at[:, None].expand_as(h), h * 2)
        total = total + spread.gather(0, at[:, None].expand_as(h))
        out = torch.zeros_like(total)
        out[at] = self.b(total)
        return out + total[at]


class Spectral(nn.Module):
    """A Fourier transform between two layers, and complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """From inputs to outputs."""
        h = torch.fft.rfft(self.a(x))
        h = torch.fft.irfft(h * (1 + 0.5j), n=WIDTH)
        return self.b(h) + torch.linalg.vector_norm(h, dim=-1, keepdim=True)


class Recurrent(nn.Module):
    """A recurrent layer beside a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """From inputs to outputs."""
        h, (last, _) = self.rnn(x)
        return self.out(h) + last[0][:, None]


class Llama(nn.Module):
    """RMS norms by hand, rotary positions, gated layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in "qkv"])
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, 40), nn.Linear(WIDTH, 40)
        self.down = nn.Linear(40, WIDTH)
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def norm(self, x: Tensor) -> Tensor:
        """By hand, as most models have it."""
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """From inputs to outputs."""
        h = self.norm(x)
        q, k, v = (part(h).unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv)
        width = q.shape[-1]
        inverse = torch.pow(
            torch.full((), 1e4, dtype=x.dtype),
            -torch.arange(0, width, 2, dtype=x.dtype) / width,
        )
        angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * inverse
        angles = torch.cat((angles, angles), -1)

        def turned(t: Tensor) -> Tensor:
            a, b = t.chunk(2, -1)
            return t * angles.cos() + torch.cat((-b, a), -1) * angles.sin()

        y = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Switching(nn.Module):
    """A value that is read with gradients on and off."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """From inputs to outputs."""
        with torch.no_grad():
            target = self.b(self.a(x))
        h = self.a(x)
        with torch.no_grad():
            score = self.b(h).softmax(-1)
            h = h.detach() if h.numel() < 0 else h
        return (self.b(h) - target) * score + self.b(h) * h


class Normed(nn.Module):
    """Group, layer and instance norms, pooling, padding, interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.group, self.instance = nn.GroupNorm(2, 8), nn.InstanceNorm2d(8)
        self.slope = nn.PReLU(8)

    def forward(self, x: Tensor) -> Tensor:
        """From inputs to outputs."""
        h = self.slope(self.group(self.conv(F.pad(x, (1, 1, 1, 1)))))
        h = F.max_pool2d(self.instance(self.up(h)), 2)
        h = F.interpolate(h, scale_factor=2.0, mode="bilinear", align_corners=False)
        return F.avg_pool2d(F.leaky_relu(h, 0.1), 2)


CASES = (
    Case(name="buffers", build=Running),
    Case(name="written", build=Written),
    Case(name="conv", build=InPlaceNet, shape=(4, 3, 9, 9)),
    Case(name="own function", build=OwnFunction),
    Case(name="own product", build=OwnProduct, has_rival=False),
    Case(name="recomputed", build=Recomputed),
    Case(name="branching", build=Branching),
    Case(name="own regions", build=OwnRegions),
    Case(name="broken", build=Broken),
    Case(name="tied", build=Tied, shape=(3, 7), tokens=31),
    Case(name="boolean mask", build=lambda: Attention("boolean"), shape=(2, 7, WIDTH)),
    Case(name="float mask", build=lambda: Attention("float"), shape=(2, 7, WIDTH)),
    Case(name="by hand", build=lambda: Attention("by hand"), shape=(2, 7, WIDTH)),
    Case(name="constants", build=Constants),
    Case(name="indexed", build=Indexed),
    Case(name="spectral", build=Spectral),
    Case(name="recurrent", build=Recurrent, shape=(2, 7, WIDTH)),
    Case(name="llama", build=Llama, shape=(2, 7, WIDTH)),
    Case(name="switching", build=Switching),
    Case(name="normed", build=Normed, shape=(2, 3, 9, 9)),
    Case(
        name="encoder",
        build=lambda: nn.TransformerEncoderLayer(
            WIDTH, 2, 32, dropout=0.0, batch_first=True, norm_first=True
        ),
        shape=(2, 7, WIDTH),
    ),
    Case(
        name="residual conv",
        build=lambda: nn.Sequential(
            nn.Conv1d(WIDTH, 16, 3), nn.BatchNorm1d(16), nn.GELU(), nn.Flatten()
        ),
        shape=(3, WIDTH, 7),
    ),
)
"""Every case."""


def step(model: nn.Module, run: Callable[[Any], Tensor], x: Any) -> tuple[Any, Any]:
    """Outputs, and all gradients as one vector."""
    model.zero_grad()
    out = run(x)
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64)
    (out * weights.to(out.dtype).view(out.shape)).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return out.detach(), torch.cat([g.flatten().double() for g in grads])
