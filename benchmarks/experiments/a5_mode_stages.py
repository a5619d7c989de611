"""A5: what a curriculum over alphabets does for NEGATIVE, the last one to come.

With the recipe's own model on KenKen puzzles, share solved from the empty grid:

default                     the recipe's own stages, each ended by its longest stay
equal exposure              the last stage alone: as many steps with NEGATIVE in them
all from the start          as many steps in all, no stages
first description           50, 30 and 20 % of the steps: STANDARD, ZERO, NEGATIVE

With a model that has to learn what an alphabet is (`kit`), squares made from nothing:

squares, default            the recipe's own stages
squares, all from the start
squares, first description  its stages, under a cosine that ends at a tenth
squares, late decay         its stages, under the learning rate of the others
squares, mode not told      all from the start, without the mode as an input
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, ClassVar, final

from castwise.recipes.kenken.alphabets import Mode
from castwise.training.curriculum import Curriculum
from experiments import kit, puzzle_kit, stages
from experiments.contract import Check, Experiment, Results, Trial
from experiments.statistics import Estimate, over_seeds, paired

PUZZLES = puzzle_kit.PuzzleSettings(num_steps=30)
SETTINGS = kit.KitSettings(num_steps=450)
DEFAULT, EXPOSURE, FROM_START, SEED = (
    "default",
    "equal exposure",
    "all from the start",
    "first description",
)
SQUARES = "squares, "
NUM_FEW = 6  # seeds of arms that are shown, or ten times their spread away
LATE, BLIND = f"{SQUARES}late decay", f"{SQUARES}mode not told"


@final
class ModeStages(Experiment):
    """The default stages between two controls, and what was first asked for."""

    name = "A5"
    question = "What does a curriculum over alphabets do for NEGATIVE?"
    arms = (
        *(DEFAULT, EXPOSURE, FROM_START, SEED),
        *(f"{SQUARES}{arm}" for arm in (DEFAULT, FROM_START, SEED)),
        *(LATE, BLIND),
    )
    num_seeds = 20
    first_seed = 20
    settings: ClassVar[Mapping[str, Any]] = {
        "puzzles": asdict(PUZZLES),
        "squares": asdict(SETTINGS),
        "seed_modes": stages.SEED_MODES,
        "seeds_of_controls": NUM_FEW,
    }
    shows: ClassVar[Mapping[str, str]] = {
        "num_steps": "steps",
        "negative": "NEGATIVE solved, or valid from nothing",
        "nats": "nats per hidden cell, above the floor",
    }
    rooms = (kit, puzzle_kit, stages)

    def trials(self, num_seeds: int | None = None) -> list[Trial]:
        """List what has to run: all seeds for what is judged between them."""
        judged = (DEFAULT, EXPOSURE, FROM_START)
        return [
            trial
            for trial in super().trials(num_seeds)
            if trial.arm in judged or trial.seed < self.first_seed + NUM_FEW
        ]

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Train one arm; measure NEGATIVE from the empty grid."""
        if arm.startswith(SQUARES):
            return _squares(arm, seed)
        settings, curriculum = _puzzle_arm(arm)
        model = puzzle_kit.train(settings, seed, curriculum)
        rate, nats = puzzle_kit.solved(model, settings.sizes, Mode.NEGATIVE)
        return {
            "num_steps": settings.num_steps,
            "negative": rate.value,
            "counts": [rate.hits, rate.num],
            "nats": nats,
        }

    def judge(self, results: Results, limits: Mapping[str, float]) -> list[Check]:
        """Hold the default between its controls; show the first description."""
        gain = paired(results, DEFAULT, EXPOSURE, "negative")
        loss = paired(results, DEFAULT, FROM_START, "negative")
        nats = paired(results, DEFAULT, FROM_START, "nats")
        told = f"{SQUARES}{FROM_START}"
        better = paired(results, f"{SQUARES}{DEFAULT}", f"{SQUARES}{SEED}", "negative")
        price = paired(results, f"{SQUARES}{DEFAULT}", told, "negative")
        hurt = paired(results, f"{SQUARES}{SEED}", told, "negative")
        late = paired(results, LATE, told, "negative")
        also = paired(results, SEED, FROM_START, "negative")
        blind = over_seeds(results, BLIND, "negative")
        least, most = limits["gain_over_equal_exposure"], limits["loss_of_solved"]
        return [
            _check(
                f"NEGATIVE solved, {DEFAULT} minus {EXPOSURE}",
                gain,
                need=f"interval above 0 and mean >= {least:g}",
                holds=gain.interval[0] > 0 and gain.value >= least,
            ),
            _check(
                f"NEGATIVE solved, {DEFAULT} minus {FROM_START}",
                loss,
                need=f"90 % interval above -{most:g}",
                holds=loss.narrow[0] > -most,
            ),
            _check(
                f"nats of NEGATIVE, {DEFAULT} minus {FROM_START}",
                nats,
                need="shown, not judged",
                holds=True,
            ),
            _check(
                f"NEGATIVE solved, {SEED} minus {FROM_START}",
                also,
                need="shown, not judged",
                holds=True,
            ),
            _check(
                f"squares: valid NEGATIVE, {SEED} minus {FROM_START}",
                hurt,
                need=f"interval below -{limits['first_description_loses']:g}: it hurts",
                holds=hurt.interval[1] < -limits["first_description_loses"],
                control=True,
            ),
            _check(
                f"squares: valid NEGATIVE, {SEED} with late decay minus {FROM_START}",
                late,
                need="interval below 0: the stages hurt by themselves",
                holds=late.interval[1] < 0,
                control=True,
            ),
            _check(
                f"squares: valid NEGATIVE, {DEFAULT} minus {SEED}",
                better,
                need="interval above 0",
                holds=better.interval[0] > 0,
            ),
            _check(
                f"squares: valid NEGATIVE, {DEFAULT} minus {FROM_START}",
                price,
                need="shown, not judged",
                holds=True,
            ),
            _check(
                f"valid NEGATIVE, {BLIND}",
                blind,
                need=f"interval below {limits['mode_not_told']:g}",
                holds=blind.interval[1] < limits["mode_not_told"],
                control=True,
            ),
        ]


