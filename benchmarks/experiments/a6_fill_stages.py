"""A6: what a curriculum over fills does for squares made from nothing.

default                 the recipe's own stages: the lower bound falls, the upper stays
target only             what the run is after and nothing else: 0 to 10 % shown
uniform                 any share shown, no stages
first description       four quarters that share nothing, from 50-70 % down to 0-10 %
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, ClassVar, final

from castwise.recipes.kenken.alphabets import Mode
from castwise.recipes.kenken.batches import Fill
from experiments import kit, stages
from experiments.contract import Check, Experiment, Results
from experiments.statistics import paired

SETTINGS = kit.KitSettings(num_steps=900, modes=("standard",))
TARGET_FILLS = (Fill(empty_share=0.0, reveal=(0.0, 0.1)),)
DEFAULT, TARGET, UNIFORM, SEED = (
    "default",
    "target only",
    "uniform",
    "first description",
)


@final
class FillStages(Experiment):
    """The default stages between target only and uniform."""

    name = "A6"
    question = "What does a curriculum over fills do for squares made from nothing?"
    arms = (DEFAULT, TARGET, UNIFORM, SEED)
    num_seeds = 10
    first_seed = 20
    settings: ClassVar[Mapping[str, Any]] = {
        **asdict(SETTINGS),
        "target": [asdict(fill) for fill in TARGET_FILLS],
        "seed_fills": stages.SEED_FILLS,
    }
    shows: ClassVar[Mapping[str, str]] = {
        "valid_made": "valid from nothing",
        "distinct_made": "different valid squares",
        "excess_any_fill": "nats above the floor, any fill",
    }
    rooms = (kit, stages)

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Train one arm; make squares from nothing, and measure under any fill."""
        settings, curriculum = SETTINGS, None
        if arm == DEFAULT:
            curriculum = stages.default_stages(SETTINGS, "fill")
        elif arm == SEED:
            curriculum = stages.stages(stages.SEED_FILLS, SETTINGS)
        elif arm == TARGET:
            settings = replace(SETTINGS, fills=TARGET_FILLS)
        done = kit.train(settings, seed, curriculum=curriculum)
        return {
            "stages": [str(change) for change in done.curriculum.history],
            **kit.make_from_nothing(done, 4, Mode.STANDARD).values("made"),
            **kit.tell(done, 4, Mode.STANDARD).values("any_fill"),
        }

    def judge(self, results: Results, limits: Mapping[str, float]) -> list[Check]:
        """Hold the default against both ends; keep an eye on variety."""
        gain = paired(results, DEFAULT, TARGET, "valid_made")
        loss = paired(results, DEFAULT, UNIFORM, "valid_made")
        seed = paired(results, SEED, UNIFORM, "valid_made")
        share = limits["distinct"]
        kept = paired(results, DEFAULT, UNIFORM, "distinct_made", share=share)
        least, most = limits["gain_over_target_only"], limits["loss_to_uniform"]
        return [
            Check(
                name=f"valid from nothing, {DEFAULT} minus {TARGET}",
                value=gain.value,
                interval=gain.interval,
                num=gain.num,
                need=f"interval above {least:g}",
                holds=gain.interval[0] > least,
            ),
            Check(
                name=f"valid from nothing, {DEFAULT} minus {UNIFORM}",
                value=loss.value,
                interval=loss.interval,
                num=loss.num,
                need=f"90 % interval above -{most:g}",
                holds=loss.narrow[0] > -most,
            ),
            Check(
                name=f"different valid squares, {DEFAULT} minus {share:g} of {UNIFORM}",
                value=kept.value,
                interval=kept.interval,
                num=kept.num,
                need="90 % interval above 0",
                holds=kept.narrow[0] > 0,
            ),
            Check(
                name=f"valid from nothing, {SEED} minus {UNIFORM}",
                value=seed.value,
                interval=seed.interval,
                num=seed.num,
                need="shown, not judged",
                holds=True,
            ),
        ]
