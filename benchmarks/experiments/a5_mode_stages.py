"""A5: what a curriculum over alphabets does for NEGATIVE, the last one to come.

default                     the recipe's own stages, each ended by its longest stay
equal exposure              the last stage alone: as many steps with NEGATIVE in them
all from the start          as many steps in all, no stages
first description           50, 30 and 20 % of the steps, a cosine that ends at a tenth
first description, late     the same stages under the recipe's learning rate
mode not told               all from the start, without the mode as an input
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, ClassVar, final

from castwise.recipes.kenken.alphabets import Mode
from experiments import kit, stages
from experiments.contract import Check, Experiment, Results
from experiments.statistics import over_seeds, paired

SETTINGS = kit.KitSettings(num_steps=450)
DEFAULT, EXPOSURE, FROM_START = "default", "equal exposure", "all from the start"
SEED, SEED_LATE = "first description", "first description, late decay"
BLIND = "mode not told"


@final
class ModeStages(Experiment):
    """The default stages between two controls, and what was first asked for."""

    name = "A5"
    question = "What does a curriculum over alphabets do for NEGATIVE?"
    arms = (DEFAULT, EXPOSURE, FROM_START, SEED, SEED_LATE, BLIND)
    num_seeds = 12
    settings: ClassVar[Mapping[str, Any]] = {
        **asdict(SETTINGS),
        "seed_modes": stages.SEED_MODES,
    }
    rooms = (kit, stages)

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Train one arm; measure NEGATIVE and STANDARD from the empty grid."""
        settings, curriculum = _arm(arm)
        done = kit.train(settings, seed, curriculum=curriculum)
        return {
            "num_steps": settings.num_steps,
            "stages": [str(change) for change in done.curriculum.history],
            **kit.make_from_nothing(done, 4, Mode.NEGATIVE).values("negative"),
            **kit.make_from_nothing(done, 4, Mode.STANDARD).values("standard"),
            **kit.tell(done, 4, Mode.NEGATIVE).values("negative"),
            **kit.tell(done, 4, Mode.STANDARD).values("standard"),
        }

    def judge(self, results: Results, limits: Mapping[str, float]) -> list[Check]:
        """Hold the default between its controls; show the first description."""
        valid, excess = "valid_negative", "excess_negative"
        gain = paired(results, DEFAULT, EXPOSURE, valid)
        loss = paired(results, DEFAULT, FROM_START, valid)
        nats = paired(results, DEFAULT, FROM_START, excess)
        hurt = paired(results, SEED, FROM_START, valid)
        late = paired(results, SEED_LATE, FROM_START, valid)
        blind = over_seeds(results, BLIND, valid)
        least, most = limits["gain_over_equal_exposure"], limits["loss_of_valid"]
        nat, hurts = limits["loss_of_nats"], limits["first_description_loses"]
        return [
            Check(
                name=f"valid NEGATIVE, {DEFAULT} minus {EXPOSURE}",
                value=gain.value,
                interval=gain.interval,
                num=gain.num,
                need=f"interval above 0 and mean >= {least:g}",
                holds=gain.interval[0] > 0 and gain.value >= least,
            ),
            Check(
                name=f"valid NEGATIVE, {DEFAULT} minus {FROM_START}",
                value=loss.value,
                interval=loss.interval,
                num=loss.num,
                need=f"90 % interval above -{most:g}",
                holds=loss.narrow[0] > -most,
            ),
            Check(
                name=f"nats of NEGATIVE, {DEFAULT} minus {FROM_START}",
                value=nats.value,
                interval=nats.interval,
                num=nats.num,
                need=f"90 % interval below {nat:g}",
                holds=nats.narrow[1] < nat,
            ),
            Check(
                name=f"valid NEGATIVE, {SEED} minus {FROM_START}",
                value=hurt.value,
                interval=hurt.interval,
                num=hurt.num,
                need=f"interval below -{hurts:g}: it hurts",
                holds=hurt.interval[1] < -hurts,
                control=True,
            ),
            Check(
                name=f"valid NEGATIVE, {SEED_LATE} minus {FROM_START}",
                value=late.value,
                interval=late.interval,
                num=late.num,
                need="interval below 0: the stages hurt by themselves",
                holds=late.interval[1] < 0,
                control=True,
            ),
            Check(
                name=f"valid NEGATIVE, {BLIND}",
                value=blind.value,
                interval=blind.interval,
                num=blind.num,
                need=f"interval below {limits['mode_not_told']:g}",
                holds=blind.interval[1] < limits["mode_not_told"],
                control=True,
            ),
        ]


def _arm(arm: str) -> tuple[kit.KitSettings, Any]:
    """Return settings and stages of one arm."""
    if arm == DEFAULT:
        return SETTINGS, stages.default_stages(SETTINGS, "mode")
    if arm == EXPOSURE:
        walked = stages.default_stages(SETTINGS, "mode")
        share = stages.last_stage_share(SETTINGS, walked, "mode")
        return replace(SETTINGS, num_steps=round(share * SETTINGS.num_steps)), None
    if arm == SEED:
        changed = replace(SETTINGS, decay="cosine")
        return changed, stages.stages(stages.SEED_MODES, SETTINGS)
    if arm == SEED_LATE:
        return SETTINGS, stages.stages(stages.SEED_MODES, SETTINGS)
    return replace(SETTINGS, sees_mode=arm != BLIND), None
