"""pytorch#99640: the scale of GradScaler falls until it is 0, and nobody is told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import castwise as cw
from castwise.errors import LossScaleError
from upstream import note_unless


def test_a_scale_that_cannot_help_stops_the_run_at_its_floor() -> None:
    """A NaN in every step: GradScaler halves for ever; ours stops at 1 and says why."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(200):
        scaler.scale(weight.sum() * float("nan")).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    note_unless(scaler.get_scale() == 0.0, "pytorch#99640")

    model = nn.Linear(5, 3)
    before = model.weight.detach().clone()
    run = cw.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), cw.preset("16-mixed")
    )
    scales: list[float] = []

    def train() -> None:
        for _ in range(200):
            scales.append(run.loss_scale.scale)
            with run.step() as step:
                step.backward((model(torch.ones(2, 5)).float() * float("nan")).sum())

    with pytest.raises(LossScaleError, match=r"floor 1 .*'weight' holds NaN"):
        train()
    assert scales == [2.0**power for power in range(16, -1, -1)]
    assert torch.equal(model.weight, before)
    assert run.num_skipped == len(scales)
