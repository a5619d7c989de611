"""A1: bf16 trains as fp16 does, and both as fp32 does.

Two one-sided tests on paired seeds ask whether the difference is small, which is not
the same as failing to find one. The control trains fp16 under a loss scale that is far
too small: its gradients vanish, and the same tests must not call it equivalent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from statistics import fmean
from typing import Any, ClassVar, final

import torch

import castwise as cw
from castwise.loss_scale import StaticScale
from castwise.recipes.kenken.alphabets import Mode
from castwise.recipes.kenken.batches import draw_batch
from experiments import kit
from experiments.contract import Check, Experiment, Results
from experiments.statistics import paired

SETTINGS = kit.KitSettings(width=32, num_layers=2, cells_per_step=512, num_steps=300)
PRESETS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
CONTROL = "fp16, scale far too small"
TINY_SCALE = 2.0**-14
PAIRS = (("bf16", "fp16"), ("bf16", "fp32"), ("fp16", "fp32"))


@final
class Formats(Experiment):
    """Three formats and a control, the same seeds and batches."""

    name = "A1"
    question = "Do bf16, fp16 and fp32 learn the same?"
    arms = (*PRESETS, CONTROL)
    num_seeds = 10
    settings: ClassVar[Mapping[str, Any]] = {**asdict(SETTINGS), "tiny": TINY_SCALE}
    shows: ClassVar[Mapping[str, str]] = {
        "excess": "nats above the floor",
        "accuracy": "hidden cells right",
        "skipped": "steps skipped",
    }
    rooms = (kit,)

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Train one format; measure it in that format."""
        scale = StaticScale(TINY_SCALE) if arm == CONTROL else None
        policy = cw.preset(PRESETS.get(arm, "16-mixed"))
        done = kit.train(SETTINGS, seed, policy=policy, loss_scale=scale)
        told = [kit.tell(done, 4, mode) for mode in Mode]
        states = {
            str(value.dtype)
            for state in done.run.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.dim()
        }
        weights = {str(weight.dtype) for weight in done.model.parameters()}
        return {
            "excess": fmean(each.excess for each in told),
            "accuracy": fmean(each.accuracy for each in told),
            "skipped": done.run.num_skipped,
            "masters_and_moments": sorted(states | weights),
            "loss_scale": type(done.run.loss_scale).__name__,
            **_overflow(done),
        }

    def judge(self, results: Results, limits: Mapping[str, float]) -> list[Check]:
        """Ask for equivalence within the limits, and for the control to fail it."""
        checks = []
        for value, within in (("excess", "nats"), ("accuracy", "share of cells")):
            limit = limits[value]
            for first, second in (*PAIRS, (CONTROL, "fp32")):
                apart = paired(results, first, second, value)
                low, high = apart.narrow
                same = -limit <= low and high <= limit
                control = first == CONTROL
                checks.append(
                    Check(
                        name=f"{value} ({within}), {first} minus {second}",
                        value=apart.value,
                        interval=apart.interval,
                        num=apart.num,
                        need=f"{'no ' if control else ''}90 % interval within "
                        f"+-{limit:g}",
                        holds=same is not control,
                        control=control,
                    )
                )
        every = [v for arm in PRESETS for v in results[arm].values()]
        exact = [v["masters_and_moments"] == ["torch.float32"] for v in every]
        scales = [
            (results[arm][seed]["loss_scale"] == "NoScale") is (arm != "fp16")
            for arm in PRESETS
            for seed in results[arm]
        ]
        overflow = [
            v["skips_overflow"] is (arm == "fp16")
            and v["scale_after"] == (0.5 if arm == "fp16" else 1.0)
            for arm in PRESETS
            for v in results[arm].values()
        ]
        return [
            *checks,
            _all("runs whose weights and moments are fp32", exact),
            _all("runs in which only fp16 has a loss scale", scales),
            _all("planted overflows that fp16 alone skips, halving", overflow),
        ]


def _overflow(done: kit.Trained) -> dict[str, Any]:
    """Plant one overflow: a loss whose gradients leave fp16 and stay within bf16."""
    mixture = SETTINGS.mixture()
    batch = draw_batch(kit.training_sets(mixture), mixture, seed=0, step=10**6)
    before = done.run.loss_scale.scale
    with done.run.step() as step:
        step.backward(kit.cell_loss(done.model, batch) * 1e12)
    return {
        "skips_overflow": isinstance(step.outcome, cw.Skipped),
        "scale_after": done.run.loss_scale.scale / before,
    }


def _all(name: str, cases: list[bool]) -> Check:
    return Check(
        name=name,
        value=float(sum(cases)),
        num=len(cases),
        need="all",
        holds=all(cases) and bool(cases),
    )
