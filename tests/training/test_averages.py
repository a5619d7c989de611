"""Averaged weights for evaluation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from castwise.errors import SettingsError
from castwise.optim import hold_weights
from castwise.optim.holding import HeldWeights
from castwise.training.averages import (
    Averages,
    ExponentialAverage,
    LatestAverage,
    NoAverages,
)


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


def split_run() -> tuple[nn.Module, torch.optim.Optimizer, HeldWeights]:
    """A model whose bf16 weights have their other digits in split storage."""
    torch.manual_seed(0)
    model = nn.Linear(31, 7)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return model, optimizer, hold_weights(optimizer, "split")


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One small update."""
    torch.manual_seed(step)
    model(torch.randn(5, 31).bfloat16()).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["ema", "lawa"])
def test_exact_weights_are_averaged_over_split_storage(kind: str) -> None:
    """Against the formula on the joined fp32 weights, not on what the model sees."""
    model, optimizer, held = split_run()
    average: Averages = (
        ExponentialAverage(model, decay=0.9, held=held)
        if kind == "ema"
        else LatestAverage(model, every=2, count=3, held=held)
    )
    expected = held.fp32_weights(model)["weight"].double()
    taken = []
    for step in range(12):
        take_step(model, optimizer, step)
        average.update()
        exact = held.fp32_weights(model)["weight"].double()
        past = min(0.9, (1 + step) / (10 + step))
        expected += (1 - past) * (exact - expected)
        if step % 2:
            taken.append(exact)
    if kind == "lawa":
        expected = torch.stack(taken[-3:]).mean(0)
    found = average.state_dict()["averages"]["weight"]
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-8)
    assert not torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize("kind", [ExponentialAverage, LatestAverage])
def test_split_storage_loses_no_bit_to_an_evaluation(
    kind: type[ExponentialAverage | LatestAverage],
) -> None:
    """The run goes on as one that was never evaluated."""
    ends = []
    for evaluated in (True, False):
        model, optimizer, held = split_run()
        average = kind(model, held=held)
        for step in range(20):
            take_step(model, optimizer, step)
            average.update()
            if evaluated:
                with average.in_place_of_weights():
                    assert model.weight.dtype is torch.bfloat16
        ends.append(held.fp32_weights(model)["weight"])
    assert torch.equal(*ends)


def test_the_latest_average_forgets_what_is_older() -> None:
    """Three weights, two updates apart, and nothing from before."""
    model = nn.Linear(1, 1, bias=False)
    average = LatestAverage(model, every=2, count=3)
    for value in range(1, 12):
        with torch.no_grad():
            model.weight.fill_(float(value))
        average.update()
    with average.in_place_of_weights():
        assert model.weight.item() == pytest.approx((6 + 8 + 10) / 3)
    assert model.weight.item() == 11.0


def test_before_its_first_weight_the_latest_average_is_the_weight() -> None:
    """An evaluation at the very beginning sees the model."""
    model = nn.Linear(3, 1)
    average = LatestAverage(model, every=5)
    before = model.weight.detach().clone()
    with average.in_place_of_weights():
        assert torch.equal(model.weight, before)


def test_the_state_of_the_latest_average_round_trips() -> None:
    """A resumed average goes on as the uninterrupted one, in the middle of a turn."""
    model = nn.Linear(5, 2)
    one, other = (LatestAverage(model, every=3, count=2) for _ in range(2))

    def go_on(averages: tuple[Averages, ...], updates: int) -> None:
        for _ in range(updates):
            with torch.no_grad():
                model.weight.add_(1.0)
            for each in averages:
                each.update()

    go_on((one,), 7)
    other.load_state_dict(one.state_dict())
    go_on((one, other), 4)
    with one.in_place_of_weights():
        left = model.weight.detach().clone()
    with other.in_place_of_weights():
        assert torch.equal(left, model.weight)


@pytest.mark.parametrize("name", ["every", "count"])
def test_an_average_of_no_weights_is_refused(name: str) -> None:
    """It would be a mean of nothing."""
    with pytest.raises(SettingsError, match=f"needs {name} >= 1, got 0"):
        LatestAverage(nn.Linear(1, 1), **{name: 0})
