"""The story of a run's precision for its report: asked for, in force, and observed.

It is told from the facts that stand in the checkpoints; the census in them counted
every operator of one forward and backward by the format in which it really ran.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from castwise.numerics.census import FormatCensus
from castwise.report import Column, DataTable, Fact, Facts

NUM_ROWS = 24
"""Operators in the table, those that move most bytes."""


def precision_story(
    facts: Mapping[str, Any], *, more: Sequence[Fact] = ()
) -> tuple[Facts | DataTable, ...]:
    """Return the facts of a run's precision, and what ran in which format.

    Args:
        facts: What stands in the checkpoints.
        more: What a recipe adds, before the device. Default: nothing.
    """
    census = FormatCensus.from_record(facts["effective"])
    listed = Facts(
        facts=(
            Fact(
                name="precision",
                value=census.effective or "no product was observed",
                asked=facts["asked_by"],
                because="counted in one forward and backward of the first batch",
            ),
            Fact(name="in force", value=facts["in_force"]),
            Fact(name="observed", value=census.summary()),
            Fact(name="loss scale", value=facts["loss_scale"]),
            *more,
            Fact(name="device", value=facts["device"], because=facts["device_because"]),
        )
    )
    return listed, _formats(census)


def _formats(census: FormatCensus) -> DataTable:
    return DataTable(
        title="What ran in which format",
        caption="The operators of one forward and backward that move most bytes.",
        columns=(
            Column(name="operator", spelling="text"),
            Column(name="stage", spelling="text"),
            Column(name="format", spelling="text"),
            Column(name="calls"),
            Column(name="bytes", spelling="bytes"),
            Column(name="flops"),
        ),
        rows=tuple(
            (
                count.op,
                count.stage,
                count.format,
                count.num_calls,
                count.num_bytes,
                count.num_flops or None,
            )
            for count in sorted(census.counts, key=lambda c: -c.num_bytes)[:NUM_ROWS]
        ),
        folded=True,
    )
