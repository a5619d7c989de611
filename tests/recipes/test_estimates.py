"""The memory of a step of the recipes' language models, told before it runs.

Their layers run machine code and branch on numbers, neither of which fakes can give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import castwise as cw
from castwise.policy import preset
from castwise.recipes.resolvent_lm.model import build_model as resolvent
from castwise.recipes.resolvent_lm.settings import ResolventSettings
from castwise.recipes.soliton_lm.model import build_model as soliton
from castwise.recipes.soliton_lm.settings import SolitonSettings
from castwise.training.step_memory import watch_step

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resolvent": lambda: resolvent(ResolventSettings(), 31, 33),
    "soliton": lambda: soliton(SolitonSettings(), 31, 33),
}


def loss_of(output: torch.Tensor, _: Any) -> torch.Tensor:
    """The models return their loss."""
    return output


def optimizer_of(weights: Any) -> torch.optim.Optimizer:
    """Two moments for each weight."""
    return torch.optim.AdamW(weights, lr=1e-4)


@pytest.mark.parametrize("policy", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_a_recipe_holds_what_was_told(name: str, policy: str) -> None:
    """Saved bytes to the byte, and the peak within half of a hundredth."""
    torch.manual_seed(0)
    model = MODELS[name]()
    tokens = torch.randint(31, (3, 34))
    batch = (tokens[:, :-1], tokens[:, 1:], None)
    told = cw.estimate(model, batch, loss_of, preset(policy), optimizer=optimizer_of)
    run = cw.prepare(model, optimizer_of(list(model.parameters())), preset(policy))
    for _ in range(2):
        with run.step() as step:
            step.backward(model(*batch[:-1]))
    held = watch_step(run, batch, loss_of)
    assert told.saved_bytes == held.saved_bytes()
    assert told.peak_bytes == pytest.approx(held.peak()[1], rel=5e-3)
