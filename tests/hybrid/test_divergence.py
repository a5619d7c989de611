"""The divergence monitor: quiet about noise, loud about a rise."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from castwise.hybrid.divergence import DivergenceMonitor


def levels(losses: list[float], *, norm: float = 1.0) -> Counter[str]:
    """How often each level came up."""
    monitor = DivergenceMonitor()
    return Counter(monitor.observe(loss, norm).level for loss in losses)


@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "heavy tails"])
def test_noise_alone_raises_no_warning(heavy: bool) -> None:
    """20,000 steps of independent noise: no warning, and hardly any caution."""
    lot = np.random.default_rng(7)
    noise = lot.standard_t(4, 20_000) if heavy else lot.standard_normal(20_000)
    found = levels((2.0 + 0.1 * noise).tolist())
    assert found["warning"] == 0
    assert found["caution"] < 60


def test_a_falling_loss_raises_no_alarm() -> None:
    """An improvement, however sudden, is no divergence."""
    course = [5.0 * math.exp(-t / 100) for t in range(500)]
    course += [0.001] * 50
    assert levels(course)["normal"] == len(course)


def test_an_oscillation_raises_no_alarm() -> None:
    """A momentum method on a deterministic problem swings while it falls."""
    course = [math.exp(-t / 200) * (1 + 0.1 * math.cos(t / 3)) for t in range(800)]
    assert levels(course)["warning"] == 0


def test_a_rise_warns_within_a_few_steps() -> None:
    """Five deviations above the course, several times in a row."""
    lot = np.random.default_rng(1)
    monitor = DivergenceMonitor()
    for noise in lot.standard_normal(200):
        monitor.observe(2.0 + 0.1 * noise, 1.0)
    seen = [monitor.observe(2.6, 1.0) for _ in range(6)]
    assert "warning" in [alarm.level for alarm in seen]
    because = next(alarm.because for alarm in seen if alarm.level == "warning")
    assert because.startswith("the loss rose to 2.6 from an average of 2.")


def test_one_bad_batch_is_no_alarm() -> None:
    """An outlier counts six deviations, whatever it was."""
    lot = np.random.default_rng(2)
    monitor = DivergenceMonitor()
    for noise in lot.standard_normal(200):
        monitor.observe(2.0 + 0.1 * noise, 1.0)
    assert monitor.observe(1e6, 1.0).level != "warning"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_warns_at_once(loss: float) -> None:
    """And leaves the averages alone."""
    monitor = DivergenceMonitor()
    monitor.observe(1.0, 1.0)
    before = monitor.state_dict()
    assert monitor.observe(loss, 1.0).level == "warning"
    assert monitor.state_dict() == before


def test_an_exploding_gradient_warns() -> None:
    """A hundred times the usual norm, though the loss stands still."""
    monitor = DivergenceMonitor()
    for _ in range(50):
        monitor.observe(1.0, 2.0)
    alarm = monitor.observe(1.0, 250.0)
    assert alarm.level == "warning"
    assert "gradient norm 250 is usually 2" in alarm.because


def test_the_ceiling_is_three_deviations_up_and_open_at_first() -> None:
    """A stepwise prediction is held to it."""
    monitor = DivergenceMonitor()
    assert monitor.ceiling == math.inf
    lot = np.random.default_rng(3)
    for noise in lot.standard_normal(5000):
        monitor.observe(2.0 + 0.1 * noise, 1.0)
    assert monitor.ceiling == pytest.approx(2.3, abs=0.12)
