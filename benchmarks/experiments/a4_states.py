"""A4: AdamW with 8-bit moments trains as AdamW does.

Every state is in 8 bits, the small ones too. The control codes second moments by evenly
spaced numbers, as a plain 8-bit format would; it has to be found out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any, ClassVar, final

import storage_convergence
import torch

from castwise.optim import AdamW, SweepSettings
from castwise.recipes.kenken.alphabets import Mode
from castwise.recipes.kenken.batches import draw_batch
from experiments import kit
from experiments.contract import Check, Experiment, Results
from experiments.statistics import paired

SETTINGS = kit.KitSettings(num_steps=450)
FP32, EIGHT, CONTROL = "fp32 states", "8-bit states", "evenly spaced second moment"
NUM_RESUME = 12


def eight_bits(backend: str = "auto") -> kit.MakeOptimizer:
    """Return a maker of castwise's AdamW with every moment in 8 bits."""
    settings = SweepSettings(
        states="8bit",
        min_8bit_size=0,
        check_finite=False,
        backend=backend,  # type: ignore[arg-type]
    )

    def make(parameters: Any, rate: float) -> torch.optim.Optimizer:
        return AdamW(
            parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01, settings=settings
        )

    return make


@final
class States(Experiment):
    """fp32 moments, 8-bit moments, and a code that must fail."""

    name = "A4"
    question = "Does AdamW with 8-bit moments train as AdamW does?"
    arms = (FP32, EIGHT, CONTROL)
    num_seeds = 6
    settings: ClassVar[Mapping[str, Any]] = {**asdict(SETTINGS), "resume": NUM_RESUME}
    shows: ClassVar[Mapping[str, str]] = {
        "excess": "nats above the floor",
        "accuracy": "hidden cells right",
        "state_bytes": "bytes of state per weight",
    }
    rooms = (kit,)

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Train one arm; weigh its states; cut a few steps in two."""
        make = {FP32: kit.plain_adamw, EIGHT: eight_bits()}.get(arm, eight_bits("twin"))
        control = storage_convergence.evenly_spaced()
        with control if arm == CONTROL else nullcontext():
            done = kit.train(SETTINGS, seed, make_optimizer=make)
        told = [kit.tell(done, 4, mode) for mode in Mode]
        finite = all(map(math.isfinite, done.losses))
        weights = sum(p.numel() for p in done.model.parameters())
        values = {
            "excess": fmean(each.excess for each in told),
            "accuracy": fmean(each.accuracy for each in told),
            "finite": finite and done.run.num_skipped == 0,
            "highest_late_loss": max(done.losses[SETTINGS.num_steps // 2 :]),
            "state_bytes": _state_bytes(done.run.optimizer) / weights,
        }
        if arm == EIGHT:
            values["resumed_apart"] = _resumed_apart(seed)
        return values

    def judge(self, results: Results, limits: Mapping[str, float]) -> list[Check]:
        """Compare with fp32 states, and find the control out."""
        limit = limits["excess"]
        apart = paired(results, EIGHT, FP32, "excess")
        eight = list(results[EIGHT].values())
        control = [
            values["excess"] - results[FP32][seed]["excess"]
            for seed, values in results[CONTROL].items()
        ]
        flagged = [not math.isfinite(each) or each > limit for each in control]
        unresumed = max(values["resumed_apart"] for values in eight)
        most = max(values["state_bytes"] for values in eight)
        return [
            Check(
                name="nats per hidden cell, 8-bit minus fp32 states",
                value=apart.value,
                interval=apart.interval,
                num=apart.num,
                need=f"90 % interval within +-{limit:g}",
                holds=-limit <= apart.narrow[0] and apart.narrow[1] <= limit,
            ),
            Check(
                name="runs in which every loss and gradient was finite",
                value=float(sum(values["finite"] for values in eight)),
                num=len(eight),
                need="all",
                holds=all(values["finite"] for values in eight),
            ),
            Check(
                name="bytes of state per weight",
                value=most,
                num=len(eight),
                need=f"<= {limits['state_bytes']:g}",
                holds=most <= limits["state_bytes"],
            ),
            Check(
                name="largest difference of a weight after a resume",
                value=unresumed,
                num=len(eight),
                need="0",
                holds=unresumed == 0,
            ),
            Check(
                name=f"runs with an {CONTROL} that are found out",
                value=float(sum(flagged)),
                num=len(flagged),
                need="all",
                holds=all(flagged) and bool(flagged),
                control=True,
            ),
        ]


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Count the bytes of moments; step counters are one number each and left out."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim()
    )


def _resumed_apart(seed: int) -> float:
    """Train a few steps whole and cut in two; return the largest difference."""
    settings = replace(SETTINGS, num_steps=NUM_RESUME, num_epochs=1)
    half = kit.train(
        replace(settings, num_steps=NUM_RESUME // 2),
        seed,
        make_optimizer=eight_bits(),
    )
    again = copy.deepcopy(half.model)
    optimizer = eight_bits()(again.parameters(), settings.learning_rate)
    optimizer.load_state_dict(copy.deepcopy(half.run.optimizer.state_dict()))
    mixture = settings.mixture()
    sets = kit.training_sets(mixture)
    for number in range(NUM_RESUME // 2, NUM_RESUME):
        batch = draw_batch(sets, mixture, seed=seed, step=number)
        for model, stepping in ((half.model, half.run.optimizer), (again, optimizer)):
            stepping.zero_grad(set_to_none=True)
            kit.cell_loss(model, batch).backward()
            stepping.step()
    return max(
        float((one - other).detach().abs().max())
        for one, other in zip(half.model.parameters(), again.parameters(), strict=True)
    )
