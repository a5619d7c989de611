"""`castwise train kenken --dry-run`: what a step of the run will hold, without a run.

No folder is made and no weight is updated. Batches differ in size, in cages and in the
ways that clues can be satisfied, so some are drawn from a few puzzles made on the spot,
and the largest of each size is walked through; the table shows what holds most.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from castwise.errors import SettingsError
from castwise.memory.estimate import Estimate, estimate
from castwise.memory.estimate_table import show_estimate, shown_bytes
from castwise.memory.lifetimes import tensors_within
from castwise.memory.recompute import recompute
from castwise.policy import Policy
from castwise.recipes.average_choice import average_copies
from castwise.recipes.device_choice import choose_device
from castwise.recipes.kenken.batches import PuzzleBatch, draw_batch
from castwise.recipes.kenken.model import (
    KenKenModel,
    completion_loss,
    model_settings,
)
from castwise.recipes.kenken.recipe import DEFAULT_OPTIMIZER, DEFAULT_PRECISION
from castwise.recipes.kenken.settings import KenKenSettings, settings_of
from castwise.recipes.kenken.supply import open_supply
from castwise.recipes.kenken.task import mixture_of
from castwise.recipes.optimizer_choice import (
    OptimizerChoice,
    build_optimizer,
    decay_groups,
)
from castwise.recipes.precision_choice import PrecisionChoice

_NUM_PUZZLES = 128  # of each kind: enough to meet large cages
_NUM_BATCHES = 8  # of each size


def dry_run(
    *,
    preset: str | None,
    changes: Mapping[str, Any],
    choice: PrecisionChoice,
    optimizer: OptimizerChoice,
    device: str,
    recomputed: bool = False,
    in_phases: bool = False,
) -> int:
    """Print the estimate; return the exit code.

    Args:
        preset: Name of the settings to start from; None for `small`.
        changes: Settings given on the command line, by name.
        choice: The precision flags.
        optimizer: The optimizer flags.
        device: auto, cpu, cuda or cuda:N.
        recomputed: Whether blocks are run again in the backward. Default: false.
        in_phases: Whether --hybrid was given. Default: false.

    Raises:
        CastwiseError: For every mistake in a flag.
    """
    if in_phases:
        raise SettingsError(
            "--dry-run tells of plain steps, and --hybrid keeps trials and predictors "
            "besides; leave one of them out."
        )
    console = Console()
    settings = settings_of(preset or "small", changes)
    policy = choice.policy(otherwise=DEFAULT_PRECISION).value
    name = optimizer.decide(otherwise=DEFAULT_OPTIMIZER).value
    where = choose_device(device).value
    told = {
        size: estimate_run(settings, policy, name, batch, where, recomputed=recomputed)
        for size, batch in largest_batches(settings).items()
    }
    fullest = max(told, key=lambda size: told[size].peak_bytes)
    show_estimate(told[fullest], console, depth=1)
    for size, each in told.items():
        line = f"batches of size {size}: peak {shown_bytes(each.peak_bytes)}"
        shown = " (shown above)" if size == fullest else ""
        console.print(f"{line}{shown}", highlight=False)
    return 0


def estimate_run(
    settings: KenKenSettings,
    policy: Policy,
    optimizer: str,
    batch: PuzzleBatch,
    device: torch.device,
    *,
    recomputed: bool = False,
) -> Estimate:
    """Return what a step of the run holds on one batch.

    Args:
        settings: Of the run.
        policy: The precision asked for.
        optimizer: Its name in `recipes.optimizer_choice`.
        batch: Puzzles of one size.
        device: Whose kernels are followed.
        recomputed: Whether blocks are run again in the backward. Default: false.
    """
    with torch.device("meta"):
        model = KenKenModel(model_settings(settings.model))

    num_parameters = sum(weight.numel() for weight in model.parameters())
    averages = {"averaged weights": 4 * num_parameters * average_copies(settings)}
    return estimate(
        model,
        (batch.tokens, batch.alphabet, batch.relations, batch),
        completion_loss,
        policy,
        optimizer=build_optimizer(
            optimizer,
            decay_groups(model, settings.weight_decay),
            lr=settings.learning_rate,
            betas=settings.betas,
        ),
        device=device,
        recompute=recompute if recomputed and not model.settings.recompute else (),
        beside=averages if average_copies(settings) else None,
    )


def largest_batches(settings: KenKenSettings) -> dict[int, PuzzleBatch]:
    """Draw some batches of each size, and keep the largest of each."""
    few = replace(
        settings,
        num_train=min(settings.num_train, _NUM_PUZZLES),
        num_validation=1,
        num_quick=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        supply = open_supply(few, Path(folder), progress=_quiet)
        mixture = mixture_of(few)
        found = {}
        for size in settings.sizes:
            alone = replace(mixture, sizes=(size,), size_shares=(1.0,))
            drawn = [
                draw_batch(supply.train, alone, seed=settings.seed, step=step)
                for step in range(_NUM_BATCHES)
            ]
            found[size] = max(drawn, key=_num_bytes)
    return found


def _num_bytes(batch: PuzzleBatch) -> int:
    return sum(each.numel() * each.itemsize for each in tensors_within(batch))


def _quiet(*_: Any) -> None:
    """Tell nobody of progress; it takes a second."""
