"""A8: stages end by what is measured, and noise does not throw them back and forth.

scripted   a measure that rises past its threshold under noise, and is missing now and
           then: the careful curriculum (running mean, patience, hysteresis) beside one
           that believes every value, which is the control
deadline   a measure that never gets there: every stage is forced, and says so
live       trainings on squares whose stages end by the loss on the stage itself; the
           fixed final stage is measured beside it
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from statistics import fmean
from typing import Any, ClassVar, final

import numpy as np

from castwise.recipes.kenken.batches import draw_batch
from castwise.recipes.kenken.curricula import mixture_in_force
from castwise.recipes.kenken.puzzle_set import Kind, Split
from castwise.training.conditions import parse_condition
from castwise.training.curriculum import Curriculum, Dimension, Stage, Transition
from experiments import kit, stages, tested
from experiments.contract import Check, Experiment, Results

SCRIPTED, DEADLINE, LIVE, TESTS = "scripted", "deadline", "live", "tests"
NUM_STREAMS, NUM_EPOCHS, NOISE, MISSING = 400, 60, 0.06, 0.1
FILES = ("tests/training/test_curriculum.py",)
SETTINGS = kit.KitSettings(num_steps=720, num_epochs=48)
LIVE_STAGES = """
castwise: 1
dimensions:
  mode:
    smoothing: 0.3
    stages:
    - {name: standard, modes: {standard: 1}, advance: stage_loss < 0.3 for 2,
       max_epochs: 24}
    - {name: with zero, modes: {standard: 1, zero: 1}, advance: stage_loss < 0.3 for 2,
       max_epochs: 24, rehearsal: 0.2}
    - {name: all, modes: {standard: 1, zero: 1, negative: 1}}
"""
LONGEST = 24


@final
class Transitions(Experiment):
    """Scripted and live measures."""

    name = "A8"
    question = "Do stages end by what is measured, and stand against noise?"
    arms = (SCRIPTED, DEADLINE, LIVE, TESTS)
    num_seeds = 3
    settings: ClassVar[Mapping[str, Any]] = {
        **asdict(SETTINGS),
        "streams": [NUM_STREAMS, NUM_EPOCHS, NOISE, MISSING],
        "live": LIVE_STAGES,
    }
    rooms = (kit, stages)

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Walk scripted streams, or train with live measures."""
        if arm == SCRIPTED:
            return _scripted(seed)
        if arm == DEADLINE:
            return _deadline()
        if arm == LIVE:
            return _live(seed)
        return tested.run_tests(*FILES) if seed == 0 else {}

    def judge(self, results: Results, limits: Mapping[str, float]) -> list[Check]:
        """Count steps back, forced stages, and stages ended by a measure."""
        scripted = list(results[SCRIPTED].values())
        careful = fmean(each["careful_back"] for each in scripted)
        eager = fmean(each["eager_back"] for each in scripted)
        moved = sum(each["moved_without_a_measure"] for each in scripted)
        arrived = fmean(each["careful_arrived"] for each in scripted)
        forced = list(results[DEADLINE].values())
        live = list(results[LIVE].values())
        early = [bool(each["by_measure"]) for each in live]
        num = NUM_STREAMS * len(scripted)
        return [
            Check(
                name="steps back per noisy stream, with mean, patience and hysteresis",
                value=careful,
                num=num,
                need=f"<= {limits['careful_back']:g}",
                holds=careful <= limits["careful_back"],
            ),
            Check(
                name="share of these streams that arrive at the last stage",
                value=arrived,
                num=num,
                need=f">= {limits['arrived']:g}",
                holds=arrived >= limits["arrived"],
            ),
            Check(
                name="steps back per noisy stream that is believed value by value",
                value=eager,
                num=num,
                need=f">= {limits['eager_back']:g}",
                holds=eager >= limits["eager_back"],
                control=True,
            ),
            Check(
                name="moves in epochs whose measure is missing",
                value=float(moved),
                num=num,
                need="0",
                holds=moved == 0,
            ),
            Check(
                name="stages that are forced at their longest stay, and say so",
                value=float(sum(each["forced"] for each in forced)),
                num=sum(each["stages"] for each in forced),
                need="all",
                holds=all(each["forced"] == each["stages"] for each in forced),
            ),
            Check(
                name="trainings with a stage ended by its measure before its deadline",
                value=float(sum(early)),
                num=len(early),
                need="all",
                holds=all(early) and bool(early),
            ),
            tested.judge_tests({TESTS: {0: results[TESTS][0]}}, TESTS),
        ]


