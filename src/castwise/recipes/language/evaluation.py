"""How well a language model predicts text that it did not learn from.

Nats per token depend on the tokenizer; bits per byte do not, so models with different
tokenizers can be compared by them:

    bits per byte = nats per token / ln 2 / (bytes per token)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from castwise.recipes.language.settings import TextSettings, TrainingSettings
from castwise.recipes.language.supply import TokenSupply
from castwise.recipes.language.token_file import Packing, TokenBatch

LOSS = "validation_loss"
BITS = "validation_bits_per_byte"


class Batches:
    """Training batches by step, and those that a model is measured on.

    Args:
        supply: Tokens.
        text: Length and size of batches.
        training: Seed, and whether to overfit on a few batches.
    """

    def __init__(
        self, supply: TokenSupply, text: TextSettings, training: TrainingSettings
    ) -> None:
        shape = {"length": text.sequence_length, "batch_size": text.batch_size}
        self._train = Packing(supply.train, **shape, seed=training.seed)
        self._overfit = training.overfit_batches
        self.bytes_per_token = supply.bytes_per_token
        if self._overfit:
            self.validation = [self.train(step) for step in range(self._overfit)]
        else:
            self.validation = Packing(supply.validation, **shape).in_order(
                training.num_validation
            )

    def train(self, step: int) -> TokenBatch:
        """Return the batch of an update: a pure function of the step."""
        return self._train.batch(step % self._overfit if self._overfit else step)

    def measures(self, losses: Sequence[float], sizes: Sequence[int]) -> dict[str, Any]:
        """Return the mean loss per token and the bits per byte that it stands for."""
        nats = math.fsum(
            loss * size for loss, size in zip(losses, sizes, strict=True)
        ) / sum(sizes)
        return {LOSS: nats, BITS: nats / math.log(2) / self.bytes_per_token}


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, device: torch.device
) -> Mapping[str, float]:
    """Measure a model, in the precision that the caller has put into force."""
    losses, sizes = [], []
    for batch in batches.validation:
        there = batch.to(device)
        losses.append(float(model(there.tokens, there.targets)))
        sizes.append(there.targets.numel())
    return batches.measures(losses, sizes)
