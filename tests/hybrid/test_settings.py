"""Settings: the builder, YAML, and what is refused."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from castwise.errors import SettingsError
from castwise.hybrid import HybridSettings, MixedPrecisionConfig

OFF_DEFAULT: dict[str, Any] = {
    "warmup_steps": 7,
    "full_steps": 6,
    "max_predict_steps": 33,
    "min_predict_steps": 3,
    "correct_steps": 2,
    "confidence_threshold": 0.45,
    "max_consecutive": 2,
    "predictor": "rna",
    "predictor_options": {"num_iterates": 3, "regularisation": 1e-9},
    "mode": "stepwise",
    "verification": "none",
    "verification_z": 0.5,
    "late_rollback": False,
    "divergence_threshold": 9.0,
    "mixed_precision_config": MixedPrecisionConfig.aggressive(),
    "observe_formats": True,
    "phase_length": "arms",
    "predict_states": "disk",
}


def test_the_builder_reads_like_a_sentence() -> None:
    """One call for each setting; the rest stays at its default."""
    settings = (
        HybridSettings.builder()
        .max_predict_steps(50)
        .confidence_threshold(0.60)
        .mixed_precision_config(MixedPrecisionConfig.conservative())
        .predictor("window_line", window=40)
        .build()
    )
    assert settings.max_predict_steps == 50
    assert settings.predictor_options == {"window": 40}
    assert settings.warmup_steps == HybridSettings().warmup_steps
    assert HybridSettings.builder().build() == HybridSettings()


def test_every_setting_round_trips_through_yaml() -> None:
    """Each field off its default."""
    settings = HybridSettings(**OFF_DEFAULT)
    default = HybridSettings()
    for each in fields(settings):
        assert getattr(settings, each.name) != getattr(default, each.name), each.name
    assert HybridSettings.from_yaml(settings.to_yaml()) == settings


def test_the_builder_can_set_everything() -> None:
    """No setting is out of its reach."""
    builder = HybridSettings.builder()
    given = dict(OFF_DEFAULT)
    builder.predictor(given.pop("predictor"), **given.pop("predictor_options"))
    builder.verification(given.pop("verification"), z=given.pop("verification_z"))
    for name, value in given.items():
        getattr(builder, name)(value)
    assert builder.build() == HybridSettings(**OFF_DEFAULT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"confidence_threshold": 0.0}, "confidence_threshold.*between 0 and 1.*0.0"),
        ({"confidence_threshold": 1.0}, "confidence_threshold"),
        ({"confidence_threshold": float("nan")}, "confidence_threshold"),
        ({"confidence_threshold": "0.6"}, "confidence_threshold"),
        ({"warmup_steps": 0}, "warmup_steps.*1 or more, got 0"),
        ({"full_steps": 2.0}, "full_steps.*whole number"),
        ({"correct_steps": True}, "correct_steps.*whole number"),
        ({"correct_steps": -1}, "correct_steps.*0 or more"),
        ({"min_predict_steps": 90}, "at most max_predict_steps=80"),
        ({"verification_z": -1.0}, "verification_z.*0 or more"),
        ({"divergence_threshold": 0}, "divergence_threshold.*above 0"),
        ({"mode": "leap"}, "mode needs jump or stepwise, got 'leap'"),
        ({"verification": "maybe"}, "paired or none"),
        ({"late_rollback": 1}, "late_rollback needs true or false"),
        ({"mixed_precision_config": "bf16"}, "a MixedPrecisionConfig, got str"),
        ({"predictor": "window_lime"}, "did you mean window_line"),
        ({"predictor_options": {"widow": 3}}, "cannot be built.*widow"),
        ({"predictor_options": {"window": 0}}, "window of 1 step or more"),
        (
            {"predictor": "outer_nesterov", "predictor_options": {"momentum": 1.0}},
            r"momentum in \[0, 1\)",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(changes: dict[str, Any], message: str) -> None:
    """With need and got, before anything runs."""
    with pytest.raises(SettingsError, match=message):
        HybridSettings(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("warm_steps: 3", "did you mean warmup_steps"),
        ("- 3", "lines such as"),
        ("full_steps: [", "no valid YAML"),
        ("mixed_precision_config: bf16", "keys and values"),
        ("predictor_options: 7", "keys and values"),
        ("full_steps: !!python/object:os.system {}", "no valid YAML"),
    ],
)
def test_malformed_yaml_is_refused(text: str, message: str) -> None:
    """A settings file runs no code and says what is wrong."""
    with pytest.raises(SettingsError, match=message):
        HybridSettings.from_yaml(text)
