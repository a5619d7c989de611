"""Settings of the hybrid trainer under which every phase occurs within a few steps."""

from __future__ import annotations

from castwise.hybrid import HybridSettings, MixedPrecisionConfig


def every_phase(*, observe_formats: bool = False) -> HybridSettings:
    """Windows of three steps, any confidence, states at rest on disk."""
    return HybridSettings(
        warmup_steps=5,
        full_steps=4,
        correct_steps=3,
        max_predict_steps=4,
        min_predict_steps=3,
        confidence_threshold=0.01,
        verification_z=0.0,
        mode="stepwise",
        observe_formats=observe_formats,
        predict_states="disk",
        mixed_precision_config=MixedPrecisionConfig.default(),
    )
