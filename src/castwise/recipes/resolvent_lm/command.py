"""The command of this recipe: `castwise train resolvent_lm`.

This room imports no torch; the command fetches its room when it runs.
"""

from __future__ import annotations

from typing import Any

import click

from castwise.recipes.average_choice import average_options
from castwise.recipes.language.options import (
    changes_of,
    model_options,
    place_options,
    precision_of,
)
from castwise.recipes.launch_options import launch_options


@click.command("resolvent_lm")
@model_options
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="Short for --precision 32-true, 16-mixed, bf16-mixed.",
)
@click.option(
    "--hybrid",
    is_flag=False,
    flag_value="default",
    metavar="[NAME|FILE]",
    help="Train in phases: default, conservative, aggressive, or a YAML file.",
)
@click.option("--no-compile", is_flag=True, help="Never compile the blocks.")
@average_options
@place_options
@launch_options
def train(**flags: Any) -> int:
    """Train a language model that mixes tokens by resolvents, by castwise's trainer."""
    from castwise.recipes.hybrid_choice import HybridChoice
    from castwise.recipes.language.plan import Asked
    from castwise.recipes.resolvent_lm import recipe

    changes = changes_of(flags)
    if flags["no_compile"]:
        changes.setdefault("training", {})["compile"] = "no"
    return recipe.train(
        Asked(
            config=flags["config"],
            changes=changes,
            choice=precision_of(flags),
            islands=not flags["no_islands"],
        ),
        recipe.Place(
            device=flags["device"],
            out=flags["out"],
            resume=flags["resume"],
            keep_last=flags["keep_last"],
            num_threads=flags["threads"],
            data=flags["data"],
            hybrid=HybridChoice(asked=flags["hybrid"]),
            strategy=flags["strategy"],
            compress=flags["compress"],
        ),
    )
