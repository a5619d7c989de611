"""A7: the curriculum does what its stages declare, and nothing is drawn twice.

tables    every epoch of walks along one, two and three dimensions against a table that
          is made from the declared lengths alone; the control shifts it by one epoch
streams   batches drawn in order, backwards and by four workers are the same, and no two
          steps or epochs draw the same; the control is a loader whose workers each
          begin with a copy of one generator, as a fork leaves it
resume    a walk that is saved and loaded after every epoch goes on as the whole one
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, final

import numpy as np

from castwise.recipes.kenken.batches import Mixture, PuzzleBatch, draw_batch
from castwise.recipes.kenken.curricula import (
    curriculum_of,
    default_text,
    mixture_in_force,
    parse_curriculum,
)
from castwise.recipes.kenken.settings import DIMENSIONS, PRESETS, KenKenSettings
from castwise.recipes.kenken.task import mixture_of
from castwise.training.curriculum import Curriculum
from experiments import kit, stages, tested
from experiments.contract import Check, Experiment, Results

TABLES, STREAMS, RESUME, TESTS = "tables", "streams", "resume", "tests"
NUM_EPOCHS, NUM_BATCHES, NUM_WORKERS = 30, 240, 4
FILES = ("tests/training/test_curriculum.py", "tests/recipes/kenken/test_curricula.py")
WALKS = [
    walked
    for size in range(len(DIMENSIONS) + 1)
    for walked in itertools.combinations(DIMENSIONS, size)
]


@final
class Scheduler(Experiment):
    """Properties of the walk, counted."""

    name = "A7"
    question = "Does the curriculum draw what its stages declare, and nothing twice?"
    arms = (TABLES, STREAMS, RESUME, TESTS)
    settings: ClassVar[Mapping[str, Any]] = {
        "epochs": NUM_EPOCHS,
        "batches": NUM_BATCHES,
        "workers": NUM_WORKERS,
        "files": list(FILES),
    }
    rooms = (stages,)

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Count the cases of one property."""
        if arm == TABLES:
            return {
                "right": _epochs_right(shift=0),
                "shifted": _epochs_right(shift=1),
            }
        if arm == STREAMS:
            return _streams(seed)
        if arm == RESUME:
            return {"right": [_resumes(walked) for walked in WALKS[1:]]}
        return tested.run_tests(*FILES)

    def judge(self, results: Results, limits: Mapping[str, float]) -> list[Check]:
        """Ask for every case, and for the controls to be noticed."""
        del limits
        tables, streams = results[TABLES][0], results[STREAMS][0]
        resumed = results[RESUME][0]["right"]
        right, num = tables["right"]
        shifted, num_shifted = tables["shifted"]
        return [
            Check(
                name="epochs whose mixture is the declared one, walks along 0 to 3 "
                "dimensions",
                value=float(right),
                num=num,
                need="all",
                holds=right == num,
            ),
            Check(
                name="epochs that fit a table shifted by one epoch",
                value=float(shifted),
                num=num_shifted,
                need="not all",
                holds=shifted < num_shifted,
                control=True,
            ),
            Check(
                name="orders of drawing (backwards, four workers) with equal batches",
                value=float(sum(streams["orders"])),
                num=len(streams["orders"]),
                need="all",
                holds=all(streams["orders"]),
            ),
            Check(
                name="batches that were drawn before, over all steps and epochs",
                value=float(streams["repeats"]),
                num=NUM_BATCHES,
                need="0",
                holds=streams["repeats"] == 0,
            ),
            Check(
                name="batches that forked generators repeat",
                value=float(streams["forked_repeats"]),
                num=NUM_BATCHES,
                need="above 0",
                holds=streams["forked_repeats"] > 0,
                control=True,
            ),
            Check(
                name="walks that go on from every epoch as the whole one did",
                value=float(sum(resumed)),
                num=len(resumed),
                need="all",
                holds=all(resumed),
            ),
            tested.judge_tests(results, TESTS),
        ]


