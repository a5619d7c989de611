"""Averaged weights for evaluation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from castwise.errors import SettingsError
from castwise.training.averages import ExponentialAverage, NoAverages


def test_the_average_follows_its_formula() -> None:
    """Against the recursion written out in float64."""
    model = nn.Linear(3, 1, bias=False)
    average = ExponentialAverage(model, decay=0.9)
    expected = model.weight.detach().double().clone()
    generator = torch.Generator().manual_seed(0)
    for t in range(50):
        with torch.no_grad():
            model.weight.copy_(torch.randn(1, 3, generator=generator))
        average.update()
        past = min(0.9, (1 + t) / (10 + t))
        expected += (1 - past) * (model.weight.detach().double() - expected)
    with average.in_place_of_weights():
        torch.testing.assert_close(
            model.weight.detach().double(), expected, rtol=1e-6, atol=1e-6
        )


def test_weights_come_back_bit_by_bit_after_an_exception() -> None:
    """Evaluation may fail; the weights must not be lost."""
    model = nn.Linear(63, 1)
    average = ExponentialAverage(model)
    with torch.no_grad():
        model.weight.add_(1.0)
    before = model.weight.detach().clone()
    average.update()
    with pytest.raises(RuntimeError), average.in_place_of_weights():
        assert not torch.equal(model.weight, before)
        raise RuntimeError
    assert torch.equal(model.weight, before)


def test_state_round_trips() -> None:
    """A resumed average goes on as the uninterrupted one."""
    model = nn.Linear(5, 2)
    one, other = ExponentialAverage(model), ExponentialAverage(model)
    with torch.no_grad():
        model.weight.mul_(3.0)
    one.update()
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        model.weight.mul_(-1.0)
    one.update()
    other.update()
    with one.in_place_of_weights():
        left = model.weight.detach().clone()
    with other.in_place_of_weights():
        assert torch.equal(left, model.weight)


def test_half_precision_weights_are_averaged_in_fp32() -> None:
    """A bf16 average of bf16 weights would stop moving."""
    model = nn.Linear(2, 1, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    average = ExponentialAverage(model, decay=0.5)
    with torch.no_grad():
        model.weight.fill_(1.0078125)  # one bf16 ulp above 1
    average.update()
    held = average.state_dict()["averages"]["weight"]
    assert held.dtype == torch.float32
    assert 1.0 < float(held[0, 0]) < 1.0078125 + 1e-7


def test_a_decay_of_one_is_refused() -> None:
    """It would never move."""
    with pytest.raises(SettingsError, match=r"got 1\.0"):
        ExponentialAverage(nn.Linear(1, 1), decay=1.0)


def test_no_averages_leave_everything_in_place() -> None:
    """The null object has no effect and no state."""
    nothing = NoAverages()
    nothing.update()
    with nothing.in_place_of_weights():
        pass
    assert nothing.state_dict() == {}
