"""`castwise fit`: the largest batch, or sequence, whose training step fits a budget."""

from __future__ import annotations

import re
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

if TYPE_CHECKING:
    from castwise.memory.fit import Fit
    from castwise.numerics.target import Target
    from castwise.policy import Policy

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(iB|B)?", re.IGNORECASE)
_MOST = {0: 1 << 16, 1: 1 << 16}


@click.command("fit")
@target_argument
@click.option("--budget", required=True, metavar="BYTES", help="Such as 2GiB or 800M.")
@policy_options
@click.option(
    "--dim",
    type=click.Choice(["batch", "sequence"]),
    default="batch",
    show_default=True,
    help="What grows: the first dimension of the inputs, or the second.",
)
@click.option(
    "--most",
    type=click.IntRange(min=1),
    help="The largest size of use.  [default: 65536]",
)
@click.option("--recompute", is_flag=True, help="With every block recomputed.")
@click.option("--no-step", is_flag=True, help="Estimate only; make no real step.")
@json_option
def command(
    target: str,
    budget: str,
    policy: Path | None,
    preset: str | None,
    dim: str,
    most: int | None,
    recompute: bool,
    no_step: bool,
    json_path: Path | None,
) -> int:
    """Find the largest batch whose training step fits a number of bytes.

    The search asks the estimate, which allocates nothing; what it finds is confirmed by
    one real step on a copy of the model, whose peak is measured.
    """
    from rich.console import Console

    from castwise.numerics.target import load_target

    found_target = load_target(target)
    along = 0 if dim == "batch" else 1
    room, free = parse_bytes(budget), _free_bytes(found_target.model)
    if not no_step and free is not None and free < room:
        raise SettingsError(
            f"a real step within {room / 2**20:,.0f} MiB needs as much free memory, "
            f"and {free / 2**20:,.0f} MiB are free; lower --budget, or add --no-step"
        )
    fit = _fit(
        found_target,
        chosen_policy(policy, preset),
        budget=room,
        along=along,
        most=most or _MOST[along],
        recompute=recompute,
        confirm=not no_step,
    )
    if json_path is not None:
        write_json(_record(fit, dim), json_path)
    console = Console()
    for line in _lines(fit, dim):
        console.print(line, highlight=False, soft_wrap=True)
    return SUCCESS


def parse_bytes(text: str) -> int:
    """Read a number of bytes such as 2GiB, 800M or 1.5G; units are powers of 1024.

    Raises:
        SettingsError: The text is no such number.
    """
    found = _BYTES.fullmatch(text.strip())
    if found is None:
        raise SettingsError(
            f"--budget needs a number of bytes, got {text!r}; write for example 2GiB "
            "or 800MiB"
        )
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _free_bytes(model: Any) -> int | None:
    """How much memory is free where the model stands; none where nobody knows."""
    import torch

    from castwise.fitting import device_of

    device = device_of(model)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None


def _fit(
    target: Target,
    policy: Policy,
    *,
    budget: int,
    along: int,
    most: int,
    recompute: bool,
    confirm: bool,
) -> Fit:
    from castwise.memory import recompute as recomputing
    from castwise.memory.estimate import estimate
    from castwise.memory.fit import confirmed, largest, resized

    batch = target.batches[0]
    known: dict[int, int] = {}

    def peak_of(size: int) -> int:
        if size not in known:
            known[size] = estimate(
                target.model,
                resized(batch, size, dim=along),
                target.loss_fn,
                policy,
                optimizer=target.optimizer,
                recompute=recomputing.recompute if recompute else (),
            ).peak_bytes
        return known[size]

    def measure(size: int) -> int:
        return _measured_peak(
            target, policy, resized(batch, size, dim=along), recompute=recompute
        )

    found = largest(peak_of, budget=budget, most=most)
    return confirmed(found, peak_of, measure) if confirm else found


def _measured_peak(
    target: Target, policy: Policy, batch: tuple[Any, ...], *, recompute: bool
) -> int:
    """Make two steps on a copy of the model, and return the peak of the second.

    The first makes the states of the optimizer.
    """
    import copy

    from castwise.memory.recompute import recompute as put_recompute
    from castwise.training.step import prepare
    from castwise.training.step_memory import estimate_of_step, watch_step

    model, optimizer = copy.deepcopy((target.model, target.optimizer))
    if recompute:
        put_recompute(model)
    if optimizer is None:
        optimizer = _no_update(model)
    run = prepare(model, optimizer, policy)
    with run.step() as step:
        step.backward(target.loss_fn(model(*batch[:-1]), batch[-1]))
    lifetimes = watch_step(run, batch, target.loss_fn)
    return estimate_of_step(run, lifetimes).peak_bytes


def _no_update(model: Any) -> Any:
    """Return an optimizer that has no states and changes nothing."""
    import torch

    return torch.optim.SGD(model.parameters(), lr=0.0)


def _lines(fit: Fit, dim: str) -> list[str]:
    word = "batch" if dim == "batch" else "sequence length"
    room = f"{fit.budget_bytes / 2**20:,.1f} MiB"
    lines = [
        f"largest {word} within {room}: {fit.size}"
        + (" (the largest that was asked about)" if fit.is_most else ""),
        f"estimated peak {fit.peak_bytes / 2**20:,.1f} MiB, {len(fit.asked)} estimates",
    ]
    if fit.measured_bytes is not None:
        lines.append(
            f"measured peak of a real step {fit.measured_bytes / 2**20:,.1f} MiB "
            f"({fit.measured_bytes / fit.budget_bytes:.1%} of the budget)"
        )
    return lines


def _record(fit: Fit, dim: str) -> dict[str, Any]:
    return {
        "dim": dim,
        "size": fit.size,
        "budget_bytes": fit.budget_bytes,
        "peak_bytes": fit.peak_bytes,
        "measured_bytes": fit.measured_bytes,
        "is_most": fit.is_most,
        "asked": {str(size): peak for size, peak in fit.asked.items()},
    }
