"""A9: with stages along all three dimensions, training reaches what is possible.

squares   sizes 3 to 5 in three alphabets, all default stages: how far the model is from
          the exact posterior, and how many squares it makes from nothing
recipe    `castwise train kenken --size-curriculum --mode-curriculum --fill-curriculum`,
          its checkpoint measured in the same way on squares, and on puzzles
floor     what the first description hoped for, 0.09, lies below the least loss that
          its label smoothing permits, and `castwise lint` refuses it
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch

from castwise.recipes.kenken import posterior
from castwise.recipes.kenken.alphabets import VOCABULARY_SIZE, Mode
from castwise.recipes.kenken.evaluation import evaluation_batch
from castwise.recipes.kenken.puzzle_set import Split
from castwise.recipes.kenken.solver import load_solver
from castwise.recipes.kenken.solving import newest_checkpoint
from castwise.training.journal import read_journal
from experiments import kit, stages
from experiments.contract import Check, Experiment, Results

SETTINGS = kit.KitSettings(sizes=(3, 4, 5), num_steps=6000, num_epochs=30)
SQUARES, RECIPE, FLOOR = "squares", "recipe", "floor"
RECIPE_FLAGS = (
    *("--preset", "small", "--sizes", "3,4,5", "--steps", "500"),
    *("--evaluate-every", "50", "--dtype", "bf16", "--threads", "1"),
    *("--size-curriculum", "--mode-curriculum", "--fill-curriculum"),
)
SMOOTHING, HOPED = 0.1, 0.09
MEASURED = {4: 512, 5: 256}


@final
class FullCurriculum(Experiment):
    """All dimensions at once, against the exact posterior."""

    name = "A9"
    question = "Does training with all stages reach what is possible?"
    arms = (SQUARES, RECIPE, FLOOR)
    num_seeds = 3
    first_seed = 20
    settings: ClassVar[Mapping[str, Any]] = {
        **asdict(SETTINGS),
        "flags": list(RECIPE_FLAGS),
    }
    shows: ClassVar[Mapping[str, str]] = {
        f"excess_{size}_{mode}": f"nats, {size} x {size} {mode}"
        for size in MEASURED
        for mode in ("standard", "zero", "negative")
    }
    rooms = (kit, stages)

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Train and measure one arm."""
        if arm == SQUARES:
            return _squares(seed)
        if arm == RECIPE:
            return _recipe(seed)
        return _floor() if seed == self.first_seed else {}

    def judge(self, results: Results, limits: Mapping[str, float]) -> list[Check]:
        """Ask every seed and mode for the target."""
        checks = []
        for arm in (SQUARES, RECIPE):
            for size in MEASURED:
                worst = [
                    max(values[f"excess_{size}_{mode}"] for mode in Mode)
                    for values in results[arm].values()
                ]
                limit = limits[f"excess_{size}"]
                checks.append(
                    Check(
                        name=f"{arm}: nats above the floor at {size} x {size}, worst "
                        "mode and seed",
                        value=max(worst),
                        num=len(worst) * len(Mode),
                        need=f"<= {limit:g}",
                        holds=max(worst) <= limit,
                    )
                )
        made = [values["valid_made_4_negative"] for values in results[SQUARES].values()]
        floor = results[FLOOR][self.first_seed]
        return [
            *checks,
            Check(
                name="squares: valid NEGATIVE from nothing at 4 x 4, worst seed",
                value=min(made),
                num=len(made),
                need=f">= {limits['valid_negative']:g}",
                holds=min(made) >= limits["valid_negative"],
            ),
            Check(
                name=f"least loss under label smoothing {SMOOTHING:g} of 35 tokens",
                value=floor["least"],
                num=1,
                need=f"above the hoped {HOPED:g}, and reached by an oracle",
                holds=floor["least"] > HOPED
                and math.isclose(floor["least"], floor["oracle"], abs_tol=1e-4),
            ),
            Check(
                name="exit code of castwise lint --target-loss 0.09",
                value=float(floor["exit_below"]),
                num=1,
                need="1, naming the floor",
                holds=floor["exit_below"] == 1 and floor["names_floor"],
            ),
            Check(
                name="exit code of castwise lint with a target above the floor",
                value=float(floor["exit_above"]),
                num=1,
                need="0",
                holds=floor["exit_above"] == 0,
                control=True,
            ),
        ]


