"""The report of a KenKen run: plain records of the run, arranged for a reader.

Everything comes in as values (journal lines, measures, facts of the checkpoint); this
room computes no measure and runs no model. `castwise.report` makes the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castwise.numerics.census import FormatCensus
from castwise.recipes.hybrid_story import hybrid_story
from castwise.recipes.kenken.alphabets import parse_mode
from castwise.recipes.kenken.curricula import curriculum_of
from castwise.recipes.kenken.dataset import world_note
from castwise.recipes.kenken.drawing import draw_svg
from castwise.recipes.kenken.measures import Measures, Rate
from castwise.recipes.kenken.puzzle_set import GENERATOR_VERSION, Kind
from castwise.recipes.kenken.puzzles import Puzzle
from castwise.recipes.kenken.settings import KenKenSettings
from castwise.recipes.kenken.solver import Answer
from castwise.recipes.precision_story import precision_story
from castwise.recipes.scale_story import scale_markers, scale_story
from castwise.recipes.stage_story import stage_story
from castwise.recipes.watch_story import watch_story
from castwise.report import (
    Column,
    DataTable,
    Drawing,
    Fact,
    Facts,
    HeatTable,
    Lines,
    Measured,
    Note,
    Report,
    Section,
    Series,
    Tile,
    Verdict,
    write_report,
)
from castwise.training.journal import Record
from castwise.training.trainer import MIB, FitResult

GOAL = 0.95
GOAL_SIZES = (4, 5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """Everything that the report of a run tells."""

    settings: KenKenSettings
    """Of the run."""

    facts: Mapping[str, Any]
    """What stands in the checkpoints."""

    result: FitResult
    """How the loop ended."""

    records: tuple[Record, ...]
    """Every line of the journal."""

    rows: tuple[Measures, ...]
    """The final measures by size, mode, kind and fill."""

    puzzle: Puzzle
    """One validation puzzle."""

    answer: Answer
    """What the network said about it."""

    def of(self, event: str) -> list[Record]:
        """Return the journal's lines of one event."""
        return [record for record in self.records if record.event == event]

    @property
    def solved(self) -> list[Measures]:
        """Rows of unique puzzles shown without a hint."""
        return [
            row
            for row in self.rows
            if row.kind is Kind.KENKEN and row.fill == (0.0, 0.0)
        ]

    @property
    def census(self) -> FormatCensus:
        """What really ran in the first step."""
        return FormatCensus.from_record(self.facts["effective"])


def write_run_report(evidence: Evidence, path: Path) -> None:
    """Write `report.html`, and `report.json` beside it.

    Raises:
        StorageError: If they cannot be written.
    """
    write_report(build_report(evidence), path)


def build_report(evidence: Evidence) -> Report:
    """Arrange the evidence for a reader."""
    versions = evidence.facts["versions"]
    return Report(
        title="A KenKen solver, trained on puzzles made on the spot",
        subtitle=(
            f"preset {evidence.settings.preset}, seed {evidence.settings.seed}, "
            f"{evidence.result.num_steps} steps on {evidence.facts['device']} with "
            f"{evidence.facts['num_threads']} threads"
        ),
        verdict=_verdict(evidence),
        tiles=_tiles(evidence),
        sections=(
            Section(title="What it solves", blocks=_result_blocks(evidence)),
            Section(title="Precision", blocks=_precision_blocks(evidence)),
            Section(title="Training", blocks=_training_blocks(evidence)),
            *hybrid_story(evidence.records),
            *watch_story(evidence.records),
            Section(title="Memory", blocks=_memory_blocks(evidence)),
            Section(title="Data", blocks=_data_blocks(evidence)),
            Section(title="Settings", blocks=_settings_blocks(evidence)),
        ),
        footer="; ".join(f"{name} {version}" for name, version in versions.items()),
    )


def _pooled(rows: Sequence[Measures]) -> Rate:
    return Rate(
        hits=sum(row.valid.hits for row in rows), num=sum(row.valid.num for row in rows)
    )


