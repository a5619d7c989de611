"""`castwise validate`: is a policy good enough, by its errors against float64?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from castwise.commands.options import (
    FAILURE,
    SUCCESS,
    chosen_policy,
    evidence_command,
    write_evidence,
)

if TYPE_CHECKING:
    from rich.table import Table

    from castwise.numerics.validate import Validation

_COLOURS = {"holds": "green", "own": "red", "inherited": "yellow"}


@evidence_command("validate")
@click.option(
    "--k",
    type=float,
    default=1.5,
    show_default=True,
    help="How many times the error of fp32 an error may be.",
)
@click.option(
    "--tolerance",
    type=float,
    help="What is allowed on top.  [default: 16 roundings of the narrowest format]",
)
@click.option("--seeds", default=1, show_default=True, help="How many seeds are tried.")
@click.option("--phase", default="full", show_default=True, help="The phase to try.")
@click.option("--modules", is_flag=True, help="Also show every module.")
def command(
    target: str,
    policy: Path | None,
    preset: str | None,
    k: float,
    tolerance: float | None,
    seeds: int,
    phase: str,
    modules: bool,
    report_path: Path | None,
    json_path: Path | None,
) -> int:
    """Compare a policy with float64, output and gradients, module by module.

    Leaves with 0 when every error is within k times that of fp32 plus the tolerance,
    and with 1 when one is not, or when nothing was compared.
    """
    from rich.console import Console

    from castwise.commands.validate_report import report_of
    from castwise.numerics.target import load_target
    from castwise.numerics.validate import validate

    found = load_target(target)
    result = validate(
        found.model,
        found.batches,
        found.loss_fn,
        chosen_policy(policy, preset),
        k=k,
        tolerance=tolerance,
        seeds=tuple(range(seeds)),
        phase=phase,
    )
    write_evidence(
        result.record(), json_path, lambda: report_of(result, target), report_path
    )
    console = Console()
    console.print(result_table(result))
    if modules:
        console.print(module_table(result))
    console.print(result.summary(), highlight=False, soft_wrap=True)
    for fault in result.faults():
        console.print(f"  {fault}", highlight=False, soft_wrap=True, markup=False)
    for each in result.blamed()[:5]:
        console.print(
            f"  operator {each}", highlight=False, soft_wrap=True, markup=False
        )
    return SUCCESS if result.holds else FAILURE


def result_table(result: Validation) -> Table:
    """Return output and gradients beside their floors and limits, as a table."""
    from rich.table import Table

    table = Table(title=f"errors of {result.candidate} against {result.reference}")
    table.add_column("result", no_wrap=True)
    for name in ("error", "fp32", "limit", "max", "cosine", "bad"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in result.results:
        m = each.measures
        table.add_row(
            each.name if each.holds else f"[red]{each.name}[/]",
            f"{m.relative:.1e}",
            f"{each.floor.relative:.1e}",
            f"{each.limit:.1e}",
            f"{m.maximum:.1e}",
            f"{m.cosine:.5f}",
            f"{m.nonfinite:.1%}",
        )
    return table


def module_table(result: Validation) -> Table:
    """Return every module with its errors, as a table."""
    from rich.table import Table

    table = Table(title="errors by module")
    for name in ("module", "compute", "state"):
        table.add_column(name, overflow="fold")
    for name in ("output", "its gradient", "weights"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in result.modules:
        errors = each.errors()
        names = "output", "output_gradient", "weight_gradient"
        table.add_row(
            each.module or "(model)",
            each.compute,
            f"[{_COLOURS[each.state]}]{each.state}[/]",
            *(f"{errors[name][0]:.1e}" if name in errors else "" for name in names),
        )
    return table
