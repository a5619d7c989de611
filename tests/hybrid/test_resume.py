"""A run that was saved goes on bit by bit, whatever phase it was in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from castwise.checkpoints import load_checkpoint, save_checkpoint
from castwise.errors import ContradictionError, PredictionError
from castwise.hybrid import PREDICTORS, HybridSettings, HybridTrainer
from castwise.training.random_state import (
    capture_random_states,
    restore_random_states,
)
from small_task import (
    SmallTask,
    assert_same_bits,
    bits_of,
)

OPTIONS: dict[str, dict[str, float]] = {
    "rna": {"num_iterates": 2},
    "dmd": {"num_iterates": 4, "rank": 2},
}


def settings(predictor: str, mode: Any) -> HybridSettings:
    """Every phase occurs within forty steps."""
    return HybridSettings(
        warmup_steps=6,
        full_steps=4,
        max_predict_steps=6,
        correct_steps=3,
        confidence_threshold=0.1,
        verification_z=0.0,
        mode=mode,
        predictor=predictor,
        predictor_options=OPTIONS.get(predictor, {}),
    )


def tree_of(
    task: SmallTask, optimizer: torch.optim.Optimizer, trainer: HybridTrainer
) -> dict[str, Any]:
    """What a loop of one's own saves."""
    return {
        "model": task.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "trainer": trainer.state_dict(),
        "random": capture_random_states(),
    }


def put_back(
    tree: dict[str, Any],
    task: SmallTask,
    optimizer: torch.optim.Optimizer,
    trainer: HybridTrainer,
) -> None:
    """What it loads."""
    task.model.load_state_dict(tree["model"])
    optimizer.load_state_dict(tree["optimizer"])
    trainer.load_state_dict(tree["trainer"])
    restore_random_states(tree["random"])


@pytest.mark.parametrize("mode", ["jump", "stepwise"])
@pytest.mark.parametrize("predictor", sorted(PREDICTORS))
def test_resume_in_the_middle_of_any_phase_is_exact(
    tmp_path: Path, predictor: str, mode: str
) -> None:
    """From a file written in each phase, the next steps are the uninterrupted ones."""
    task = SmallTask()
    optimizer = task.adamw()
    trainer = task.trainer(settings(predictor, mode), optimizer=optimizer)
    saved: dict[str, int] = {}
    last: tuple[str, int] = ("", 0)
    for step in range(40):
        inside = trainer.phase, last[1] + 1 if trainer.phase == last[0] else 0
        last = inside
        if inside[1] in {0, 2} and f"{inside}" not in saved:
            saved[f"{inside}"] = step
            tree = tree_of(task, optimizer, trainer)
            save_checkpoint(tmp_path / f"{step}.ckpt", tree, kind="test")
        trainer.step(task.batch(step))
    end = bits_of(task.model, optimizer)
    assert {"warmup", "full", "predict"} <= {name.split("'")[1] for name in saved}
    for step in saved.values():
        other = SmallTask(seed=0)
        new_optimizer = other.adamw()
        again = other.trainer(settings(predictor, mode), optimizer=new_optimizer)
        tree = load_checkpoint(tmp_path / f"{step}.ckpt", kind="test")
        put_back(tree, other, new_optimizer, again)
        for later in range(step, 40):
            again.step(other.batch(later))
        assert_same_bits(bits_of(other.model, new_optimizer), end)
        assert again.statistics.tries == trainer.statistics.tries
        assert again.num_steps == 40


def test_a_state_of_other_settings_is_refused() -> None:
    """All that differs is named, and nothing is changed."""
    one = SmallTask().trainer(settings("window_line", "jump"))
    other = SmallTask().trainer(settings("window_line", "stepwise"))
    task = SmallTask()
    other.step(task.batch(0))
    with pytest.raises(ContradictionError, match="mode is 'stepwise' there"):
        one.load_state_dict(other.state_dict())
    assert one.num_steps == 0


def test_what_is_no_state_of_a_run_is_refused() -> None:
    """The missing parts are named."""
    trainer = SmallTask().trainer(settings("null", "jump"))
    with pytest.raises(PredictionError, match=r"lacks settings, machine"):
        trainer.load_state_dict({"model": 1})
