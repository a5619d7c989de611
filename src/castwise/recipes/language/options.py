"""Flags that the commands of both language models share. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from castwise.recipes.average_choice import FIELDS

if TYPE_CHECKING:
    from castwise.recipes.precision_choice import PrecisionChoice

Command = Callable[..., Any]

_FIELDS = {
    "text": ("text", "paths"),
    "tokenizer": ("text", "tokenizer"),
    "variant": ("model", "variant"),
    "num_steps": ("training", "num_steps"),
    "seed": ("training", "seed"),
    "overfit_batches": ("training", "overfit_batches"),
    "evaluate_every": ("training", "evaluate_every"),
    "checkpoint_every": ("training", "checkpoint_every"),
    **{name: ("training", name) for name in FIELDS},
}
"""Flag -> section and field of the config that it overrides."""


def model_options(command: Command) -> Command:
    """Add what the model is, and in which precision."""
    for option in reversed(
        (
            click.option(
                "--config",
                type=click.Path(path_type=Path),
                help="A YAML file of settings.",
            ),
            click.option(
                "--text",
                multiple=True,
                type=click.Path(),
                help="A file, folder or local dataset; may be given several times.  "
                "[default: CPython's language reference]",
            ),
            click.option("--tokenizer", type=click.Choice(["bytes", "bpe"])),
            click.option(
                "--variant",
                type=click.Choice(["layer", "identity", "transformer"]),
                help="The recipe's model, or one of its rivals of the same size.",
            ),
            click.option(
                "--precision", metavar="PRESET", help="A policy preset by its name."
            ),
            click.option(
                "--policy", type=click.Path(path_type=Path), help="A policy file."
            ),
            click.option(
                "--no-islands",
                is_flag=True,
                help="Leave the sensitive layers unprotected, to see what happens.",
            ),
            click.option(
                "--fallback",
                metavar="FORMAT",
                help="Format to use instead of one that the device cannot do.",
            ),
        )
    ):
        command = option(command)
    return command


def place_options(command: Command) -> Command:
    """Add where the run happens, and how long it takes."""
    for option in reversed(
        (
            click.option(
                "--out",
                type=click.Path(path_type=Path),
                help="Folder of the run.  [default: the next number below runs]",
            ),
            click.option(
                "--resume", is_flag=True, help="Go on from the newest checkpoint."
            ),
            click.option("--seed", type=int, help="Seed of weights and batches."),
            click.option(
                "--steps", "num_steps", type=int, help="Updates of the whole run."
            ),
            click.option(
                "--overfit-batches",
                type=click.IntRange(min=0),
                help="Learn as many batches by heart.",
            ),
            click.option("--evaluate-every", type=int, help="Steps of an epoch."),
            click.option(
                "--checkpoint-every", type=int, help="Steps between two checkpoints."
            ),
            click.option(
                "--keep-last",
                type=click.IntRange(min=1),
                default=3,
                show_default=True,
                help="Checkpoints that stay, besides the best.",
            ),
            click.option(
                "--threads",
                type=click.IntRange(min=1),
                help="CPU threads of torch.  [default: its own choice]",
            ),
            click.option(
                "--data",
                type=click.Path(path_type=Path),
                help="Folder that keeps tokens.  [default: the user's cache]",
            ),
        )
    ):
        command = option(command)
    return command


def changes_of(flags: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings that the flags name, by section and field."""
    changes: dict[str, dict[str, Any]] = {}
    for flag, (section, field) in _FIELDS.items():
        value = flags.get(flag)
        if value is not None and value != ():
            changes.setdefault(section, {})[field] = value
    return changes


def precision_of(flags: Mapping[str, Any]) -> PrecisionChoice:
    """Return the precision flags."""
    from castwise.recipes.precision_choice import PrecisionChoice  # noqa: PLC0415 -- as in a command

    return PrecisionChoice(
        dtype=flags.get("dtype"),
        precision=flags["precision"],
        policy_file=flags["policy"],
        fallback=flags["fallback"],
    )
