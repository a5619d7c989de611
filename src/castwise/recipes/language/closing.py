"""How a language model's run is opened and closed: what a person reads; the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from castwise.numerics.census import FormatCensus
from castwise.recipes.language.run_report import Evidence, write_run_report
from castwise.training.journal import read_journal
from castwise.training.run_folder import RunFolder


def opening_lines(facts: Mapping[str, Any], folder: RunFolder) -> list[str]:
    """Say what was asked, what really runs, where, and where it is written."""
    census = FormatCensus.from_record(facts["effective"])
    device = f"{facts['device']} ({facts['device_because']})"
    variant = facts["settings"]["model"]["variant"]
    return [
        f"model      {facts['num_parameters']:,} weights, variant {variant}",
        f"asked      {facts['asked_by']}",
        f"in force   {facts['in_force']}",
        f"effective  {census.summary()}",
        f"device     {device}, {facts['num_threads']} threads",
        f"folder     {folder.path}",
    ]


def close(
    *,
    title: str,
    facts: Mapping[str, Any],
    sample: str,
    folder: RunFolder,
    console: Console,
) -> None:
    """Write the report from the journal, and say how it went."""
    evidence = Evidence(
        title=title,
        facts=facts,
        records=tuple(read_journal(folder.path)),
        sample=sample,
    )
    write_run_report(evidence, folder.report)
    last = evidence.last
    console.print(
        f"validation loss {last['validation_loss']:.4f} nats per token, "
        f"{last['validation_bits_per_byte']:.4f} bits per byte; "
        f"{last['train_seconds']:.0f} s; report: {folder.report}",
        highlight=False,
        soft_wrap=True,
    )
