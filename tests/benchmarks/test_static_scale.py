"""A scale that gradient flow suggests trains fp16: shorter than the benchmark does."""

from __future__ import annotations

import pytest
from static_scale import (
    ABOVE,
    ARMS,
    FAR_TOO_LOW,
    SUGGESTED,
    TASKS,
    judge,
    suggested_scale,
    train,
)

from castwise.loss_scale import StaticScale

pytestmark = pytest.mark.filterwarnings(
    "ignore:Dynamo detected a call to a .functools.lru_cache"
)


@pytest.mark.parametrize("name", list(TASKS))
def test_a_suggested_scale_skips_nothing_and_one_above_does(name: str) -> None:
    """No step of the first forty is skipped; at 2^6 of the scale the first ones are."""
    task = TASKS[name]()
    good = suggested_scale(task, 1)
    done = train(task, 1, 40, policy="16-mixed", scale=StaticScale(good))
    assert done.num_skipped == 0
    above = StaticScale(good * ABOVE)
    assert train(task, 1, 4, policy="16-mixed", scale=above).num_skipped > 0


def test_without_a_scale_that_fits_less_is_learned() -> None:
    """The task needs a scale: far below, gradients vanish, and nothing skips."""
    task = TASKS["language"]()
    good = StaticScale(suggested_scale(task, 1))
    losses = {
        scale.scale: train(task, 1, 60, policy="16-mixed", scale=scale)
        for scale in (good, StaticScale(FAR_TOO_LOW))
    }
    assert losses[FAR_TOO_LOW].num_skipped == 0
    assert losses[FAR_TOO_LOW].loss > losses[good.scale].loss + 0.2


def test_a_suggestion_that_skips_or_loses_does_not_hold() -> None:
    """Each verdict can come out negative."""

    def verdicts(**changes: tuple[float, int]) -> dict[str, bool]:
        values = {
            "suggested": (1.0, 0),
            "too high": (3.0, 25),
            "far too low": (2.0, 0),
            "dynamic": (1.0, 3),
            "fp32": (1.0, 0),
        } | {name.replace("_", " "): value for name, value in changes.items()}
        assert list(values) == list(ARMS)
        arms = {
            arm: [{"loss": loss, "num_skipped": skipped}]
            for arm, (loss, skipped) in values.items()
        }
        return judge({"arms": arms})

    assert all(verdicts().values())
    assert SUGGESTED == "suggested"
    for change in (
        {"suggested": (1.0, 1)},
        {"suggested": (1.1, 0)},
        {"too_high": (1.0, 0)},
        {"far_too_low": (1.1, 0)},
    ):
        assert sum(not holds for holds in verdicts(**change).values()) == 1
