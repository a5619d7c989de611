"""`castwise diagnose`: why something breaks: rounding, range, algorithm or data."""

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

    from castwise.numerics.diagnose import Diagnosis


@evidence_command("diagnose")
@click.option(
    "--limit",
    type=float,
    help="What the loss may be; above it in float64, the algorithm is at fault.",
)
@click.option(
    "--tolerance",
    type=float,
    help="What an error may be.  [default: 16 roundings of the narrowest format]",
)
@click.option("--phase", default="full", show_default=True, help="The phase to try.")
def command(
    target: str,
    policy: Path | None,
    preset: str | None,
    limit: float | None,
    tolerance: float | None,
    phase: str,
    report_path: Path | None,
    json_path: Path | None,
) -> int:
    """Find out why something breaks, and what to do about it.

    Leaves with 0 when nothing is wrong and with 1 when there is a cause: rounding,
    range, algorithm, data or nondeterminism.
    """
    from rich.console import Console

    from castwise.commands.diagnose_report import report_of
    from castwise.numerics.diagnose import diagnose
    from castwise.numerics.target import load_target

    found = load_target(target)
    result = diagnose(
        found.model,
        found.batches,
        found.loss_fn,
        chosen_policy(policy, preset),
        optimizer=found.optimizer,
        limit=limit,
        tolerance=tolerance,
        phase=phase,
    )
    write_evidence(
        result.record(), json_path, lambda: report_of(result, target), report_path
    )
    console = Console()
    if result.evidence:
        console.print(evidence_table(result))
    for line in (
        f"cause: {result.cause}",
        f"at: {result.blame}" if str(result.blame) else "",
        f"because: {result.because}",
        f"remedy: {result.remedy}",
    ):
        if line:
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    return SUCCESS if result.is_sound else FAILURE


def evidence_table(result: Diagnosis) -> Table:
    """Return the experiments and what came out of them, as a table."""
    from rich.table import Table

    table = Table(title=f"evidence on {result.subject}")
    table.add_column("experiment")
    for name in ("error", "figure"):
        table.add_column(name, justify="right")
    table.add_column("note")
    for each in result.evidence:
        numbers = (
            "" if value is None else f"{value:.3g}"
            for value in (each.error, each.measure)
        )
        table.add_row(each.what, *numbers, each.note)
    return table
