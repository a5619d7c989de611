"""pytorch#43706: loading casts the states of an optimizer to the format of weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

import castwise as cw
from upstream import note_unless

X = torch.linspace(-1, 1, 3 * 5).reshape(3, 5).sin()


def test_states_load_in_the_format_that_they_were_saved_in() -> None:
    """fp32 moments of weights in bf16 come back bit by bit, and so does training."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    stock = torch.optim.AdamW([weight])
    weight.grad = torch.full_like(weight, 0.1)
    stock.step()
    stock.state[weight]["exp_avg"] = torch.full((3,), 1 + 2.0**-20)
    stock.load_state_dict(copy.deepcopy(stock.state_dict()))
    note_unless(stock.state[weight]["exp_avg"].dtype is torch.bfloat16, "pytorch#43706")

    def begin() -> tuple[nn.Linear, torch.optim.AdamW, cw.Run]:
        torch.manual_seed(0)
        model = nn.Linear(5, 7)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, cw.prepare(model, optimizer, cw.preset("bf16-true"))

    def train(model: nn.Linear, run: cw.Run, num_steps: int) -> None:
        for _ in range(num_steps):
            with run.step() as step:
                step.backward(model(X.bfloat16()).float().square().mean())

    model, optimizer, run = begin()
    train(model, run, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, run, 2)

    again, other, second = begin()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for name, state in saved[1]["state"].items():
        loaded = other.state_dict()["state"][name]
        assert state["exp_avg"].dtype is torch.float32
        for key, value in state.items():
            assert torch.equal(loaded[key], value), key
            assert loaded[key].dtype is value.dtype, key
    train(again, second, 2)
    assert again.weight.dtype is torch.bfloat16
    assert torch.equal(again.weight, model.weight)
