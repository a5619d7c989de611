"""Text out of a checkpoint: the model continues a prompt, token by token.

A checkpoint is a safetensors file with settings, tokenizer and weights. Reading it runs
no code of it. The whole window is computed anew for each token, which is what these
small models afford and needs no state of any layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from castwise.errors import SettingsError
from castwise.recipes.language.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSettings:
    """How to choose the next token."""

    num_tokens: int = 200
    """How many at most."""

    temperature: float = 0.8
    """Of the distribution; 0 takes the likeliest token."""

    top_k: int = 40
    """Only the so many likeliest tokens are drawn from; 0: from all."""

    seed: int = 0
    """Another seed, another text."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            SettingsError: Naming the first setting that cannot be honoured.
        """
        if self.num_tokens < 1 or self.top_k < 0:
            raise SettingsError(
                "sampling needs at least 1 token and a top-k of at least 0, got "
                f"{self.num_tokens} and {self.top_k}"
            )
        if not (self.temperature >= 0.0 and math.isfinite(self.temperature)):
            raise SettingsError(
                f"a temperature is 0 or more, got {self.temperature}; 0.8 is usual"
            )


@torch.no_grad()
def continue_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    length: int,
    settings: SamplingSettings,
) -> Iterator[int]:
    """Yield tokens after a prompt, until the end of a document.

    Args:
        model: From tokens `[1, T]` to logits; in eval mode, in any precision.
        tokenizer: The model's.
        prompt: What comes before; nothing: the beginning of a document.
        length: Tokens that the model sees at most.
        settings: How to choose.
    """
    device = next(model.parameters()).device
    seen = [tokenizer.end, *tokenizer.encode(prompt).tolist()]
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.num_tokens):
        window = torch.tensor([seen[-length:]], device=device)
        logits = model(window)[0, -1].float().cpu()
        token = _choose(logits, settings, generator)
        if token == tokenizer.end:
            return
        seen.append(token)
        yield token


def sample_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    length: int,
    settings: SamplingSettings,
) -> str:
    """Return the prompt and what the model makes of it; its mode stays as it was."""
    training = model.training
    model.eval()
    try:
        ids = list(
            continue_text(model, tokenizer, prompt, length=length, settings=settings)
        )
    finally:
        model.train(training)
    return prompt + tokenizer.decode(ids)


def _choose(
    logits: torch.Tensor, settings: SamplingSettings, generator: torch.Generator
) -> int:
    if settings.temperature == 0.0:
        return int(logits.argmax())
    scaled = logits / settings.temperature
    if 0 < settings.top_k < len(scaled):
        least = scaled.topk(settings.top_k).values[-1]
        scaled = scaled.where(scaled >= least, -math.inf)
    chances = torch.softmax(scaled, 0)
    return int(torch.multinomial(chances, 1, generator=generator))