def _check(
    name: str, found: Estimate, *, need: str, holds: bool, control: bool = False
) -> Check:
    return Check(
        name=name,
        value=found.value,
        interval=found.interval,
        num=found.num,
        need=need,
        holds=holds,
        control=control,
    )


def _puzzle_arm(arm: str) -> tuple[puzzle_kit.PuzzleSettings, Curriculum | None]:
    """Return settings and stages of one arm on puzzles."""
    if arm == DEFAULT:
        return PUZZLES, stages.default_stages(PUZZLES, "mode")
    if arm == SEED:
        return PUZZLES, stages.stages(stages.SEED_MODES, PUZZLES)
    if arm == EXPOSURE:
        walked = stages.default_stages(PUZZLES, "mode")
        share = stages.last_stage_share(PUZZLES, walked, "mode")
        return replace(PUZZLES, num_steps=round(share * PUZZLES.num_steps)), None
    return PUZZLES, None


def _squares(arm: str, seed: int) -> dict[str, Any]:
    """Train one arm on squares; make squares from nothing."""
    settings, curriculum = replace(SETTINGS, sees_mode=arm != BLIND), None
    if arm == f"{SQUARES}{DEFAULT}":
        curriculum = stages.default_stages(SETTINGS, "mode")
    elif arm in {f"{SQUARES}{SEED}", LATE}:
        curriculum = stages.stages(stages.SEED_MODES, SETTINGS)
        settings = replace(settings, decay="late" if arm == LATE else "cosine")
    done = kit.train(settings, seed, curriculum=curriculum)
    made = kit.make_from_nothing(done, 4, Mode.NEGATIVE)
    return {
        "num_steps": settings.num_steps,
        "negative": made.valid.value,
        "counts": [made.valid.hits, made.valid.num],
        "nats": kit.tell(done, 4, Mode.NEGATIVE).excess,
        "stages": [str(change) for change in done.curriculum.history],
    }
