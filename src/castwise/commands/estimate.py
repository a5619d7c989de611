"""`castwise estimate`: the memory of a training step, known before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from castwise.commands.options import (
    SUCCESS,
    chosen_policy,
    json_option,
    policy_options,
    target_argument,
    write_json,
)
from castwise.errors import SettingsError
from castwise.wording import did_you_mean

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from castwise.numerics.target import Target

OPTIMIZERS = (
    "torch",
    "adamw",
    "adamw8bit",
    "sgd",
    "sgd8bit",
    "lion",
    "lion8bit",
    "none",
)
"""What `--optimizer` may name: torch's AdamW, castwise's own, or no update at all."""


@click.command("estimate")
@target_argument
@policy_options
@click.option(
    "--optimizer",
    metavar="NAME",
    help=f"{', '.join(OPTIMIZERS)}.  [default: that of the target, or torch]",
)
@click.option("--storage", metavar="NAME", help="How weights in 16 bits are stored.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Rows of the batch.")
@click.option(
    "--recompute",
    multiple=True,
    metavar="GLOB",
    help="Modules that are run again in the backward; may be given several times.",
)
@click.option(
    "--depth",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Parts of a module's name that are told apart; 0 for no table of modules.",
)
@json_option
def command(
    target: str,
    policy: Path | None,
    preset: str | None,
    optimizer: str | None,
    storage: str | None,
    batch_size: int | None,
    recompute: tuple[str, ...],
    depth: int,
    json_path: Path | None,
) -> int:
    """Tell what a training step holds in memory, and when, without running it.

    The model may stand on the meta device, so that models that fit nowhere can be
    asked about.
    """
    from rich.console import Console

    from castwise.memory.estimate import estimate
    from castwise.memory.estimate_table import show_estimate
    from castwise.numerics.target import load_target

    found = load_target(target)
    told = estimate(
        found.model,
        resized(found.batches[0], batch_size),
        found.loss_fn,
        chosen_policy(policy, preset),
        optimizer=chosen_optimizer(optimizer, found),
        storage=storage,
        recompute=recompute,
    )
    if json_path is not None:
        write_json(told.record(), json_path)
    show_estimate(told, Console(), depth=depth)
    return SUCCESS


def chosen_optimizer(
    name: str | None, found: Target
) -> Optimizer | Callable[[Any], Optimizer] | None:
    """Return the optimizer of the target, or what builds the one of a name.

    Raises:
        SettingsError: There is no such name.
    """
    from torch.optim import AdamW as TorchAdamW

    from castwise import optim

    if name is None and found.optimizer is not None:
        return found.optimizer
    name = name or "torch"
    if name not in OPTIMIZERS:
        raise SettingsError(
            f"--optimizer needs one of {', '.join(OPTIMIZERS)}; got {name!r}"
            f"{did_you_mean(name, OPTIMIZERS)}."
        )
    if name == "none":
        return None
    if name == "torch":
        return TorchAdamW
    settings = optim.SweepSettings(states="8bit" if name.endswith("8bit") else "fp32")
    kinds: dict[str, Callable[..., Optimizer]] = {
        "adamw": lambda weights: optim.AdamW(weights, settings=settings),
        "sgd": lambda weights: optim.SGD(
            weights, lr=1e-2, momentum=0.9, settings=settings
        ),
        "lion": lambda weights: optim.Lion(weights, settings=settings),
    }
    return kinds[name.removesuffix("8bit")]


def resized(batch: Sequence[Any], num_rows: int | None) -> tuple[Any, ...]:
    """Return a batch with another number of rows, without numbers in it.

    Every tensor with as many rows as the first one gets the new number.

    Raises:
        SettingsError: The batch has no tensor with rows.
    """
    import torch

    from castwise.memory.lifetimes import tensors_within

    if num_rows is None:
        return tuple(batch)
    sizes = [each.shape[0] for each in tensors_within(tuple(batch)) if each.dim()]
    if not sizes:
        raise SettingsError("--batch-size needs a batch with a tensor that has rows.")

    def again(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if not value.dim() or value.shape[0] != sizes[0]:
                return value
            shape = (num_rows, *value.shape[1:])
            return torch.empty(shape, dtype=value.dtype, device="meta")
        if isinstance(value, (tuple, list)):
            return type(value)(again(each) for each in value)
        if isinstance(value, dict):
            return {name: again(each) for name, each in value.items()}
        return value

    return tuple(again(each) for each in batch)
