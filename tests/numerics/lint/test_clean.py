"""Models that have nothing wrong with them: a lint that cries wolf is switched off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from castwise.layers.cayley import CayleyPropagator
from castwise.layers.resolvent_mixing import ResolventMixing
from castwise.numerics.lint import lint
from castwise.policy import preset
from castwise.recipes.kenken.alphabets import Mode
from castwise.recipes.kenken.batches import batch_of
from castwise.recipes.kenken.dataset import generate_puzzle_set
from castwise.recipes.kenken.model import KenKenModel, completion_loss, model_settings
from castwise.recipes.kenken.puzzle_set import Kind

Parts = tuple[nn.Module, tuple[Any, ...], Callable[[Any, Any], torch.Tensor]]


def conv(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    """A convolution with its norm and nonlinearity."""
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outside),
        nn.SiLU(),
    )


class Squeeze(nn.Module):
    """Squeeze and excitation, as in the networks of timm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = conv(width, width)
        self.gate = nn.Sequential(nn.Conv2d(width, 4, 1), nn.SiLU())
        self.open = nn.Conv2d(4, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Weigh the channels of a residual."""
        h = self.body(x)
        return x + h * self.open(self.gate(h.mean((2, 3), keepdim=True))).sigmoid()


def timm_like() -> Parts:
    """A convolutional network with squeeze and excitation."""
    model = nn.Sequential(
        conv(3, 12, 2),
        Squeeze(12),
        conv(12, 20, 2),
        Squeeze(20),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(20, 7),
    )
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    return model, (torch.randn(4, 3, 31, 31), torch.randint(7, (4,))), smooth


class Residual(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(width, width), conv(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add."""
        return torch.relu(x + self.body(x))


def resnet_like() -> Parts:
    """Residual convolutions."""
    model = nn.Sequential(
        conv(3, 9),
        nn.MaxPool2d(2),
        Residual(9),
        Residual(9),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(9, 5),
    )
    x, y = torch.randn(4, 3, 17, 17), torch.randint(5, (4,))
    return model, (x, y), functional.cross_entropy


class UNet(nn.Module):
    """Down, up, and across."""

    def __init__(self) -> None:
        super().__init__()
        self.down = conv(1, 8, 2)
        self.deep = conv(8, 16, 2)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.last = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give every pixel its logit."""
        a = self.down(x)
        b = self.up(self.deep(a))
        both = functional.interpolate(torch.cat([a, b], 1), scale_factor=2.0)
        return self.last(both)


def u_net() -> Parts:
    """Segmentation with logits."""
    data = torch.randn(2, 1, 32, 32), torch.randint(2, (2, 1, 32, 32)).float()
    return UNet(), data, functional.binary_cross_entropy_with_logits


class Mixer(nn.Module):
    """Mixes tokens, then channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.tokens = nn.Sequential(
            nn.Linear(tokens, 24), nn.GELU(), nn.Linear(24, tokens)
        )
        self.channels = nn.Sequential(
            nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix both ways."""
        x = x + self.tokens(self.norms[0](x).mT).mT
        return x + self.channels(self.norms[1](x))


def mlp_mixer() -> Parts:
    """Regression with a squared error."""
    model = nn.Sequential(Mixer(11, 10), Mixer(11, 10), nn.Linear(10, 2))
    return model, (torch.randn(3, 11, 10), torch.randn(3, 11, 2)), functional.mse_loss


class Tagger(nn.Module):
    """An LSTM over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.lstm = nn.LSTM(12, 14, num_layers=2, batch_first=True)
        self.out = nn.Linear(14, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tag every token."""
        return self.out(self.lstm(self.embed(tokens))[0]).mT


def lstm() -> Parts:
    """Sequences longer than 256."""
    x, y = torch.randint(30, (2, 300)), torch.randint(5, (2, 300))
    return Tagger(), (x, y), functional.cross_entropy


class Logits(nn.Module):
    """What a model of transformers puts out, without the names around it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take the logits, classes second."""
        logits: torch.Tensor = self.model(x).logits
        return logits.mT if logits.dim() == 3 else logits


def tokens(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of tokens and what follows them."""
    x = torch.randint(60, (2, length + 1))
    return x[:, :-1], x[:, 1:]


def gpt2() -> Parts:
    """Learned positions."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=60, n_positions=512, n_embd=16, n_layer=2, n_head=2
    )
    model = Logits(transformers.GPT2LMHeadModel(config))
    return model, tokens(300), functional.cross_entropy


def llama() -> Parts:
    """Rotary positions beyond 256."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
    )
    model = Logits(transformers.LlamaForCausalLM(config))
    return model, tokens(300), functional.cross_entropy


def vit() -> Parts:
    """Patches of images."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=32,
        patch_size=8,
        num_labels=4,
    )
    model = Logits(transformers.ViTForImageClassification(config))
    data = torch.randn(2, 3, 32, 32), torch.randint(4, (2,))
    return model, data, functional.cross_entropy


def kenken() -> Parts:
    """The model of the KenKen recipe on puzzles of three sizes of numbers."""
    rng = np.random.default_rng(0)
    sets = [
        generate_puzzle_set(4, mode, 8, 2, "train", kind=Kind.KENKEN, workers=1)
        for mode in Mode
    ]
    parts = [(puzzles, np.arange(4)) for puzzles in sets]
    shown = batch_of(parts, rng.random((12, 16)) < 0.3)
    model = KenKenModel(model_settings("tiny"))
    return (
        model,
        (shown.tokens, shown.alphabet, shown.relations, shown),
        completion_loss,
    )


class RealParts(nn.Module):
    """Real and imaginary parts side by side."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Double the width."""
        return torch.view_as_real(x).flatten(-2)


def castwise_layers() -> Parts:
    """The layers of this package, which guard themselves."""
    model = nn.Sequential(
        nn.Linear(6, 12),
        ResolventMixing(12),
        CayleyPropagator(12),
        RealParts(),
        nn.Linear(24, 3),
    )
    return model, (torch.randn(2, 9, 6), torch.randn(2, 9, 3)), functional.mse_loss


MODELS = [
    timm_like,
    resnet_like,
    u_net,
    mlp_mixer,
    lstm,
    gpt2,
    llama,
    vit,
    kenken,
    castwise_layers,
]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["bf16-mixed", "16-mixed", "32-true"])
@pytest.mark.parametrize("build", MODELS, ids=lambda each: each.__name__)
def test_a_clean_model_has_no_finding(build: Callable[[], Parts], policy: str) -> None:
    """Static or observed, with its usual optimizer."""
    torch.manual_seed(0)
    model, data, loss_fn = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    seen = lint(model, preset(policy), optimizer, [data], loss_fn)
    assert not seen.findings
    assert not seen.unchecked
    assert not lint(model, preset(policy), optimizer).findings
