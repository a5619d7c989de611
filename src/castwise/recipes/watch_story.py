"""A watch over a run that a trainer steps: into the journal, and from there on a page.

Each window becomes one line "watch": its measures as numbers, which TensorBoard draws,
and the whole window, so that the report of a resumed run shows every window of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from castwise.numerics.watch import Watch, WatchSchedule, watch
from castwise.numerics.watch.windows import WatchWindow
from castwise.report.records import Section
from castwise.report.watched import Promotion, watch_sections
from castwise.training.journal import Journal, Record
from castwise.training.step import Run

EVENT = "watch"


def journaled_watch(
    run: Run, journal: Journal, *, every: int, first_step: int = 0
) -> Watch:
    """Return a watch that writes its windows into a journal.

    Args:
        run: What is stepped.
        journal: Gets a line for each window.
        every: Steps from one that is looked at to the next.
        first_step: Number of the next step, after a resume.
    """

    def tell(window: WatchWindow) -> None:
        values = {**window.measures(), "window": window.record()}
        journal.write(EVENT, window.last_step + 1, values)

    schedule = WatchSchedule(every=every)
    return watch(run, schedule=schedule, first_step=first_step, on_window=tell)


def watch_story(records: Sequence[Record]) -> tuple[Section, ...]:
    """Return the chapters on what was watched; none where nothing was.

    Args:
        records: The journal of a run, in its order.
    """
    windows = [
        WatchWindow.from_record(record.values["window"])
        for record in records
        if record.event == EVENT
    ]
    return watch_sections(windows, _promotions(records)) if windows else ()


def _promotions(records: Sequence[Record]) -> list[Promotion]:
    """What a sentinel changed, by the lines "policy"."""
    return [
        Promotion(
            step=record.step,
            module=str(record.values["module"]),
            precision=record.values["precision"] or "as the policy says",
            because=str(record.values["because"]),
        )
        for record in records
        if record.event == "policy"
    ]
