from typing import Any

import pytest

from castwise.checkpoints import contradictions, refuse_contradictions
from castwise.errors import ContradictionError


def test_every_setting_that_differs_is_named_with_both_values_and_the_remedy() -> None:
    """One error for all of them, not one after the other."""
    asked = {"dtype": "bf16", "seed": 3, "model": {"dim": 64, "loops": 8}}
    stored = {"dtype": "fp16", "seed": 3, "model": {"dim": 64, "loops": 4}}
    with pytest.raises(ContradictionError) as caught:
        refuse_contradictions(asked, stored, where="runs/a")
    message = str(caught.value)
    assert "dtype is 'fp16' there but 'bf16' here" in message
    assert "model.loops is 4 there but 8 here" in message
    assert "drop dtype, model.loops to continue that run" in message
    assert "seed" not in message


def test_equal_settings_pass() -> None:
    """Tuples equal lists, NaN equals NaN: settings went through JSON."""
    nan = float("nan")
    asked = {"betas": (0.9, 0.95), "scale": nan, "sizes": [[3, nan]]}
    stored = {"betas": [0.9, 0.95], "scale": float("nan"), "sizes": [(3, nan)]}
    assert contradictions(asked, stored) == []
    refuse_contradictions(asked, stored, where="runs/a")


def test_a_setting_younger_than_the_checkpoint_is_no_contradiction() -> None:
    """On the top level; within a setting, absence is a difference."""
    assert contradictions({"a": 1, "new": 2}, {"a": 1, "old": 3}) == []
    found = contradictions({"m": {"a": 1, "b": 2}}, {"m": {"a": 1, "c": 3}})
    assert [str(each) for each in found] == [
        "m.b is (nothing) there but 2 here",
        "m.c is 3 there but (nothing) here",
    ]


@pytest.mark.parametrize(
    ("asked", "stored"),
    [
        (True, 1),
        (0, False),
        (None, 0),
        ("1", 1),
        ([1, 2], [1, 2, 3]),
        ({"a": 1}, None),
        (float("nan"), 0.0),
        ([{"a": 1}], [{"a": 2}]),
    ],
)
def test_values_that_only_look_equal_differ(asked: Any, stored: Any) -> None:
    """True is not 1, None is not 0, a mapping is not nothing."""
    (found,) = contradictions({"x": asked}, {"x": stored})
    assert found.name == "x"
