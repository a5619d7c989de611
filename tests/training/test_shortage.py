"""A step that runs out of memory ends in one sentence: who holds what, what helps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import castwise as cw
from castwise.errors import MemoryShortageError
from castwise.memory.recompute import recompute
from castwise.memory.saves import store_saves
from memory_models import Gpt, gpt_batch, token_loss


class Greedy(nn.Module):
    """Wants more than any machine has, in forward or backward, when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Gpt(width=16, depth=2)
        self.where = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the inner model."""
        if self.where == "forward":
            torch.empty(1 << 50)
        y: torch.Tensor = self.inner(x)
        if self.where == "backward":
            y.register_hook(lambda _: torch.empty(1 << 50))
        return y


def step_of(run: cw.Run, model: nn.Module) -> None:
    """Make one step."""
    x, y = gpt_batch()
    with run.step() as step:
        step.backward(token_loss(model(x), y))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_sentence_holds_the_table_and_three_remedies(where: str) -> None:
    """What stands between steps is counted; the request is told in plain units."""
    model = Greedy()
    optimizer = torch.optim.AdamW(model.parameters())
    run = cw.prepare(model, optimizer, cw.preset("32-true"))
    step_of(run, model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.where = where
    with pytest.raises(MemoryShortageError) as caught:
        step_of(run, model)
    text = str(caught.value)
    assert "4,096.0 TiB" in text
    for word in ("weights", "gradients", "optimizer states", "(1)", "(2)", "(3)"):
        assert word in text
    assert "\n" not in text
    assert isinstance(caught.value.__cause__, RuntimeError)
    model.where = ""
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
    step_of(run, model)  # the run goes on


def test_a_remedy_in_force_is_not_named() -> None:
    """Who stores or recomputes already is not told to."""
    model = Greedy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = cw.prepare(model, optimizer, cw.preset("32-true"))
    model.where = "forward"
    with pytest.raises(MemoryShortageError, match=r"castwise\.store_saves"):
        step_of(run, model)
    store_saves(model, "fp16")
    with pytest.raises(
        MemoryShortageError, match=r"\(3\) castwise\.recompute"
    ) as caught:
        step_of(run, model)
    assert "store_saves" not in str(caught.value)
    recompute(model)
    with pytest.raises(MemoryShortageError) as caught:
        step_of(run, model)
    assert "castwise.recompute" not in str(caught.value)


def test_other_errors_pass_as_they_are() -> None:
    """A mistake in the model is no shortage."""
    model = Gpt()
    run = cw.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), cw.preset("32-true")
    )
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), run.step():
        model.head(torch.zeros(2, 3))