def _line(*, careful: bool) -> Curriculum:
    """Return three stages that ask for 0.8 and go back below it."""
    advance, regress = "m >= 0.8", "m < 0.8"
    if careful:
        advance, regress = "m >= 0.8 for 3", "m < 0.7 for 3"
    stage_of = {
        "advance": parse_condition(advance),
        "regress": parse_condition(regress),
    }
    return Curriculum(
        [
            Dimension(
                name="line",
                stages=(
                    Stage(name="first", advance=stage_of["advance"]),
                    Stage(name="second", **stage_of),
                    Stage(name="third", regress=stage_of["regress"]),
                ),
                smoothing=0.5 if careful else 0.0,
                hysteresis=0.03 if careful else 0.0,
            )
        ]
    )


def _scripted(seed: int) -> dict[str, float]:
    """Walk noisy streams that rise from .6 to .9 within half of their epochs."""
    lot = np.random.default_rng(seed)
    level = 0.6 + 0.3 * np.minimum(1.0, np.arange(NUM_EPOCHS) / (NUM_EPOCHS / 2))
    back = {True: 0, False: 0}
    moved = arrived = 0
    for _ in range(NUM_STREAMS):
        values = level + lot.normal(0.0, NOISE, NUM_EPOCHS)
        values[lot.random(NUM_EPOCHS) < MISSING] = math.nan
        for careful in (True, False):
            line = _line(careful=careful)
            for epoch, value in enumerate(values):
                changes = line.observe(epoch, {"m": float(value)})
                back[careful] += sum(_is_back(change) for change in changes)
                moved += len(changes) if math.isnan(value) else 0
            now = line.stage("line")
            arrived += careful and now is not None and now.name == "third"
    return {
        "careful_back": back[True] / NUM_STREAMS,
        "eager_back": back[False] / NUM_STREAMS,
        "careful_arrived": arrived / NUM_STREAMS,
        "moved_without_a_measure": moved,
    }


def _is_back(change: Transition) -> bool:
    order = ("first", "second", "third")
    return order.index(change.after) < order.index(change.before)


def _deadline() -> dict[str, int]:
    """Walk the live stages under a measure that never gets there."""
    curriculum = stages.stages(LIVE_STAGES, SETTINGS)
    for epoch in range(SETTINGS.num_epochs):
        curriculum.observe(epoch, {"stage_loss": 9.0})
    forced = [
        change.forced and f"after {LONGEST} epochs" in change.because
        for change in curriculum.history
    ]
    return {
        "forced": sum(forced),
        "stages": len(curriculum.dimensions["mode"].stages) - 1,
    }


def _live(seed: int) -> dict[str, Any]:
    """Train; measure the stage in force and the final stage after every epoch."""
    final_mixture = SETTINGS.mixture()
    sets = {
        (size, mode, Kind.LATIN): kit.squares(size, mode, Split.VALIDATION)
        for size in final_mixture.sizes
        for mode in final_mixture.modes
    }
    rows: list[dict[str, float]] = []

    def observe(done: kit.Trained, epoch: int) -> dict[str, float]:
        now = mixture_in_force(final_mixture, done.curriculum)
        measures = {}
        for name, mixture in (("stage_loss", now), ("validation_loss", final_mixture)):
            batch = draw_batch(sets, mixture, seed=10**6, step=0)
            measures[name] = kit.tell_batch(done, batch).excess
        rows.append({"epoch": epoch, **measures})
        return measures

    curriculum = stages.stages(LIVE_STAGES, SETTINGS)
    done = kit.train(SETTINGS, seed, curriculum=curriculum, observe=observe)
    history = done.curriculum.history
    return {
        "by_measure": sum(not change.forced for change in history),
        "stages": [str(change) for change in history],
        "measures": rows,
    }