def _verdict(evidence: Evidence) -> Verdict:
    """Judge the run by its goal, or by nothing where the goal's sizes are absent."""
    judged = [row for row in evidence.solved if row.size in GOAL_SIZES]
    if not judged:
        everything = _pooled(evidence.solved)
        return Verdict(
            text=f"Solves {everything.value:.1%} of unseen unique puzzles from the "
            "empty grid, without search.",
            because="the goal speaks of sizes 4 and 5, which this run did not train on",
        )
    rate = _pooled(judged)
    low, high = rate.interval
    sizes = " and ".join(f"{n}x{n}" for n in sorted({row.size for row in judged}))
    return Verdict(
        text=f"Solves {rate.value:.1%} of unseen unique {sizes} puzzles from the "
        "empty grid, without search.",
        mark="good" if rate.value >= GOAL else "warning",
        because=(
            f"{rate.num} puzzles in {len({r.mode for r in judged})} alphabets, 95 % "
            f"interval {low:.1%} to {high:.1%}; the goal is {GOAL:.0%}"
        ),
    )


def _tiles(evidence: Evidence) -> tuple[Tile, ...]:
    tiles = []
    for size in evidence.settings.sizes:
        rate = _pooled([row for row in evidence.solved if row.size == size])
        low, high = rate.interval
        tiles.append(
            Tile(
                name=f"{size} x {size} solved",
                value=f"{rate.value:.1%}",
                detail=f"{low:.1%} to {high:.1%} of {rate.num}",
                mark="good" if rate.value >= GOAL else "none",
            )
        )
    shares = evidence.census.product_shares()
    return (
        *tiles,
        Tile(
            name="effective precision",
            value=evidence.census.effective or "none",
            detail=", ".join(f"{s:.0%} {name}" for name, s in shares.items())
            + " of product flops",
        ),
        Tile(
            name="time",
            value=f"{evidence.result.train_seconds:.0f} s",
            detail=f"{1e3 * evidence.result.step_seconds:.0f} ms a step (median)",
        ),
    )


def _measured(rate: Rate) -> Measured:
    low, high = rate.interval
    return Measured(value=rate.value, low=low, high=high, count=rate.num)


def _result_blocks(evidence: Evidence) -> tuple[HeatTable | DataTable | Drawing, ...]:
    rows = evidence.rows
    sizes = sorted({row.size for row in rows})
    modes = list(dict.fromkeys(str(row.mode) for row in rows))
    solved = {(row.size, str(row.mode)): row.valid.value for row in evidence.solved}
    verdict = "right" if evidence.answer.is_right else "wrong"
    return (
        HeatTable(
            title="Unique puzzles solved from the empty grid",
            row_names=tuple(f"{size} x {size}" for size in sizes),
            column_names=tuple(modes),
            values=tuple(
                tuple(solved.get((size, mode)) for mode in modes) for size in sizes
            ),
            caption="Raw decoding, most certain cell first; validation puzzles only.",
        ),
        Drawing(
            title=f"One unseen puzzle, {verdict}",
            svg=draw_svg(
                evidence.puzzle, evidence.answer.grid, right=evidence.answer.solution
            ),
            alt=(
                f"A {evidence.puzzle.size} by {evidence.puzzle.size} KenKen puzzle "
                f"filled in by the network; the answer is {verdict}."
            ),
            caption=(
                f"{evidence.answer.num_forwards} forwards of the network; the exact "
                f"solver needed {evidence.answer.num_nodes} trials to prove it."
            ),
        ),
        _grid_table(rows),
        _cell_table(rows),
    )


def _grid_table(rows: Sequence[Measures]) -> DataTable:
    return DataTable(
        title="Completed grids by size, alphabet and fill",
        caption=(
            "Fill is the chance that a cell is revealed. A completed grid keeps the "
            "hints, holds the alphabet in every row and column, and satisfies every "
            "cage. Different: distinct completed grids among all. Intervals are "
            "Wilson's, 95 %."
        ),
        columns=(
            *_KEY_COLUMNS,
            Column(name="completed", spelling="percent", digits=1),
            Column(name="different", spelling="percent", digits=1),
            Column(name="forwards"),
        ),
        rows=tuple(
            (*_key(row), _measured(row.valid), row.distinct_share, row.forwards)
            for row in rows
        ),
        folded=True,
    )


def _cell_table(rows: Sequence[Measures]) -> DataTable:
    return DataTable(
        title="Hidden cells after one forward, beside what is possible",
        caption=(
            "The ceiling of the accuracy and the floor of the loss are exact (unique "
            "puzzles, and Latin squares up to 5 x 5 by enumeration) and empty where "
            "nobody knows them. Loss is in nats per hidden cell."
        ),
        columns=(
            *_KEY_COLUMNS,
            Column(name="accuracy", spelling="percent", digits=1),
            Column(name="ceiling", spelling="percent", digits=1),
            Column(name="loss"),
            Column(name="floor"),
            Column(name="excess"),
        ),
        rows=tuple(
            (
                *_key(row),
                _measured(row.cell_accuracy),
                row.ceiling,
                row.cross_entropy,
                row.floor,
                row.excess,
            )
            for row in rows
        ),
        folded=True,
    )


