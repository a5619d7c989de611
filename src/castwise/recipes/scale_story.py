"""The story of a run's loss scale for its report: its course, the skips, their causes.

It is told from the journal alone: lines "train" and "scale" hold the scale, a line
"skip" holds everything that the replay of that step found out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from castwise.report import Column, DataTable, Lines, Marker, Series
from castwise.training.journal import Record

_MARKERS = 20
"""Skips that are marked in the picture; the table counts all of them."""

_Key = tuple[str, str, str, str, str]


def scale_story(records: Sequence[Record]) -> tuple[Lines | DataTable, ...]:
    """Return the time line of the scale, and a table of causes if steps were skipped.

    Args:
        records: The journal of a run, in its order.
    """
    skips = [record for record in records if record.event == "skip"]
    told = "No step was skipped."
    if skips:
        told = f"{len(skips)} steps were skipped; the table says why."
    if len(skips) > _MARKERS:
        told += f" The first {_MARKERS} are marked."
    line = Lines(
        title="Loss scale",
        series=(_course(records),),
        log_y=True,
        caption=told,
        markers=scale_markers(skips),
    )
    return (line, _causes(skips)) if skips else (line,)


def scale_markers(skips: Sequence[Record]) -> tuple[Marker, ...]:
    """Mark the first skipped steps, each with its cause in a few words."""
    return tuple(
        Marker(name=f"skipped: {_words(_key(skip))}", x=float(skip.step))
        for skip in skips[:_MARKERS]
    )


def _words(key: _Key) -> str:
    kind, op, module, stage, _ = key
    place = ", ".join(filter(None, (module, stage)))
    return f"{kind} in {op} ({place})" if place else f"{kind} in the {op}"


def _course(records: Sequence[Record]) -> Series:
    """The scale by step; a change that the step caused comes last and counts."""
    scales = {
        record.step: float(record.values["scale"])
        for record in records
        if record.event in {"train", "skip", "scale"}
    }
    return Series(
        name="scale",
        xs=tuple(float(step) for step in sorted(scales)),
        ys=tuple(scales[step] for step in sorted(scales)),
    )


def _causes(skips: Sequence[Record]) -> DataTable:
    grouped: dict[_Key, list[Record]] = {}
    for skip in skips:
        grouped.setdefault(_key(skip), []).append(skip)
    ordered = sorted(grouped.items(), key=lambda each: -len(each[1]))
    return DataTable(
        title="Why steps were skipped",
        caption=(
            "Each skipped step was replayed. Overflow and underflow are gone with a "
            "wider exponent, some overflows at a lower loss scale already; nan is the "
            "arithmetic's own, in any format."
        ),
        columns=(
            Column(name="kind", spelling="text"),
            Column(name="operator", spelling="text"),
            Column(name="module", spelling="text"),
            Column(name="stage", spelling="text"),
            Column(name="line", spelling="text"),
            Column(name="steps"),
            Column(name="first"),
            Column(name="last"),
            Column(name="lowest scale"),
            Column(name="gone at"),
        ),
        rows=tuple(_row(key, group) for key, group in ordered),
    )


def _key(skip: Record) -> _Key:
    """What makes two skips the same; the parameter where no operator is known."""
    values = skip.values
    op = values.get("op") or f"gradient of {values['parameter']}"
    module = values.get("module") or ("the loss" if values.get("where") else "")
    return (
        str(values.get("kind") or ""),
        str(op),
        module,
        str(values.get("stage") or ""),
        str(values.get("where") or ""),
    )


def _row(key: _Key, group: Sequence[Record]) -> tuple[Any, ...]:
    gone = [each.values.get("gone_at") for each in group]
    known = [scale for scale in gone if scale is not None]
    return (
        *key,
        float(len(group)),
        float(group[0].step),
        float(group[-1].step),
        min(float(each.values["scale"]) for each in group),
        min(known) if known else None,
    )
