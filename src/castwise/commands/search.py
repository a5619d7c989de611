"""`castwise search`: find the cheapest policy that keeps within an error budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from castwise.commands.options import (
    SUCCESS,
    json_option,
    report_option,
    target_argument,
    write_json,
)

if TYPE_CHECKING:
    from rich.table import Table

    from castwise.numerics.search import Found

_MOST_ROWS = 20

FEW_BATCHES = 4
"""Fewer do not tell how a model with unstable decisions behaves."""


@click.command("search")
@target_argument
@click.option(
    "--budget",
    metavar="TEXT",
    required=True,
    help="gradient=1e-2, or several: gradient=1e-2,output=5e-3,loss=1e-3.",
)
@click.option(
    "--formats",
    default="bf16,fp32",
    show_default=True,
    help="What modules may run in, separated by commas; fp32/bf16 is a forward in "
    "fp32 with a backward in bf16.",
)
@click.option(
    "--cost",
    type=click.Choice(["flops", "bytes", "time"]),
    default="flops",
    show_default=True,
    help="What is made small; time is measured on this machine.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="policy.yaml",
    show_default=True,
    help="Where the policy is written.",
)
@click.option(
    "--resume",
    "record",
    type=click.Path(path_type=Path),
    help="A record of scores and trials: begun, or gone on with if it is there.",
)
@click.option("--probes", default=8, show_default=True, help="How many are run.")
@click.option(
    "--trials", default=10, show_default=True, help="How many policies are tried."
)
@click.option(
    "--points",
    default=0,
    show_default=True,
    help="How many points of the Pareto curve are run for real as well.",
)
@click.option("--seed", default=0, show_default=True, help="Of the probes.")
@click.option(
    "--operators",
    is_flag=True,
    help="Also search which norms, softmax and the like may run low everywhere.",
)
@click.option(
    "--reference",
    type=click.Choice(["fp64", "fp32"]),
    default="fp64",
    show_default=True,
    help="What errors are taken against.",
)
@report_option
@json_option
def command(
    target: str,
    budget: str,
    formats: str,
    cost: str,
    out: Path,
    record: Path | None,
    probes: int,
    trials: int,
    points: int,
    seed: int,
    operators: bool,
    reference: str,
    report_path: Path | None,
    json_path: Path | None,
) -> int:
    """Find the cheapest policy that keeps within an error budget, and write it.

    Modules are scored in a dozen steps however many there are; what the scores choose
    is run on every batch of the target before it is written.
    """
    from rich.console import Console

    from castwise.numerics.search import SearchSettings, search
    from castwise.numerics.search.budget import parse_budget
    from castwise.numerics.target import load_target

    asked = parse_budget(budget)
    settings = SearchSettings(
        num_probes=probes,
        max_trials=trials,
        num_points=points,
        seed=seed,
        operators=operators,
        reference=reference,
    )
    subject = load_target(target)
    console = Console()
    with shown_progress() as on_progress:
        found = search(
            subject.model,
            subject.batches,
            subject.loss_fn,
            asked,
            formats=formats.split(","),
            cost=cost,
            record=record,
            settings=settings,
            on_progress=on_progress,
        )
    found.policy.save(out)
    if json_path is not None:
        write_json(found.record(), json_path)
    if report_path is not None:
        from castwise.commands.search_report import report_of
        from castwise.report import write_report

        write_report(report_of(found, target), report_path)
    console.print(unit_table(found))
    console.print(found.summary(), highlight=False, soft_wrap=True)
    for fqn, op in found.unstable.items():
        console.print(
            f"  {fqn or 'the model itself'}: its {op} turns over under rounding noise; "
            f"held high, and no budget is sure to hold on other batches than the "
            f"{found.num_batches} given{_few(found)}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
    if found.scores.never_called:
        names = ", ".join(found.scores.never_called)
        console.print(f"  never called, so nothing is known of: {names}", markup=False)
    console.print(
        f"wrote {out}; try: castwise contract {target} --policy {out}",
        highlight=False,
        soft_wrap=True,
    )
    return SUCCESS


@contextmanager
def shown_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show what a search is doing: live on a terminal, and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
    )

    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description:15}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: dict[str, TaskID] = {}

    def show(what: str, done: int, of: int) -> None:
        if what not in tasks:
            for task in tasks.values():
                progress.update(task, completed=progress.tasks[task].total)
            tasks[what] = progress.add_task(what, total=of)
        progress.update(tasks[what], completed=done)

    with progress:
        yield show


def unit_table(found: Found) -> Table:
    """The modules that use up the most of the budget, and what each was given."""
    from rich.table import Table

    low = found.scores.default
    ranked = sorted(found.units, key=lambda unit: -unit.errors[low])
    shown = ranked[:_MOST_ROWS]
    more = (
        f"; {len(ranked) - len(shown)} more below" if len(ranked) > len(shown) else ""
    )
    table = Table(title=f"what {low} alone would use of {found.budget}{more}")
    for name in ("module", "type", "runs in"):
        table.add_column(name)
    for name in ("of the budget", "cost"):
        table.add_column(name, justify="right")
    for unit in shown:
        table.add_row(
            unit.fqn or "(model)",
            unit.type,
            unit.chosen if unit.chosen == low else f"[yellow]{unit.chosen}[/]",
            unit.because or _share(unit.errors[low]),
            f"{unit.costs[unit.chosen] / found.cost:.1%}" if found.cost else "",
        )
    return table


def _few(found: Found) -> str:
    """What to say of decisions that were tried on too few batches."""
    few = found.num_batches < FEW_BATCHES
    return f"; give {FEW_BATCHES} or more" if few else ""


def _share(value: float) -> str:
    return f"{value:.3g} times" if value > 1 else f"{value:.1%}"
