from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from castwise.optim import AdamW, hold_weights
from castwise.optim.sweep import SweepOptimizer, gradients_found_finite
from castwise.optim.swept import Sweeper

SIZES = (63, 1000, 70_001)


def _optimizer(num_given: int = 3) -> SweepOptimizer:
    """Return an optimizer of split weights with finite gradients."""
    lot = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(n, generator=lot)) for n in SIZES]
    optimizer = AdamW(parameters, lr=0.1)
    hold_weights(optimizer)
    for parameter in parameters[:num_given]:
        parameter.grad = torch.randn(parameter.shape, generator=lot).bfloat16()
    return optimizer


def _weights(optimizer: SweepOptimizer) -> list[torch.nn.Parameter]:
    weights: list[torch.nn.Parameter] = optimizer.param_groups[0]["params"]
    return weights


@pytest.fixture
def num_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many gradients each check reads."""
    from castwise.optim.machine_table import MachineSweeper  # imports numba

    seen: list[int] = []
    before = MachineSweeper.nonfinite

    def nonfinite(self: Sweeper) -> list[bool]:
        seen.append(len(self.swept))
        return before(self)  # type: ignore[arg-type]

    monkeypatch.setattr(MachineSweeper, "nonfinite", nonfinite)
    return seen


def test_gradients_that_were_found_finite_are_not_read_again(
    num_read: list[int],
) -> None:
    """Inside of the block nothing is checked; before and after it everything is."""
    optimizer, twin = _optimizer(), _optimizer()
    for _ in range(2):
        with gradients_found_finite(optimizer):
            optimizer.step()
        assert optimizer.outcome.stepped
    assert num_read == []
    optimizer.step()
    assert num_read == [3]
    for _ in range(3):
        twin.step()
    for mine, other in zip(_weights(optimizer), _weights(twin), strict=True):
        assert torch.equal(mine, other)


def _write(weight: torch.nn.Parameter) -> None:
    assert weight.grad is not None
    weight.grad[17] = math.inf


def _exchange(weight: torch.nn.Parameter) -> None:
    assert weight.grad is not None
    bad = weight.grad.clone()
    bad[17] = math.nan
    weight.grad = bad


def _write_through_a_view(weight: torch.nn.Parameter) -> None:
    assert weight.grad is not None
    weight.grad.detach()[10:20].mul_(math.inf)


@pytest.mark.parametrize("poison", [_write, _exchange, _write_through_a_view])
def test_what_somebody_wrote_meanwhile_is_checked(
    poison: Callable[[torch.nn.Parameter], None],
) -> None:
    """A gradient that is written to, or another one, is believed no more."""
    optimizer = _optimizer()
    before = [weight.detach().clone() for weight in _weights(optimizer)]
    with gradients_found_finite(optimizer):
        poison(_weights(optimizer)[1])
        optimizer.step()
    assert optimizer.outcome.nonfinite == ("parameter 1",)
    for weight, kept in zip(_weights(optimizer), before, strict=True):
        assert torch.equal(weight, kept)


def test_hooks_of_others_make_every_gradient_be_checked() -> None:
    """A step hook may write where torch counts nothing, as through `.data`."""
    optimizer = _optimizer()

    def spoil(*_: Any) -> None:
        gradient = _weights(optimizer)[2].grad
        assert gradient is not None
        gradient.data[-1] = math.nan

    optimizer.register_step_pre_hook(spoil)
    with gradients_found_finite(optimizer):
        optimizer.step()
    assert optimizer.outcome.nonfinite == ("parameter 2",)


def test_a_gradient_that_came_later_is_checked() -> None:
    """Nothing was known of it."""
    optimizer = _optimizer(num_given=2)
    with gradients_found_finite(optimizer):
        late = _weights(optimizer)[2]
        late.grad = torch.full_like(late, math.inf)
        optimizer.step()
    assert optimizer.outcome.nonfinite == ("parameter 2",)


def test_what_was_known_is_forgotten_with_the_block() -> None:
    """A bare step believes nobody, not even where torch saw no write."""
    optimizer = _optimizer()
    with pytest.raises(ZeroDivisionError), gradients_found_finite(optimizer):
        raise ZeroDivisionError
    gradient = _weights(optimizer)[0].grad
    assert gradient is not None
    gradient.data[0] = math.inf
    optimizer.step()
    assert optimizer.outcome.nonfinite == ("parameter 0",)


def test_optimizers_of_others_step_as_ever() -> None:
    """They check nothing, so there is nothing to spare."""
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    with gradients_found_finite(optimizer):
        optimizer.step()
    assert torch.equal(weight.detach(), torch.full((3,), 0.5))
