"""The page of a diagnosis: the cause, where, the evidence and the remedy."""

from __future__ import annotations

import math

import castwise
from castwise.numerics.diagnose import Diagnosis
from castwise.report import (
    Bars,
    Column,
    DataTable,
    Fact,
    Facts,
    Measured,
    Note,
    Report,
    Section,
    Verdict,
)
from castwise.report.records import Mark


def report_of(result: Diagnosis, target: str) -> Report:
    """Arrange a diagnosis for a reader."""
    mark: Mark = "good" if result.is_sound else "bad"
    text = "Nothing is wrong" if result.is_sound else result.cause.capitalize()
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
        verdict=Verdict(text=text, mark=mark, because=result.because),
        sections=(
            Section(
                title="Cause and remedy",
                blocks=(*blocks, Note(text=f"Remedy: {result.remedy}.")),
            ),
            Section(title="Evidence", blocks=(*_errors(result), _evidence(result))),
        ),
        footer=f"castwise {castwise.__version__}, castwise diagnose {target}",
    )


def _errors(result: Diagnosis) -> tuple[Bars, ...]:
    """The error of each experiment as a picture, if there are two to compare."""
    told = {
        each.what: Measured(value=each.error)
        for each in result.evidence
        if each.error is not None and math.isfinite(each.error)
    }
    if len(told) < 2:
        return ()
    return (
        Bars(
            title="Error by format",
            names=tuple(told),
            values=tuple(told.values()),
            caption="Of the worst of output, loss and gradients; experiments whose "
            "error is not finite stand in the table alone.",
        ),
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
