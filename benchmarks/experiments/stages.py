"""The curricula that are compared, all of them as the recipe reads them from a file."""

from __future__ import annotations

from dataclasses import replace

from castwise.recipes.kenken.curricula import default_text, parse_curriculum
from castwise.recipes.kenken.settings import PRESETS, KenKenSettings
from castwise.training.curriculum import Curriculum
from experiments.kit import KitSettings
from experiments.puzzle_kit import PuzzleSettings

Budget = KitSettings | PuzzleSettings
"""A training that has sizes, modes and epochs."""

SEED_MODES = """
castwise: 1
dimensions:
  mode:
    stages:
    - {name: standard, modes: {standard: 1}, max_epochs: 15}
    - {name: with zero, modes: {standard: 1, zero: 1}, max_epochs: 9}
    - {name: all, modes: {standard: 2, zero: 1, negative: 1}}
"""
"""Half, three and two tenths of 30 epochs: what the first description asked for."""

SEED_FILLS = """
castwise: 1
dimensions:
  fill:
    stages:
    - {name: high, reveal: [0.5, 0.7], max_epochs: 8}
    - {name: medium, reveal: [0.3, 0.5], max_epochs: 7}
    - {name: low, reveal: [0.1, 0.3], max_epochs: 8}
    - {name: minimal, reveal: [0.0, 0.1]}
"""
"""Four quarters of 30 epochs that share nothing."""


def run_settings(kit: Budget) -> KenKenSettings:
    """Return the settings of a recipe run that has the sizes, modes and epochs."""
    return replace(
        PRESETS["tiny"],
        sizes=kit.sizes,
        size_shares=(1 / len(kit.sizes),) * len(kit.sizes),
        modes=kit.modes,
        mode_shares=(1 / len(kit.modes),) * len(kit.modes),
        num_steps=kit.num_epochs,
        evaluate_every=1,
        num_warmup=0,
    )


def default_stages(kit: Budget, *dimensions: str) -> Curriculum:
    """Return the recipe's own stages along some dimensions."""
    settings = run_settings(kit)
    return parse_curriculum(default_text(settings), settings, enabled=dimensions)


def stages(text: str, kit: Budget) -> Curriculum:
    """Return the stages of a text."""
    return parse_curriculum(text, run_settings(kit))


def last_stage_share(kit: Budget, curriculum: Curriculum, dimension: str) -> float:
    """Return the share of a run that is left when all earlier stages lasted longest."""
    earlier = curriculum.dimensions[dimension].stages[:-1]
    return 1.0 - sum(stage.max_epochs or 0 for stage in earlier) / kit.num_epochs
