"""A language model's work for the trainer: batches, the loss, and what is measured.

The sensitive layers are measured on the training batch of every line of the journal,
inside the precision of training, and on the validation text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import nn

from castwise.recipes.language.evaluation import Batches, evaluate
from castwise.recipes.language.health import Probe, worst
from castwise.recipes.language.token_file import TokenBatch
from castwise.training.step import Run
from castwise.training.strategy import Strategy
from castwise.training.trainer import BatchLoss, Task
from castwise.training.unison import largest

SCORE = "negative_validation_loss"
"""What ranks checkpoints: larger is better."""


@final
class LanguageTask(Task):
    """Windows of text in, loss and health out.

    Args:
        run: The prepared model.
        model: The same model.
        batches: Training and validation batches.
        probe: Watches the sensitive layers.
        log_every: Steps between two lines of the journal.
        device: Where batches go.
        strategy: How the run is spread over processes. Default: one process.
    """

    unit = "tokens"

    def __init__(
        self,
        *,
        run: Run,
        model: nn.Module,
        batches: Batches,
        probe: Probe,
        log_every: int,
        device: torch.device,
        strategy: Strategy | None = None,
    ) -> None:
        self._run, self._model, self._batches = run, model, batches
        self._strategy = strategy or Strategy()
        self._forward = self._strategy.forward_of(model, run)
        self._probe, self._log_every, self._device = probe, log_every, device
        probe.paused = True

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return self._device

    def batch(self, step: int) -> TokenBatch:
        """Return this process's windows of the batch of a step."""
        self._probe.paused = (step + 1) % self._log_every != 0
        whole = self._batches.train(step)
        return whole.part(self._strategy.ranks).to(self._device)

    def loss_alone(self, batch: TokenBatch) -> BatchLoss:
        """Return the mean loss per token, without a word to other processes."""
        value = self._model(batch.tokens, batch.targets)
        return BatchLoss(value=value, measures={}, num_units=batch.tokens.numel())

    def loss(self, batch: TokenBatch) -> BatchLoss:
        """Return the mean loss per token."""
        value = self._forward(batch.tokens, batch.targets)
        measures = {}
        if not self._probe.paused:
            measures = largest(worst(self._probe.read()))
            self._probe.paused = True
        return BatchLoss(
            value=value,
            measures={name: torch.tensor(one) for name, one in measures.items()},
            num_units=batch.tokens.numel(),
        )

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Measure loss and health on the validation text."""
        del step
        self._model.eval()
        self._probe.paused = False
        try:
            with self._run.inference():
                measures = evaluate(self._model, self._batches, self._device)
        finally:
            self._model.train()
            self._probe.paused = True
        health = worst(self._probe.read())
        return {
            **measures,
            SCORE: -measures["validation_loss"],
            **{f"validation_{name}": value for name, value in health.items()},
        }
