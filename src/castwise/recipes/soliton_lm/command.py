"""The command of this recipe: `castwise train soliton_lm`.

This room imports no torch; the command fetches its room when it runs.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import click

from castwise.recipes.language.options import (
    changes_of,
    model_options,
    place_options,
    precision_of,
)
from castwise.recipes.launch_options import compress_option


@click.command("soliton_lm")
@model_options
@click.option("--no-compile", is_flag=True, help="Never compile the blocks.")
@place_options
@click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)
@click.option(
    "--devices",
    metavar="N",
    help="How many devices, or auto.  [default: 1, or torchrun's processes]",
)
@click.option(
    "--strategy",
    default="auto",
    show_default=True,
    help="A strategy of Lightning, such as ddp; fsdp under torchrun.",
)
@compress_option
def train(**flags: Any) -> int:
    """Train a language model around Cayley propagators, through Lightning."""
    from castwise.errors import MissingExtraError, SettingsError

    if importlib.util.find_spec("lightning") is None:
        raise MissingExtraError(
            "castwise train soliton_lm needs the package lightning, which is not "
            "installed; get it by pip install 'castwise[lightning]'"
        )
    from castwise.recipes.language.plan import Asked
    from castwise.recipes.soliton_lm import recipe

    devices = flags["devices"]
    known = devices in {None, "auto"} or (devices.isdecimal() and int(devices) > 0)
    if not known:
        raise SettingsError(f"--devices needs a number or auto, got {devices!r}.")
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
            devices=devices,
            strategy=flags["strategy"],
            compress=flags["compress"],
            device=flags["device"],
            out=flags["out"],
            resume=flags["resume"],
            keep_last=flags["keep_last"],
            num_threads=flags["threads"],
            data=flags["data"],
        ),
    )
