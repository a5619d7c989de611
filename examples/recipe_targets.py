"""The recipes as targets of the commands that gather evidence.

    castwise validate examples/recipe_targets.py:kenken --preset bf16-mixed
    castwise watch    examples/recipe_targets.py:resolvent_lm --steps 20
    castwise diagnose examples/recipe_targets.py:soliton_lm --preset 16-mixed

Each function returns a small model with random weights, two batches, the loss and an
optimizer. The KenKen model begins with a head of zeros, which hides every error behind
it; here the head is random.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from castwise.recipes.kenken.alphabets import Mode
from castwise.recipes.kenken.batches import PuzzleBatch, batch_of
from castwise.recipes.kenken.dataset import generate_puzzle_set
from castwise.recipes.kenken.model import KenKenModel, completion_loss, model_settings
from castwise.recipes.resolvent_lm.model import build_model as build_resolvent_lm
from castwise.recipes.resolvent_lm.settings import ResolventSettings
from castwise.recipes.soliton_lm.model import build_model as build_soliton_lm
from castwise.recipes.soliton_lm.settings import SolitonSettings

Target = tuple[
    nn.Module, list[tuple[Any, ...]], Callable[..., Any], torch.optim.Optimizer
]
VOCABULARY, LENGTH = 256, 63


def kenken() -> Target:
    """The solver of `castwise train kenken --preset small`, on 5 x 5 puzzles."""
    torch.manual_seed(0)
    model = KenKenModel(model_settings("small"))
    nn.init.normal_(model.head.weight, std=model.head.in_features**-0.5)
    puzzles = generate_puzzle_set(5, Mode.STANDARD, 32, 0, "train", workers=1)
    shown = np.random.default_rng(0).random((32, 25)) < 0.2
    batches = []
    for first in (0, 16):
        rows = np.arange(first, first + 16)
        batch = batch_of([(puzzles, rows)], shown[rows])
        batches.append((batch.tokens, batch.alphabet, batch.relations, batch))

    def loss(logits: torch.Tensor, batch: PuzzleBatch) -> torch.Tensor:
        return completion_loss(logits, batch)

    return model, batches, loss, torch.optim.AdamW(model.parameters(), lr=3e-3)


def resolvent_lm() -> Target:
    """The language model that mixes tokens by resolvents, of two blocks."""
    torch.manual_seed(0)
    settings = ResolventSettings(dim=64, num_blocks=2, num_chains=16, hidden=128)
    return _language(build_resolvent_lm(settings, VOCABULARY, LENGTH))


def soliton_lm() -> Target:
    """The language model of complex waves, of two blocks."""
    torch.manual_seed(0)
    settings = SolitonSettings(dim=32, num_blocks=2, hidden=64)
    return _language(build_soliton_lm(settings, VOCABULARY, LENGTH))


def _language(model: nn.Module) -> Target:
    """Two batches of four windows of random tokens."""
    windows = [torch.randint(VOCABULARY, (4, LENGTH + 1)) for _ in range(2)]
    batches = [(each[:, :-1], each[:, 1:]) for each in windows]

    def loss(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())

    return model, batches, loss, torch.optim.AdamW(model.parameters(), lr=1e-3)
