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
    from rich.console import Console
    from torch.optim import Optimizer

    from castwise.distributed.rank_estimate import RankEstimate, Strategy
    from castwise.memory.estimate import Estimate
    from castwise.numerics.target import Target
    from castwise.policy import Policy

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
    "--ranks",
    "num_ranks",
    type=click.IntRange(min=1),
    help="Processes that train together; the table is then that of each.",
)
@click.option(
    "--strategy",
    type=click.Choice(["ddp", "fsdp"]),
    help="How they share the model.  [default: fsdp]",
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
    num_ranks: int | None,
    strategy: Strategy | None,
    depth: int,
    json_path: Path | None,
) -> int:
    """Tell what a training step holds in memory, and when, without running it.

    The model may stand on the meta device, so that models that fit nowhere can be
    asked about.
    """
    from rich.console import Console

    from castwise.numerics.target import load_target

    if strategy is not None and num_ranks is None:
        raise SettingsError(
            f"--strategy {strategy} shares a model among processes; say how many with "
            "--ranks."
        )
    found = load_target(target)
    told = _told(
        found,
        resized(found.batches[0], batch_size),
        _with_storage(chosen_policy(policy, preset), storage),
        num_ranks,
        strategy or "fsdp",
        optimizer=chosen_optimizer(optimizer, found),
        recompute=recompute,
    )
    if json_path is not None:
        write_json(told.record(), json_path)
    _show(told, Console(), depth)
    return SUCCESS


def _with_storage(policy: Policy, storage: str | None) -> Policy:
    return policy if storage is None else policy.with_storage(storage)


def _told(
    found: Target,
    batch: tuple[Any, ...],
    policy: Policy,
    num_ranks: int | None,
    strategy: Strategy,
    **settings: Any,
) -> Estimate | RankEstimate:
    if num_ranks is None:
        from castwise.memory.estimate import estimate

        return estimate(found.model, batch, found.loss_fn, policy, **settings)
    from castwise.distributed.rank_estimate import estimate_ranks

    return estimate_ranks(
        found.model,
        batch,
        found.loss_fn,
        policy,
        num_ranks=num_ranks,
        strategy=strategy,
        **settings,
    )


def _show(told: Estimate | RankEstimate, console: Console, depth: int) -> None:
    from castwise.distributed.rank_estimate import RankEstimate
    from castwise.memory.estimate_table import show_estimate, shown_bytes

    if not isinstance(told, RankEstimate):
        show_estimate(told, console, depth=depth)
        return
    show_estimate(told.rank, console, depth=depth)
    sent = ", ".join(
        f"{each.kind} {shown_bytes(each.bytes_sent)} in {each.num_messages}"
        for each in told.exchanges
    )
    line = (
        f"that is each of {told.num_ranks} ranks under {told.strategy}; in a step each "
        f"sends {shown_bytes(told.bytes_sent)}: {sent} messages"
    )
    console.print(line, highlight=False, soft_wrap=True)


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
