"""How a run is opened and closed: what a person reads, and the evidence on disk.

At the end the whole table is measured once (size, mode, kind and fill, each with the
number of samples and Wilson's interval), one validation puzzle is solved and drawn, and
the report is written. The journal is the only source of the curves, so the report of a
resumed run shows the whole run.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from castwise.decision import Decision
from castwise.numerics.census import FormatCensus
from castwise.recipes.kenken.decoding import DecodingSettings, predictor_of
from castwise.recipes.kenken.drawing import can_draw_boxes, draw_rich
from castwise.recipes.kenken.measures import Measures
from castwise.recipes.kenken.puzzle_set import Kind
from castwise.recipes.kenken.puzzles import Puzzle, puzzle_at
from castwise.recipes.kenken.run_report import Evidence, write_run_report
from castwise.recipes.kenken.settings import KenKenSettings
from castwise.recipes.kenken.solver import Answer, answer
from castwise.recipes.kenken.solving import sentence
from castwise.recipes.kenken.supply import Supply
from castwise.recipes.kenken.task import KenKenTask
from castwise.training.journal import Journal, read_journal
from castwise.training.run_folder import RunFolder
from castwise.training.trainer import FitResult

KENKEN_FILLS = ((0.0, 0.0), (0.1, 0.4))
LATIN_FILLS = ((0.0, 0.0), (0.1, 0.4), (0.4, 0.7))
LATIN_SHARE = 8  # a square is drawn cell by cell, so fewer of them are measured


def opening_lines(facts: Mapping[str, Any], folder: RunFolder) -> list[str]:
    """Say what was asked, what really runs, where, and where it is written."""
    census = FormatCensus.from_record(facts["effective"])
    device = f"{facts['device']} ({facts['device_because']})"
    optimizer = Decision(facts["optimizer"]["in_force"], facts["optimizer"]["because"])
    return [
        f"asked      {facts['asked_by']}",
        f"in force   {facts['in_force']}",
        f"effective  {census.summary()}",
        f"optimizer  {optimizer}",
        f"device     {device}, {facts['num_threads']} threads",
        f"folder     {folder.path}",
    ]


def close(
    *,
    task: KenKenTask,
    supply: Supply,
    settings: KenKenSettings,
    facts: Mapping[str, Any],
    result: FitResult,
    folder: RunFolder,
    journal: Journal,
    console: Console,
    writes: bool = True,
) -> None:
    """Measure, draw one puzzle, write the report, and say how it went.

    Args:
        task: The recipe's work, with the weights to measure in its model.
        supply: Puzzle sets.
        settings: Of the run.
        facts: What stands in the checkpoints.
        result: How the loop ended.
        folder: Where the report goes.
        journal: Gets one line with the final figures.
        console: Where a person reads.
        writes: Whether to write the report; of several processes only one does
            (default: True).
    """
    with console.status("measuring"):
        rows = measure_all(task, supply, settings)
        puzzle, found = solve_one(task, supply, settings)
    journal.write("final", result.num_steps, final_values(rows))
    if not writes:
        return
    evidence = Evidence(
        settings=settings,
        facts=facts,
        result=result,
        records=tuple(read_journal(journal.path)),
        rows=rows,
        puzzle=puzzle,
        answer=found,
    )
    write_run_report(evidence, folder.report)
    console.print(result_table(rows))
    boxes = can_draw_boxes(sys.stdout.encoding)
    console.print(
        draw_rich(puzzle, found.grid, right=found.solution, ascii_only=not boxes)
    )
    console.print(sentence(found), highlight=False)
    console.print(
        f"{result.num_steps} steps in {result.train_seconds:.0f} s; "
        f"report: {folder.report}",
        highlight=False,
        soft_wrap=True,
    )


def measure_all(
    task: KenKenTask, supply: Supply, settings: KenKenSettings
) -> tuple[Measures, ...]:
    """Measure every validation set on every bin of fills."""
    rows: list[Measures] = []
    for puzzles in supply.validation.values():
        kenken = puzzles.kind is Kind.KENKEN
        num = settings.num_validation
        rows += task.measure(
            [puzzles],
            num_puzzles=num if kenken else max(1, num // LATIN_SHARE),
            fills=KENKEN_FILLS if kenken else LATIN_FILLS,
        )
    return tuple(rows)


def solve_one(
    task: KenKenTask, supply: Supply, settings: KenKenSettings
) -> tuple[Puzzle, Answer]:
    """Solve the first validation puzzle of the largest size, in the run's precision."""
    candidates = [s for s in supply.validation.values() if s.kind is Kind.KENKEN]
    puzzles = max(candidates, key=lambda each: each.size)
    puzzle = puzzle_at(puzzles, 0)
    predict = predictor_of(task.model, settings.num_loops)
    with task.inference():
        return puzzle, answer(predict, [puzzle], DecodingSettings())[0]


def solved_from_empty(
    rows: Sequence[Measures], size: int, mode: str
) -> Measures | None:
    """Return the row of unique puzzles of a size and mode shown without a hint."""
    wanted = (size, mode, Kind.KENKEN, (0.0, 0.0))
    for row in rows:
        if (row.size, str(row.mode), row.kind, row.fill) == wanted:
            return row
    return None


def final_values(rows: Sequence[Measures]) -> dict[str, float]:
    """Return the solved rates for the journal: by size and mode, and the mean."""
    solved = [r for r in rows if r.kind is Kind.KENKEN and r.fill == (0.0, 0.0)]
    values = {f"solved_{r.size}_{r.mode}": r.valid.value for r in solved}
    return {**values, "solved": fmean(values.values())}


def result_table(rows: Sequence[Measures]) -> Table:
    """Return the headline as a table: unique puzzles solved from the empty grid."""
    sizes = sorted({row.size for row in rows})
    modes = list(dict.fromkeys(str(row.mode) for row in rows))
    table = Table(title="unique puzzles solved from the empty grid, without search")
    table.add_column("size")
    for mode in modes:
        table.add_column(mode, justify="right")
    for size in sizes:
        found = [solved_from_empty(rows, size, mode) for mode in modes]
        table.add_row(
            f"{size} x {size}", *(str(row.valid) if row else "" for row in found)
        )
    return table
