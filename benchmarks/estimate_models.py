"""The seven models whose steps are estimated: full size, or tiny for a look.

kenken   the recipe's model on the largest batch that it draws
resolvent, soliton
         the recipes' language models, as they train: 8 x 128 tokens
gpt2     of transformers: six layers of width 384, 8 x 256 tokens, 8,192 words
llama    of transformers: the same, grouped queries, gated layers
vit      of transformers: the same width, 196 patches
conv     residual blocks with batch norm
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

CASES = ("kenken", "resolvent", "soliton", "gpt2", "llama", "vit", "conv")


class Residual(nn.Module):
    """Two convolutions beside an identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block."""
        return functional.relu(x + self.body(x))


class ConvNet(nn.Module):
    """A small residual network."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, stride=2)
        self.stages = nn.ModuleList(Residual(width) for _ in range(depth))
        self.head = nn.Linear(width, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


def lm_loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of a language model of transformers."""
    return functional.cross_entropy(output.logits.flatten(0, 1), target.flatten())


def image_loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of an image classifier."""
    logits = getattr(output, "logits", output)
    return functional.cross_entropy(logits, target)


def build(case: str, *, tiny: bool) -> tuple[nn.Module, tuple[Any, ...], Any]:
    """Return a model in training mode, a batch, and a loss."""
    torch.manual_seed(0)
    if case == "kenken":
        return _kenken(tiny=tiny)
    if case in {"resolvent", "soliton"}:
        return _language(case, tiny=tiny)
    if case == "conv":
        model: nn.Module = ConvNet(16 if tiny else 64, 2 if tiny else 6)
        side, rows = (16, 3) if tiny else (96, 24)
        images = torch.randn(rows, 3, side, side)
        return model, (images, torch.randint(100, (rows,))), image_loss
    model, batch = _transformer(case, tiny=tiny)
    return model.train(), batch, image_loss if case == "vit" else lm_loss


def _kenken(*, tiny: bool) -> tuple[nn.Module, tuple[Any, ...], Any]:
    from castwise.recipes.kenken.dry_run import largest_batches  # noqa: PLC0415 -- numba
    from castwise.recipes.kenken.model import (  # noqa: PLC0415 -- as above
        KenKenModel,
        completion_loss,
        model_settings,
    )
    from castwise.recipes.kenken.settings import settings_of  # noqa: PLC0415 -- as above

    settings = settings_of("tiny" if tiny else "small", {})
    drawn = largest_batches(settings)
    batch = drawn[max(drawn)]
    model = KenKenModel(model_settings(settings.model))
    given = (batch.tokens, batch.alphabet, batch.relations, batch)
    return model, given, completion_loss


def _language(case: str, *, tiny: bool) -> tuple[nn.Module, tuple[Any, ...], Any]:
    """A recipe's model, which returns its loss."""
    from castwise.recipes.resolvent_lm.model import (  # noqa: PLC0415 -- numba
        build_model as resolvent,
    )
    from castwise.recipes.resolvent_lm.settings import (  # noqa: PLC0415 -- as above
        ResolventSettings,
    )
    from castwise.recipes.soliton_lm.model import (  # noqa: PLC0415 -- as above
        build_model as soliton,
    )
    from castwise.recipes.soliton_lm.settings import (  # noqa: PLC0415 -- as above
        SolitonSettings,
    )

    rows, length = (2, 32) if tiny else (8, 128)
    tokens = torch.randint(101, (rows, length + 1))
    batch = (tokens[:, :-1], tokens[:, 1:], None)
    model: nn.Module = (
        resolvent(ResolventSettings(), 101, length)
        if case == "resolvent"
        else soliton(SolitonSettings(), 101, length)
    )
    return model.train(), batch, lambda loss, _: loss


def _transformer(case: str, *, tiny: bool) -> tuple[nn.Module, tuple[Any, ...]]:
    import transformers  # noqa: PLC0415 -- only three cases need it

    transformers.logging.set_verbosity_error()
    width, depth, length, rows = (48, 2, 33, 2) if tiny else (384, 6, 256, 8)
    words = 101 if tiny else 8192
    tokens = torch.randint(words, (rows, length))
    common = {"use_cache": False, "bos_token_id": None, "eos_token_id": None}
    if case == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=words,
            n_positions=length,
            n_embd=width,
            n_layer=depth,
            n_head=6,
            **common,
        )
        return transformers.GPT2LMHeadModel(config), (tokens, tokens)
    if case == "llama":
        config = transformers.LlamaConfig(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=depth,
            num_attention_heads=6,
            num_key_value_heads=2,
            **common,
        )
        return transformers.LlamaForCausalLM(config), (tokens, tokens)
    side = 32 if tiny else 112
    config = transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=6,
        intermediate_size=4 * width,
        image_size=side,
        patch_size=8,
        num_labels=100,
    )
    images = torch.randn(rows, 3, side, side)
    return transformers.ViTForImageClassification(config), (
        images,
        torch.randint(100, (rows,)),
    )
