"""The story of a hybrid run for its report: phases, precision, predictions, memory.

It is told from the journal: a line "phase" for each change of phase, and one line
"hybrid" at the end with what every phase cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from castwise.hybrid.hybrid_trainer import HybridTrainer
from castwise.hybrid.phases import Phase
from castwise.report import Column, DataTable, Fact, Facts, Lines, Section, Series
from castwise.training.journal import Record

CHANGE, SUMMARY = "phase", "hybrid"
_PHASES = tuple(phase.value for phase in Phase)


def summary_of(trainer: HybridTrainer) -> dict[str, Any]:
    """Return the line "hybrid" of a run's journal."""
    found = trainer.statistics
    return {
        "tries": found.tries,
        "accepts": found.accepts,
        "refusals": found.refusals,
        "late_rollbacks": found.late_rollbacks,
        "declined": found.declined,
        "virtual_steps": found.virtual_steps,
        "credited_steps": found.credited_steps,
        "backwards": found.backwards,
        "forwards": found.forwards,
        "confidence_error": found.confidence_error,
        "predictor": trainer.predictor.name,
        "statistics": found.to_dict(),
        "shares": found.shares(),
        "memory_used_by_formats": (
            trainer.settings.mixed_precision_config.estimate_memory_savings(
                found.shares()
            )
        ),
    }


def hybrid_story(records: Sequence[Record]) -> tuple[Section, ...]:
    """Return the chapter on phases; none for a plain run.

    Args:
        records: The journal of the run, in its order.
    """
    summaries = [record for record in records if record.event == SUMMARY]
    if not summaries:
        return ()
    last = summaries[-1]
    changes = [record for record in records if record.event == CHANGE]
    phases = last.values["statistics"]["phases"]
    blocks: tuple[Lines | Facts | DataTable, ...] = (
        _time_line(changes, last.step),
        *_confidences(changes),
        _predictions(last.values),
        _precision(phases),
        *_memory(phases),
        *_reasons(changes),
    )
    return (Section(title="Phases", blocks=blocks),)


def _time_line(changes: Sequence[Record], num_steps: int) -> Lines:
    """A staircase: the phase before and after each change, at the same step."""
    points = [(0, 1)]
    for change in changes:
        after = _PHASES.index(str(change.values["target"])) + 1
        points += [(change.step, points[-1][1]), (change.step, after)]
    points.append((num_steps, points[-1][1]))
    numbered = ", ".join(f"{i} {name}" for i, name in enumerate(_PHASES, 1))
    return Lines(
        title="Phases by step",
        series=(
            Series(
                name="phase",
                xs=tuple(float(step) for step, _ in points),
                ys=tuple(float(number) for _, number in points),
            ),
        ),
        y_label="number of the phase",
        caption=numbered,
    )


def _confidences(changes: Sequence[Record]) -> tuple[Lines, ...]:
    """The back-test wherever a change of phase was decided."""
    seen = [c for c in changes if c.values.get("seen_confidence") is not None]
    if len(seen) < 2:
        return ()
    return (
        Lines(
            title="Confidence when a change of phase was decided",
            series=(
                Series(
                    name="back-test",
                    xs=tuple(float(each.step) for each in seen),
                    ys=tuple(float(each.values["seen_confidence"]) for each in seen),
                ),
            ),
            y_label="cosine",
        ),
    )


def _predictions(values: Mapping[str, Any]) -> Facts:
    taken = values["accepts"] - values["late_rollbacks"]
    error = float(values["confidence_error"])
    return Facts(
        title="Predictions",
        facts=(
            Fact(name="predictor", value=str(values["predictor"])),
            Fact(
                name="kept",
                value=f"{taken} of {values['tries']}",
                because=(
                    f"{values['refusals']} refused by paired forwards, "
                    f"{values['late_rollbacks']} taken back after corrective steps"
                ),
            ),
            Fact(name="not to predict was better", value=float(values["declined"])),
            Fact(
                name="credited steps",
                value=float(values["credited_steps"]),
                because=(
                    f"proposals claimed {values['virtual_steps']}; credited is the "
                    "fall of the loss at the pace before. Neither is a speed"
                ),
            ),
            Fact(name="backward passes", value=float(values["backwards"])),
            Fact(name="forward passes", value=float(values["forwards"])),
            Fact(
                name="confidence was off by",
                value="not known" if error != error else error,  # noqa: PLR0124 -- NaN
            ),
        ),
    )


def _precision(phases: Mapping[str, Mapping[str, Any]]) -> DataTable:
    return DataTable(
        title="Precision and cost by phase",
        caption="Observed: shares of the flops of matrix products in its first step.",
        columns=(
            Column(name="phase", spelling="text"),
            *(
                Column(name=name, spelling="text")
                for name in ("asked", "effective", "observed")
            ),
            *(
                Column(name=name)
                for name in ("steps", "forwards", "backwards", "skips", "switches")
            ),
            Column(name="seconds"),
            Column(name="of them switching"),
            Column(name="loss scale"),
        ),
        rows=tuple(
            (
                phase,
                str(phases[phase]["asked"]),
                str(phases[phase]["effective"]),
                _observed(phases[phase]["product_formats"]),
                *(
                    float(phases[phase][name])
                    for name in ("steps", "forwards", "backwards", "skips", "switches")
                ),
                float(phases[phase]["seconds"]),
                float(phases[phase]["switch_seconds"]),
                float(phases[phase]["scale"]),
            )
            for phase in _PHASES
        ),
    )


def _observed(shares: Mapping[str, float]) -> str:
    if not shares:
        return "not reached"
    return ", ".join(f"{share:.0%} {fmt}" for fmt, share in shares.items())


def _memory(phases: Mapping[str, Mapping[str, Any]]) -> tuple[DataTable, ...]:
    """Measured peaks, where they were measured."""
    if not any(phases[phase]["peak_bytes"] for phase in _PHASES):
        return ()
    return (
        DataTable(
            title="Memory by phase",
            caption="Of the whole process on a CPU, of the allocator on a GPU.",
            columns=(
                Column(name="phase", spelling="text"),
                Column(name="peak", spelling="bytes"),
                Column(name="most held at its end", spelling="bytes"),
            ),
            rows=tuple(
                (
                    phase,
                    float(phases[phase]["peak_bytes"]) or None,
                    float(phases[phase]["held_bytes"]) or None,
                )
                for phase in _PHASES
            ),
        ),
    )


def _reasons(changes: Sequence[Record]) -> tuple[DataTable, ...]:
    if not changes:
        return ()
    names = ("source", "target", "because")
    return (
        DataTable(
            title="Why phases changed",
            columns=(
                Column(name="step"),
                *(Column(name=name, spelling="text") for name in names),
            ),
            rows=tuple(
                (float(each.step), *(str(each.values[name]) for name in names))
                for each in changes
            ),
            folded=True,
        ),
    )
