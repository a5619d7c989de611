"""A profile of a run that a trainer steps: files in its folder, a line in its journal.

RUN/profile/trace.json.gz     for ui.perfetto.dev
RUN/profile/profile.txt       the table, as the terminal shows it
RUN/profile/profile.json      the same as data
"""

from __future__ import annotations

from pathlib import Path

from castwise.training.journal import Journal
from castwise.training.profile import Profile, StepWindow, profile_steps
from castwise.training.step import Run
from castwise.training.trace_table import TraceTable

EVENT = "profile"


def journaled_profile(
    run: Run, journal: Journal, folder: Path, window: StepWindow, *, first_step: int
) -> Profile:
    """Return a profile that writes a line into a journal when its window ends.

    Args:
        run: What is stepped.
        journal: Gets the line.
        folder: Of the run.
        window: Which steps.
        first_step: Number of the next step, after a resume.
    """

    def tell(step: int, table: TraceTable) -> None:
        values = {
            "profiled_steps": table.num_steps,
            "profiled_step_ms": table.step_ms,
            "data_ms": table.data_ms,
            "num_casts": table.num_casts,
            "cast_mb": table.cast_mb,
            "num_wide": len(table.wide),
        }
        journal.write(EVENT, step, values)

    return profile_steps(
        run, folder / "profile", window, first_step=first_step, on_table=tell
    )
