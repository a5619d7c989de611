"""The memory of each phase, against what a trainer really keeps."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from castwise.errors import SettingsError
from castwise.hybrid import HybridSettings, MixedPrecisionConfig
from castwise.hybrid.memory_by_phase import estimate_memory
from castwise.hybrid.phases import Phase
from small_task import SmallTask


def tensors_of(tree: Any) -> dict[int, Tensor]:
    """Every tensor of a tree, those that share memory once."""
    if isinstance(tree, Tensor):
        return {tree.untyped_storage().data_ptr(): tree}
    inner = list(tree.values()) if isinstance(tree, dict) else tree
    if isinstance(inner, list | tuple):
        return {key: t for each in inner for key, t in tensors_of(each).items()}
    return {}


@pytest.mark.parametrize("late_rollback", [True, False])
def test_a_trial_keeps_what_the_estimate_says(late_rollback: bool) -> None:
    """Copies of weights, proposal and moments, counted in a run that is correcting."""
    task = SmallTask()
    settings = HybridSettings(
        warmup_steps=8,
        full_steps=4,
        verification="none",
        confidence_threshold=0.1,
        late_rollback=late_rollback,
    )
    trainer = task.trainer(settings)
    step = 0
    while trainer.phase != "correct":
        trainer.step(task.batch(step))
        step += 1
    kept = trainer.state_dict()["prediction"]
    del kept["snapshot"]["random"], kept["snapshot"]["buffers"]
    num = sum(parameter.numel() for parameter in task.model.parameters())
    found = sum(tensor.nbytes for tensor in tensors_of(kept).values())
    expected = estimate_memory(settings, num_parameters=num).phases[Phase.CORRECT].trial
    counters = 4 * 6 * late_rollback  # AdamW counts the steps of each parameter
    assert found == expected + counters


def test_a_low_predict_phase_does_not_lower_the_peak() -> None:
    """The average falls, the peak stays: both are said."""
    sizes = {
        "num_parameters": 1000,
        "saved_activations": 8000,
        "forward_activations": 800,
    }
    default = estimate_memory(HybridSettings(), **sizes)
    quiet = HybridSettings(mixed_precision_config=MixedPrecisionConfig.conservative())
    assert default.peak == estimate_memory(quiet, **sizes).peak
    assert default.peak[0] is Phase.CORRECT
    assert default.phases[Phase.PREDICT].activations == 400
    assert default.phases[Phase.FULL].total == 4000 + 4000 + 8000 + 4000 + 8000
    assert default.average({"full": 3, "predict": 1}) == pytest.approx(
        (3 * 28000 + default.phases[Phase.PREDICT].total) / 4
    )


def test_bf16_everywhere_halves_activations_alone() -> None:
    """Weights, gradients and moments stay in fp32."""
    low = HybridSettings(mixed_precision_config=MixedPrecisionConfig.aggressive())
    full = estimate_memory(low, num_parameters=10, saved_activations=80).phases
    assert full[Phase.FULL].activations == 40
    assert full[Phase.FULL].weights == 40


def test_shares_that_are_none_are_refused() -> None:
    """Negative, all zero, or no number."""
    estimate = estimate_memory(HybridSettings(), num_parameters=1)
    odd = [{"full": wrong} for wrong in (0.0, float("nan"), float("inf"))]
    for shares in ({"full": -1.0, "predict": 3.0}, *odd):
        with pytest.raises(SettingsError, match="0 or more and not all 0"):
            estimate.average(shares)


def test_states_that_rest_are_held_by_nobody_in_predict() -> None:
    """Neither moments nor copies; correct has the moments back, without copies."""
    stay = estimate_memory(HybridSettings(), num_parameters=1001)
    rest = estimate_memory(HybridSettings(predict_states="disk"), num_parameters=1001)
    saved = {
        phase: stay.phases[phase].total - rest.phases[phase].total for phase in Phase
    }
    assert saved == {
        Phase.WARMUP: 0,
        Phase.FULL: 0,
        Phase.PREDICT: 20 * 1001,
        Phase.CORRECT: 12 * 1001,
    }
