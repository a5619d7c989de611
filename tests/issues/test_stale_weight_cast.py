"""A weight that changes inside a region: torch.autocast goes on with its old cast."""

from __future__ import annotations

import torch
from torch import nn

import castwise as cw
from castwise.autocast import autocast
from upstream import note_unless


def twice(weight: nn.Parameter) -> tuple[float, float]:
    """The sum of a product before and after the weight is doubled in place."""
    x = torch.eye(3)
    first = nn.functional.linear(x, weight).sum()
    with torch.no_grad():
        weight.mul_(2)
    second = nn.functional.linear(x, weight).sum()
    return first.item(), second.item()


def test_a_weight_changed_in_place_is_cast_again() -> None:
    """An average that is swapped in, a step of an inner optimizer: both must count."""
    with torch.autocast("cpu", torch.bfloat16):
        note_unless(twice(nn.Parameter(torch.ones(3, 3))) == (9, 9), "the stale cast")
    with autocast("cpu", "bf16"):
        assert twice(nn.Parameter(torch.ones(3, 3))) == (9, 18)


def test_a_weight_changed_inside_a_step_is_cast_again() -> None:
    """As `run.step()` puts the region into force, islands and all."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    policy = cw.preset("bf16-mixed").with_rule(module="1", precision="p=fp32,c=fp32")
    run = cw.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), policy)
    x = torch.eye(3)
    with run.step() as step:
        first = model(x)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(2)
        second = model(x)
        assert torch.equal(second, first * 4)
        step.backward(second.float().square().mean())
