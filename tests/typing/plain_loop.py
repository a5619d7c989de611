"""The README's loop, checked by the type checker as a user's program would be."""

from __future__ import annotations

import torch
from torch import nn

import castwise as cw


def train(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[str]:
    """Train a model and say what became of each step."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    policy: cw.Policy = cw.preset("bf16-mixed")
    run: cw.Run = cw.prepare(model, optimizer, policy, clip_norm=1.0)
    told: list[str] = []
    for x, y in batches:
        with run.step() as step:
            loss = nn.functional.mse_loss(model(x), y)
            step.backward(loss)
        outcome = step.outcome
        if isinstance(outcome, cw.Skipped):
            told.append(f"{outcome.because}: {outcome.parameter}")
        else:
            told.append(f"{outcome.loss:.3f} {outcome.gradient_norm:.3f}")
    return told
