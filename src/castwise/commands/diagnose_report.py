"""The page of a diagnosis: the cause, where, the evidence and the remedy."""

from __future__ import annotations

import castwise
from castwise.numerics.diagnose import Diagnosis
from castwise.report import (
    Column,
    DataTable,
    Fact,
    Facts,
    Note,
    Report,
    Section,
    Verdict,
)
from castwise.report.records import Mark


def report_of(result: Diagnosis, target: str) -> Report:
    """Arrange a diagnosis for a reader."""
    mark: Mark = "good" if result.is_sound else "bad"
    blame = result.blame
    facts = (
        ("operator", blame.op),
        ("module", blame.module),
        ("stage", blame.stage),
        ("line", blame.where),
        ("tensor", blame.tensor),
        ("number of the call", None if blame.call is None else str(blame.call)),
    )
    found = tuple(Fact(name=name, value=value) for name, value in facts if value)
    blocks = (Facts(facts=found, title="Where"),) if found else ()
    return Report(
        title=f"Diagnosis of {result.subject}",
        subtitle=target,
        verdict=Verdict(text=result.cause, mark=mark, because=result.because),
        sections=(
            Section(
                title="Cause and remedy",
                blocks=(*blocks, Note(text=f"Remedy: {result.remedy}.")),
            ),
            Section(title="Evidence", blocks=(_evidence(result),)),
        ),
        footer=f"castwise {castwise.__version__}, castwise diagnose {target}",
    )


def _evidence(result: Diagnosis) -> DataTable:
    return DataTable(
        title="Experiments, in the order in which they were made",
        columns=(
            Column(name="experiment", spelling="text"),
            Column(name="error"),
            Column(name="figure"),
            Column(name="note", spelling="text"),
        ),
        rows=tuple((e.what, e.error, e.measure, e.note) for e in result.evidence),
        caption="Errors are relative, against the reference in float64.",
    )
