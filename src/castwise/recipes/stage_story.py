"""The story of a run's curriculum for its report: stages by step, and why they changed.

It is told from the curriculum, which knows where every dimension began, and from the
lines "stage" of the journal.
"""

from __future__ import annotations

from collections.abc import Sequence

from castwise.report import Column, DataTable, Lines, Series
from castwise.training.curriculum import Curriculum, Dimension
from castwise.training.journal import Record


def stage_story(
    curriculum: Curriculum, records: Sequence[Record], num_steps: int
) -> tuple[Lines | DataTable, ...]:
    """Return the stages as a picture and a table; nothing without a curriculum.

    Args:
        curriculum: Of the run, as it begins.
        records: The journal of the run, in its order.
        num_steps: Updates made.
    """
    if not curriculum.dimensions:
        return ()
    changes = [record for record in records if record.event == "stage"]
    dimensions = curriculum.dimensions.values()
    picture = Lines(
        title="Stages of the curriculum",
        series=tuple(_course(each, changes, num_steps) for each in dimensions),
        y_label="number of the stage",
        caption="; ".join(map(_listed, dimensions)),
    )
    return (picture, _table(changes)) if changes else (picture,)


def _course(dimension: Dimension, changes: Sequence[Record], num_steps: int) -> Series:
    """A staircase: the stage before and after each change, at the same step."""
    names = [stage.name for stage in dimension.stages]
    points = [(0, 1)]
    for change in changes:
        if change.values["dimension"] == dimension.name:
            after = names.index(change.values["after"]) + 1
            points += [(change.step, points[-1][1]), (change.step, after)]
    points.append((num_steps, points[-1][1]))
    return Series(
        name=dimension.name,
        xs=tuple(float(step) for step, _ in points),
        ys=tuple(float(number) for _, number in points),
    )


def _listed(dimension: Dimension) -> str:
    numbered = (f"{i} {stage.name}" for i, stage in enumerate(dimension.stages, 1))
    return f"{dimension.name}: {', '.join(numbered)}"


def _table(changes: Sequence[Record]) -> DataTable:
    columns = ("dimension", "before", "after", "because")
    return DataTable(
        title="Why stages changed",
        columns=(
            Column(name="step"),
            *(Column(name=name, spelling="text") for name in columns),
        ),
        rows=tuple(
            (change.step, *(str(change.values[name]) for name in columns))
            for change in changes
        ),
    )