def _settings(walked: tuple[str, ...]) -> KenKenSettings:
    """Return a run of the `small` preset with 30 epochs that walks some dimensions."""
    return replace(
        PRESETS["small"], num_steps=NUM_EPOCHS, evaluate_every=1, walked=walked
    )


def _declared(settings: KenKenSettings, epoch: int) -> Mixture:
    """Say what an epoch draws from the declared lengths alone, without the walk."""
    whole = parse_curriculum(default_text(settings), settings)
    declared = []
    for name in settings.walked:
        dimension, begins = whole.dimensions[name], 0
        for stage in dimension.stages:
            ends = begins + (stage.max_epochs or NUM_EPOCHS)
            if begins <= epoch < ends:
                standing = dimension.stages[: dimension.stages.index(stage) + 1]
                last = replace(standing[-1], advance=None, max_epochs=None)
                declared.append(replace(dimension, stages=(*standing[:-1], last)))
                break
            begins = ends
    at_the_end = Curriculum(declared)
    for place in declared:  # walk straight to the last stage of each shortened line
        for _ in range(sum(stage.max_epochs or 0 for stage in place.stages)):
            at_the_end.observe(0, {})
    return mixture_in_force(mixture_of(settings), at_the_end)


def _epochs_right(*, shift: int) -> tuple[int, int]:
    """Count epochs in which the walk draws what the table says."""
    right = num = 0
    for walked in WALKS:
        settings = _settings(walked)
        curriculum = curriculum_of(settings)
        for epoch in range(NUM_EPOCHS):
            now = mixture_in_force(mixture_of(settings), curriculum)
            right += now == _declared(settings, epoch + shift)
            num += 1
            curriculum.observe(epoch, {})
    return right, num


def _streams(seed: int) -> dict[str, Any]:
    """Draw the same steps in three orders; look for what comes twice."""
    mixture = kit.KitSettings().mixture()
    sets = kit.training_sets(mixture)

    def draw(step: int) -> str:
        return _digest(draw_batch(sets, mixture, seed=seed, step=step))

    steps = range(NUM_BATCHES)
    in_order = {step: draw(step) for step in steps}
    backwards = {step: draw(step) for step in reversed(steps)}
    by_workers = {
        step: draw(step)
        for worker in range(NUM_WORKERS)
        for step in steps[worker::NUM_WORKERS]
    }
    forked = [
        np.random.default_rng(seed).integers(2**32, size=(NUM_BATCHES, 4))
        for _ in range(NUM_WORKERS)
    ]
    drawn = [
        forked[step % NUM_WORKERS][step // NUM_WORKERS].tobytes() for step in steps
    ]
    return {
        "orders": [backwards == in_order, by_workers == in_order],
        "repeats": NUM_BATCHES - len(set(in_order.values())),
        "forked_repeats": NUM_BATCHES - len(set(drawn)),
    }


def _digest(batch: PuzzleBatch) -> str:
    told = hashlib.blake2b(digest_size=12)
    for tensor in (batch.tokens, batch.answers, batch.modes):
        told.update(tensor.numpy().tobytes())
    return told.hexdigest()


def _resumes(walked: tuple[str, ...]) -> bool:
    """Save and load after every epoch, under measures that sometimes are missing."""
    settings = _settings(walked)
    whole, cut = curriculum_of(settings), curriculum_of(settings)
    lot = np.random.default_rng(len(walked))
    for epoch in range(NUM_EPOCHS):
        solved = float(lot.uniform(0.5, 1.05))
        measures = {} if lot.uniform() < 0.2 else {"stage_solved": solved}
        whole.observe(epoch, measures)
        cut.observe(epoch, measures)
        state = cut.state_dict()
        cut = curriculum_of(settings)
        cut.load_state_dict(state)
        if cut.state_dict() != whole.state_dict() or cut.history != whole.history:
            return False
    return bool(whole.history)
