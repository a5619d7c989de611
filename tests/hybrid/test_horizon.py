"""How far to predict, the pace of the loss, and residuals."""

from __future__ import annotations

import pytest
import torch

from castwise.hybrid.horizon import Horizon
from castwise.hybrid.pace import Pace
from castwise.hybrid.residuals import LEAST_GAIN, Residuals


def test_accepted_goes_further_refused_less_far() -> None:
    """Within both bounds."""
    horizon = Horizon(least=5, most=24, full_steps=20)
    lengths = [horizon.length]
    for _ in range(4):
        horizon.accepted(credited=1.0, paid=1.0)
        lengths.append(horizon.length)
    for _ in range(4):
        horizon.refused(paid=1.0)
        lengths.append(horizon.length)
    assert lengths == [10, 15, 22, 24, 24, 12, 6, 5, 5]


def test_refusals_in_a_row_cool_down_ever_longer() -> None:
    """What cannot be predicted is asked ever more rarely."""
    horizon = Horizon(least=5, most=80, full_steps=20)
    coolings = []
    for _ in range(5):
        horizon.refused(paid=1.0)
        coolings.append(horizon.cooling)
    assert coolings == [0, 0, 20, 40, 80]
    horizon.count_real_step()
    assert horizon.cooling == 79
    horizon.accepted(credited=1.0, paid=1.0)
    horizon.refused(paid=1.0)
    assert horizon.cooling == 79  # still cooling, and not anew


def test_the_pace_tells_a_fall_in_steps() -> None:
    """On a line the answer is exact."""
    pace = Pace(6)
    for step in range(100):
        pace.observe(3.0 - 0.01 * step)
    assert pace.worth(0.2) == pytest.approx(20.0)
    pace.reset()
    assert pace.worth(0.2) == 0.0
    pace.observe(1.0)
    pace.observe(2.0)
    assert pace.worth(0.2) == 0.0  # a loss that rises has no pace


def test_a_gain_is_the_best_multiple_of_the_promise() -> None:
    """Least squares, averaged, held between a floor and 1."""
    residuals = Residuals(memory=0.0)
    promised = torch.tensor([1.0, 2.0, -2.0])
    residuals.learn({"w": promised}, {"w": promised * 0.25 + 0.0})
    assert residuals.gain("w") == pytest.approx(0.25)
    assert residuals.last["w"].norm_ratio == pytest.approx(0.25)
    residuals.learn({"w": promised}, {"w": promised * 3})
    assert residuals.gain("w") == 1.0
    residuals.learn({"w": promised}, {"w": -promised})
    assert residuals.gain("w") == LEAST_GAIN
    residuals.learn({"w": promised}, {"w": promised * float("nan")})
    assert residuals.gain("w") == LEAST_GAIN  # what is no number teaches nothing
    assert residuals.gain("unknown") == 1.0