def _squares(seed: int) -> dict[str, Any]:
    """Walk all default stages; measure every size and mode."""
    curriculum = stages.default_stages(SETTINGS, "size", "mode", "fill")
    done = kit.train(SETTINGS, seed, curriculum=curriculum)
    values: dict[str, Any] = {
        "stages": [f"{c.step}: {c}" for c in done.curriculum.history]
    }
    for size, num in MEASURED.items():
        for mode in Mode:
            values |= kit.tell(done, size, mode, num=num).values(f"{size}_{mode}")
        made = kit.make_from_nothing(done, size, Mode.NEGATIVE, num=500)
        values |= made.values(f"made_{size}_negative")
    return values


def _recipe(seed: int) -> dict[str, Any]:
    """Train by the command line; measure the checkpoint on squares."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "001"
        command = [sys.executable, "-m", "castwise", "train", "kenken", *RECIPE_FLAGS]
        subprocess.run(
            [*command, "--seed", str(seed), "--out", str(out)],
            check=True,
            capture_output=True,
        )
        records = read_journal(out)
        solver = load_solver(newest_checkpoint(Path(folder)))
    final_values = next(r.values for r in records if r.event == "final")
    values: dict[str, Any] = {
        "stages": [r.values["because"] for r in records if r.event == "stage"],
        "solved": float(final_values["solved"]),
    }
    for size, num in MEASURED.items():
        for mode in Mode:
            made = kit.squares(size, mode, Split.VALIDATION)
            batch = evaluation_batch(made, (0.0, 1.0), np.arange(num), seed=1)
            with torch.no_grad():
                logits = solver.predict(batch)[batch.hidden]
            chances = kit.exact_chances(batch)[batch.hidden]
            crossed = posterior.cross_entropy(chances, logits)
            excess = float((crossed - posterior.entropy(chances)).mean())
            values[f"excess_{size}_{mode}"] = excess
    return values


TARGET = """
import torch
from torch import nn

def build():
    model = nn.Linear(8, {classes})
    batch = (torch.randn(16, 8), torch.randint({classes}, (16,)))
    return model, [batch], nn.CrossEntropyLoss(label_smoothing={smoothing})
"""


def _floor() -> dict[str, Any]:
    """Compare the hoped loss with the least that smoothing permits."""
    classes = VOCABULARY_SIZE
    answers = torch.arange(classes)
    smoothed = torch.full((classes, classes), SMOOTHING / classes)
    smoothed[answers, answers] += 1 - SMOOTHING
    oracle = torch.nn.functional.cross_entropy(
        smoothed.log(), answers, label_smoothing=SMOOTHING
    )
    rest = SMOOTHING / classes
    top = 1 - SMOOTHING + rest
    least = -top * math.log(top) - (classes - 1) * rest * math.log(rest)
    lint = (sys.executable, "-m", "castwise", "lint", "--preset", "32-true")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "target.py"
        path.write_text(TARGET.format(classes=classes, smoothing=SMOOTHING))
        below, above = (
            subprocess.run(
                [*lint, f"{path}:build", "--target-loss", str(target)],
                capture_output=True,
                text=True,
                check=False,
            )
            for target in (HOPED, 1.0)
        )
    return {
        "least": least,
        "oracle": float(oracle),
        "exit_below": below.returncode,
        "names_floor": f"{least:.4f}" in below.stdout,
        "exit_above": above.returncode,
    }
