"""`castwise contract`: prove that every operator runs in its promised format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from castwise.commands.options import (
    FAILURE,
    SUCCESS,
    chosen_policy,
    json_option,
    policy_options,
    target_argument,
    write_json,
)

if TYPE_CHECKING:
    from rich.table import Table

    from castwise.numerics.contract import Contract


@click.command("contract")
@target_argument
@policy_options
@click.option("--phase", default="full", show_default=True, help="The phase to prove.")
@click.option("--modules", is_flag=True, help="Also show each module's share.")
@json_option
def command(
    target: str,
    policy: Path | None,
    preset: str | None,
    phase: str,
    modules: bool,
    json_path: Path | None,
) -> int:
    """Prove that every operator runs in the format that the policy promises.

    Leaves with 0 when the contract holds and with 1 when it is broken; every breach is
    named with its module, stage, formats and source line.
    """
    from rich.console import Console

    from castwise.numerics.contract import contract
    from castwise.numerics.target import load_target

    found = load_target(target)
    proof = contract(
        found.model,
        found.batches,
        found.loss_fn,
        chosen_policy(policy, preset),
        phase=phase,
    )
    if json_path is not None:
        write_json(proof.record(), json_path)
    console = Console()
    if modules:
        console.print(share_table(proof))
    console.print(proof.summary(), highlight=False, soft_wrap=True)
    for breach in proof.breaches:
        console.print(f"  {breach}", highlight=False, soft_wrap=True, markup=False)
    return SUCCESS if proof.holds else FAILURE


def share_table(proof: Contract) -> Table:
    """Return how much of each module ran low and high, as a table."""
    from rich.table import Table

    table = Table(title="what ran low (16 bits or fewer) and high, by module")
    for name in ("module", "compute", "low", "high", "casts", "flops low", "MB cast"):
        left = name in {"module", "compute"}
        table.add_column(name, justify="left" if left else "right")
    for share in proof.shares():
        flops = share.flops_low + share.flops_high
        table.add_row(
            "(outside)" if share.module is None else share.module or "(model)",
            share.compute,
            str(share.num_low),
            str(share.num_high),
            str(share.num_casts),
            f"{share.flops_low / flops:.1%}" if flops else "",
            f"{share.bytes_cast / 1e6:.2f}",
        )
    return table
