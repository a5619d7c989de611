from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from castwise.errors import SettingsError
from castwise.hybrid import HybridSettings
from castwise.hybrid.resting_states import RestingStates
from castwise.optim import AdamW, SweepSettings
from castwise.policy import preset
from planted import Planted, away, far_away
from small_task import SmallTask, assert_same_bits, bits_of


def stepped(make: Callable[[nn.Module], torch.optim.Optimizer]) -> tuple[Any, Any]:
    """A model of odd sizes with an optimizer that has made a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(131, 37), nn.Linear(37, 3))
    optimizer = make(model)
    model(torch.randn(5, 131)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


MAKERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "torch": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
    "fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
    "ours": lambda model: AdamW(model.parameters(), lr=1e-3),
    "8bit": lambda model: AdamW(
        model.parameters(), lr=1e-3, settings=SweepSettings(states="8bit")
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_moments_leave_memory_and_come_back_bit_by_bit(name: str) -> None:
    """The storages are empty meanwhile; afterwards nothing has changed."""
    model, optimizer = stepped(MAKERS[name])
    before = bits_of(model, optimizer)
    resting = RestingStates(optimizer, "disk")
    large = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() > 4000
    ]
    assert len(large) >= 2
    large[0].numpy()  # as a checkpoint looks at it
    resting.store()
    resting.release()
    assert all(each.untyped_storage().nbytes() == 0 for each in large)
    wide = 2 if name == "8bit" else 8
    assert resting.num_bytes >= wide * 131 * 37
    resting.wake()
    assert resting.num_bytes == 0
    assert_same_bits(bits_of(model, optimizer), before)


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_and_a_checkpoint_wake_them(name: str) -> None:
    """Whoever reads the states finds them."""
    model, optimizer = stepped(MAKERS[name])
    twin, other = stepped(MAKERS[name])
    resting = RestingStates(optimizer, "disk")
    for use in ("state_dict", "step"):
        resting.store()
        resting.release()
        if use == "step":
            for each, steps in ((model, optimizer), (twin, other)):
                each(torch.ones(2, 131)).sum().backward()
                steps.step()
                steps.zero_grad()
        assert_same_bits(bits_of(model, optimizer), bits_of(twin, other))
        assert resting.num_bytes == 0


def test_marks_stand_for_what_is_stored() -> None:
    """A tree of marks holds no moment, and is filled with every bit."""
    _, optimizer = stepped(MAKERS["torch"])
    resting = RestingStates(optimizer, "disk")
    resting.store()
    tree = {"a": [dict(state) for state in optimizer.state.values()]}
    marks = resting.marked(tree)
    resting.release()
    assert marks["a"][0]["exp_avg"] == {"resting": 0}
    assert torch.equal(marks["a"][0]["step"], torch.tensor(1.0))
    filled = resting.filled(marks)
    resting.wake()
    for state, back in zip(optimizer.state.values(), filled["a"], strict=True):
        for key, value in state.items():
            assert torch.equal(value, back[key]), key


def test_states_in_main_memory_cannot_rest_on_the_host() -> None:
    """They are there already; the message offers the disk."""
    task = SmallTask()
    with pytest.raises(SettingsError, match="use disk"):
        task.trainer(HybridSettings(predict_states="host"))


def settings(**changes: Any) -> HybridSettings:
    """Short phases; moments on disk in predict."""
    given: dict[str, Any] = {
        "warmup_steps": 8,
        "full_steps": 4,
        "confidence_threshold": 0.1,
        "verification_z": 0.0,
        "predict_states": "disk",
    }
    return HybridSettings(**{**given, **changes})


@pytest.mark.parametrize("mode", ["jump", "stepwise"])
def test_a_run_with_resting_states_has_the_bits_of_one_without(mode: Any) -> None:
    """Through landings, refusals and corrections."""
    ends = []
    for place in ("disk", "stay"):
        task = SmallTask()
        optimizer = task.adamw()
        trainer = task.trainer(
            settings(predict_states=place, mode=mode, max_predict_steps=6),
            optimizer=optimizer,
        )
        torch.manual_seed(3)
        for step in range(80):
            trainer.step(task.batch(step))
        assert trainer.statistics.accepts > 0
        assert bool(trainer.statistics.resting_bytes) == (place == "disk")
        ends.append(bits_of(task.model, optimizer))
    assert_same_bits(*ends)


@pytest.mark.parametrize("states", ["fp32", "8bit"])
@pytest.mark.parametrize("split", [False, True])
def test_a_late_rollback_takes_moments_from_where_they_rested(
    states: str, split: bool
) -> None:
    """Corrective steps changed them; the copy on disk brings them back."""
    task = SmallTask()
    optimizer = AdamW(
        task.model.parameters(), lr=2e-3, settings=SweepSettings(states=states)
    )
    policy = None
    if split:
        policy = preset("bf16-true").with_rule(module="1", precision="p=fp32")
    trainer = task.trainer(
        settings(verification="none", correct_steps=6, warmup_steps=24),
        optimizer=optimizer,
        predictor=Planted(far_away),
        policy=policy,
    )
    step = 0
    while trainer.phase != "predict":
        trainer.step(task.batch(step))
        step += 1
    before = bits_of(task.model, optimizer)
    trainer.step(task.batch(step))
    assert trainer.phase == "correct"
    while trainer.phase == "correct":
        step += 1
        trainer.step(task.batch(step))
    assert trainer.statistics.late_rollbacks == 1
    assert_same_bits(bits_of(task.model, optimizer), before)


def test_a_refused_prediction_leaves_no_trace() -> None:
    """Weights, moments and random states are the same bits."""
    task = SmallTask()
    optimizer = task.adamw()
    trainer = task.trainer(settings(), optimizer=optimizer, predictor=Planted(away))
    step = 0
    while trainer.phase != "predict":
        trainer.step(task.batch(step))
        step += 1
    before = bits_of(task.model, optimizer)
    trainer.step(task.batch(step))
    assert trainer.statistics.refusals == 1
    assert_same_bits(bits_of(task.model, optimizer), before)


def test_no_copy_stays_in_memory_while_moments_rest() -> None:
    """Weights that were left are on disk with the moments; the line is the anchors'."""
    task = SmallTask()
    trainer = task.trainer(settings(verification="none", correct_steps=3))
    step = 0
    while trainer.phase != "correct":
        trainer.step(task.batch(step))
        step += 1
    kept = trainer._prediction
    assert kept is not None
    assert (kept.promise, kept.landing) == (None, None)
    large = {name for name, w in task.model.named_parameters() if w.nbytes >= 256}
    assert large
    for name in large:
        assert kept.snapshot["weights"][name].keys() == {"resting"}
        moments = kept.snapshot["moments"][name]
        assert moments["exp_avg"].keys() == {"resting"}
