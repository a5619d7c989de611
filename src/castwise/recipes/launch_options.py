"""The flags that say where a run of our trainer takes place. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

compress_option = click.option(
    "--compress",
    default="reduce",
    metavar="HOW",
    help="Gradients of ddp: bf16, fp16, powersgd:rank=4.  [default: the policy]",
)


def launch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the device, and how a run is spread over processes, to a command."""
    for option in reversed(
        (
            click.option(
                "--device",
                default="auto",
                show_default=True,
                help="auto, cpu, cuda or cuda:N.",
            ),
            click.option(
                "--strategy",
                type=click.Choice(["ddp", "fsdp"]),
                help="Over the processes of torchrun.  [default: one process]",
            ),
            compress_option,
        )
    ):
        command = option(command)
    return command
