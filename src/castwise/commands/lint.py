"""`castwise lint`: find mistakes of precision before the first step."""

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
from castwise.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from castwise.numerics.lint import Finding, LintReport
    from castwise.report import DataTable, Facts, Report


@evidence_command("lint")
@click.option("--phase", default="full", show_default=True, help="The phase to check.")
@click.option(
    "--silence",
    multiple=True,
    metavar="CHECK[@PLACE]=REASON",
    help="Accept what a check finds, everywhere or at places that fit a glob.",
)
@click.option("--target-loss", type=float, help="The loss that the run hopes to reach.")
def command(
    target: str,
    policy: Path | None,
    preset: str | None,
    phase: str,
    silence: tuple[str, ...],
    target_loss: float | None,
    json_path: Path | None,
    report_path: Path | None,
) -> int:
    """Find mistakes of precision before the first step.

    Looks at the model, its buffers, weights, source and optimizer under the policy, and
    observes one forward. Leaves with 1 when something was found that is not silenced.
    """
    from rich.console import Console

    from castwise.numerics.lint import lint
    from castwise.numerics.target import load_target

    silences = _silences(silence)
    chosen = chosen_policy(policy, preset)
    found = load_target(target)
    looked = lint(
        found.model,
        chosen,
        found.optimizer,
        found.batches,
        found.loss_fn,
        silence=silences,
        target_loss=target_loss,
        phase=phase,
    )
    write_evidence(
        looked.record(), json_path, lambda: report_of(looked, target), report_path
    )
    console = Console()
    for line in _lines(looked):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    return SUCCESS if looked.is_clean else FAILURE


def _silences(given: Iterable[str]) -> dict[str, str]:
    silences = {}
    for text in given:
        key, equals, reason = text.partition("=")
        if not equals:
            raise SettingsError(
                f"--silence needs CHECK=REASON or CHECK@PLACE=REASON, got {text!r}"
            )
        silences[key.strip()] = reason.strip()
    return silences


def _lines(looked: LintReport) -> Iterable[str]:
    yield looked.summary()
    for finding in looked.findings:
        yield f"  {finding}"
    for each in looked.silenced:
        yield f"  silenced, {each.reason}: {each.finding.check}: {each.finding.places}"
    for sentence in looked.unchecked:
        yield f"  {sentence}"
    for key in looked.unused:
        yield f"  the silence {key} covered nothing: it can go"


def report_of(looked: LintReport, target: str) -> Report:
    """Arrange what a lint found for a reader."""
    from castwise.numerics.lint import CHECKS
    from castwise.report import Column, DataTable, Note, Report, Section, Verdict

    text = [Column(name=name, spelling="text") for name in ("check", "looks for")]
    counts = tuple(
        (
            check,
            says,
            float(len(looked.of(check))),
            float(sum(each.finding.check == check for each in looked.silenced)),
        )
        for check, says in CHECKS.items()
    )
    checks = DataTable(
        columns=(*text, Column(name="found"), Column(name="silenced")),
        rows=counts,
        title="Every check",
    )
    notes = tuple(Note(text=each, mark="warning") for each in looked.unchecked)
    unused = tuple(
        Note(text=f"The silence {key} covered nothing: it can go.", mark="warning")
        for key in looked.unused
    )
    told = tuple(map(_told, looked.findings)) or (Note(text="Nothing was found."),)
    return Report(
        title=f"Lint of {target}",
        subtitle=f"under the policy {looked.policy}",
        verdict=Verdict(
            text=looked.summary(),
            mark="good" if looked.is_clean else "bad",
            because="Nothing was trained; the model is as it was.",
        ),
        sections=(
            Section(title="Findings", blocks=(*told, *notes)),
            Section(title="Silenced", blocks=(_silenced_table(looked), *unused)),
            Section(title="Checks", blocks=(checks,)),
        ),
    )


def _told(finding: Finding) -> Facts:
    from castwise.report import Fact, Facts

    facts = {
        "where": finding.where,
        "also": ", ".join(finding.others),
        "why": finding.why,
        "figure": finding.figure,
        "remedy": finding.remedy,
    }
    return Facts(
        title=finding.check,
        facts=tuple(Fact(name=k, value=value) for k, value in facts.items() if value),
    )


def _silenced_table(looked: LintReport) -> DataTable:
    from castwise.report import Column, DataTable

    names = ("check", "where", "figure", "reason")
    return DataTable(
        columns=tuple(Column(name=name, spelling="text") for name in names),
        rows=tuple(
            (
                each.finding.check,
                ", ".join((each.finding.where, *each.finding.others)),
                each.finding.figure,
                each.reason,
            )
            for each in looked.silenced
        ),
        caption="Found, and accepted with a reason.",
    )