_KEY_COLUMNS = (
    Column(name="puzzle", spelling="text"),
    Column(name="size"),
    Column(name="alphabet", spelling="text"),
    Column(name="fill", spelling="text"),
)


def _key(row: Measures) -> tuple[str, int, str, str]:
    fill = "empty" if row.fill == (0.0, 0.0) else f"{row.fill[0]}-{row.fill[1]}"
    return str(row.kind), row.size, str(row.mode), fill


def _precision_blocks(evidence: Evidence) -> tuple[Facts | DataTable, ...]:
    stepped = evidence.facts["optimizer"]
    optimizer = Fact(
        name="optimizer",
        value=stepped["in_force"],
        asked=stepped["asked"],
        because=stepped["because"],
    )
    return precision_story(evidence.facts, more=(optimizer,))


def _series(name: str, records: Sequence[Record], value: str) -> Series:
    chosen = [record for record in records if value in record.values]
    return Series(
        name=name,
        xs=tuple(float(record.step) for record in chosen),
        ys=tuple(float(record.values[value]) for record in chosen),
    )


def _training_blocks(evidence: Evidence) -> tuple[Lines | DataTable, ...]:
    train, epochs, skips = (evidence.of(e) for e in ("train", "epoch", "skip"))
    markers = scale_markers(skips)
    return (
        Lines(
            title="Loss",
            series=(
                _series("training batch", train, "loss"),
                _series("validation, empty grid", epochs, "validation_loss"),
            ),
            y_label="nats per hidden cell",
            log_y=True,
            markers=markers,
        ),
        *stage_story(
            curriculum_of(evidence.settings),
            evidence.records,
            evidence.result.num_steps,
        ),
        Lines(
            title="Solved from the empty grid, by epoch",
            series=tuple(
                _series(f"{size} x {size}", epochs, f"solved_{size}")
                for size in evidence.settings.sizes
            ),
            y_label="share",
            y_spelling="percent",
            caption="Averaged weights, all alphabets, a sample of validation puzzles.",
        ),
        Lines(
            title="Time of one step",
            series=(_series("median of ten", train, "step_ms"),),
            y_label="ms",
        ),
        Lines(
            title="Learning rate",
            series=(_series("learning rate", train, "learning_rate"),),
        ),
        *scale_story(evidence.records),
    )


def _memory_blocks(evidence: Evidence) -> tuple[DataTable, ...]:
    return (
        DataTable(
            title="Memory by epoch",
            caption="Of the whole process on a CPU, of the allocator on a GPU.",
            columns=(
                Column(name="epoch"),
                Column(name="step"),
                Column(name="now", spelling="bytes"),
                Column(name="peak in training", spelling="bytes"),
                Column(name="peak in evaluation", spelling="bytes"),
            ),
            rows=tuple(
                (
                    record.values["epoch"],
                    float(record.step),
                    MIB * record.values["memory_mib"],
                    MIB * record.values["train_peak_mib"],
                    MIB * record.values["evaluate_peak_mib"],
                )
                for record in evidence.of("epoch")
            ),
        ),
    )


def _data_blocks(evidence: Evidence) -> tuple[Note | DataTable, ...]:
    notes = {
        world_note(size, parse_mode(mode), kind)
        for size in evidence.settings.sizes
        for mode in evidence.settings.modes
        for kind in Kind
    }
    return (
        Note(
            text="Training and validation never share a puzzle: a hash that swaps of "
            "rows, columns and axes do not change decides to which a puzzle belongs. "
            f"Generator version {GENERATOR_VERSION}."
        ),
        *(Note(text=note, mark="warning") for note in sorted(notes) if note),
        DataTable(
            title="Sets",
            columns=(
                Column(name="set", spelling="text"),
                Column(name="content hash", spelling="text"),
            ),
            rows=tuple(evidence.facts["data"].items()),
            folded=True,
        ),
    )


def _settings_blocks(evidence: Evidence) -> tuple[Facts | Note, ...]:
    return (
        Facts(
            facts=tuple(
                Fact(name=name, value=str(value))
                for name, value in evidence.settings.describe().items()
            )
        ),
        Facts(
            title="Policy",
            facts=(Fact(name="policy.yaml", value=evidence.facts["policy"]),),
        ),
    )
