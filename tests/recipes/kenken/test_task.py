"""The recipe's work for the trainer: batches, drawn at once or ahead of time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import castwise as cw
from castwise.recipes.kenken.batches import PuzzleBatch
from castwise.recipes.kenken.curricula import curriculum_of
from castwise.recipes.kenken.model import KenKenModel, model_settings
from castwise.recipes.kenken.settings import PRESETS, KenKenSettings
from castwise.recipes.kenken.supply import Supply, open_supply
from castwise.recipes.kenken.task import KenKenTask

WALKED = replace(
    PRESETS["tiny"],
    num_steps=20,
    evaluate_every=2,
    num_train=32,
    num_validation=8,
    walked=("size", "mode", "fill"),
)


@pytest.fixture(scope="module")
def supply(tmp_path_factory: pytest.TempPathFactory) -> Supply:
    """The puzzles of both tasks."""
    folder: Path = tmp_path_factory.mktemp("puzzles")
    return open_supply(WALKED, folder, progress=lambda *_: None)


def task_of(settings: KenKenSettings, supply: Supply, num_ahead: int) -> KenKenTask:
    """Make a task that draws so many batches ahead."""
    model = KenKenModel(model_settings(settings.model))
    run = cw.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), cw.preset("32-true")
    )
    return KenKenTask(
        run=run,
        model=model,
        supply=supply,
        settings=settings,
        device=torch.device("cpu"),
        curriculum=curriculum_of(settings),
        num_ahead=num_ahead,
    )


def drawn(task: KenKenTask, settings: KenKenSettings) -> list[PuzzleBatch]:
    """Walk through a run and all of its stages without training."""
    batches = []
    for step in range(settings.num_steps):
        batches.append(task.batch(step))
        if (step + 1) % settings.evaluate_every == 0:
            task.end_epoch(step + 1, {})
    return batches


def test_batches_drawn_ahead_are_those_drawn_when_they_are_needed(
    supply: Supply,
) -> None:
    """A change of stage throws away what was drawn for the stage before."""
    at_once = drawn(task_of(WALKED, supply, 0), WALKED)
    ahead = drawn(task_of(WALKED, supply, 3), WALKED)
    assert len({batch.size for batch in at_once}) == 2  # stages were walked
    for first, second in zip(at_once, ahead, strict=True):
        assert torch.equal(first.tokens, second.tokens)
        assert torch.equal(first.modes, second.modes)
        assert all(map(torch.equal, first.relations, second.relations))
