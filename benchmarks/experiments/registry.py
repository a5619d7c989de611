"""The ten experiments by name."""

from __future__ import annotations

from experiments.a1_formats import Formats
from experiments.a2_recompute import Recompute
from experiments.a3_memory_log import MemoryLog
from experiments.a4_states import States
from experiments.a5_mode_stages import ModeStages
from experiments.a6_fill_stages import FillStages
from experiments.a7_scheduler import Scheduler
from experiments.a8_transitions import Transitions
from experiments.a9_full_curriculum import FullCurriculum
from experiments.a10_measures import Measuring
from experiments.contract import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    each.name: each
    for each in (
        Formats(),
        Recompute(),
        MemoryLog(),
        States(),
        ModeStages(),
        FillStages(),
        Scheduler(),
        Transitions(),
        FullCurriculum(),
        Measuring(),
    )
}
"""Every experiment by its name, A1 to A10."""
