"""Learning rates by step."""

from __future__ import annotations

import pytest

from castwise.errors import SettingsError
from castwise.training.schedule import WarmupStableDecay


def test_the_rate_rises_holds_and_falls() -> None:
    """A linear rise to 1, a plateau at 1, a linear fall to the final factor."""
    schedule = WarmupStableDecay(num_steps=100, num_warmup=9, decay_share=0.2)
    factors = [schedule.factor(step) for step in range(100)]
    assert factors[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert factors[9:80] == [1.0] * 71
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.05)


def test_the_rate_never_leaves_zero_to_one() -> None:
    """Whatever the lengths, also when rise and fall overlap."""
    for warmup in (0, 1, 7, 200):
        for share in (0.0, 0.35, 1.0):
            schedule = WarmupStableDecay(
                num_steps=63, num_warmup=warmup, decay_share=share
            )
            assert all(0.0 < schedule.factor(step) <= 1.0 for step in range(63))


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_steps": 0},
        {"num_steps": 3, "num_warmup": -1},
        {"num_steps": 3, "decay_share": 1.5},
        {"num_steps": 3, "final_factor": float("nan")},
    ],
)
def test_shapes_without_a_meaning_are_refused(wrong: dict[str, float]) -> None:
    """Each wrong length or share is named."""
    with pytest.raises(SettingsError, match=list(wrong)[-1]):
        WarmupStableDecay(**wrong)  # type: ignore[arg-type]
