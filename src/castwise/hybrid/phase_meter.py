"""What each phase costs: formats, seconds, switches and the peak of its memory.

The precision of a phase is put into force when the phase begins, so whoever looks at
the model between two steps sees it in the precision of the next one. Memory is read
only at changes of phase: a reading costs 0.1 ms, and a peak needs no more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, final

from castwise.hybrid.phase_statistics import PhaseCount, PhaseStatistics
from castwise.memory.monitor import MemoryMonitor
from castwise.numerics.census import observe
from castwise.policy import Policy
from castwise.training.step import Run

Done = TypeVar("Done")


@final
class PhaseMeter:
    """Puts the precision of phases into force and measures what they cost.

    Args:
        run: The prepared model.
        asked: The policy before anything was exchanged for the device.
        observe_formats: Whether the first step of every phase is watched.
        monitor: Memory of the device; none to measure none.
    """

    def __init__(
        self,
        run: Run,
        asked: Policy,
        *,
        observe_formats: bool,
        monitor: MemoryMonitor | None,
    ) -> None:
        self.statistics = PhaseStatistics()
        self._run, self._asked = run, asked
        self._observe_formats, self._monitor = observe_formats, monitor
        self._peak = 0
        self._phase_is_over = False
        self.note_formats()

    def note_formats(self) -> None:
        """Note the format of every phase, asked for and in force."""
        effective = self._run.precision.effective
        for phase, count in self.statistics.phases.items():
            count.asked = self._asked.base_precision(phase=phase).compute or ""
            count.effective = effective.base_precision(phase=phase).compute or ""

    def enter(self, phase: str) -> None:
        """Put the precision of a phase into force, and count it if it was another."""
        if self._run.phase == phase:
            return
        self.read_memory()
        self._phase_is_over = False
        count = self.statistics.phases[phase]
        started = time.perf_counter()
        self._run.phase = phase
        count.switch_seconds += time.perf_counter() - started
        count.switches += 1

    @contextmanager
    def counted(self) -> Iterator[PhaseCount]:
        """Count one step of the phase in force, and its time."""
        count = self.statistics.phases[self._run.phase]
        started = time.perf_counter()
        yield count
        count.steps += 1
        count.seconds += time.perf_counter() - started

    def watched(self, work: Callable[[], Done], count: PhaseCount) -> Done:
        """Run a step, watched if it is the first of its phase and that is asked for."""
        if not self._observe_formats or count.steps:
            return work()
        done: list[Done] = []
        census = observe(lambda: done.append(work()))
        count.product_formats = census.product_shares()
        return done[0]

    def read_memory(self) -> None:
        """Take the peak for the phase in force, and begin the next one."""
        if self._monitor is None:
            return
        peak, now = self._monitor.peak_bytes(), self._monitor.now_bytes()
        self._peak = max(self._peak, peak)
        if not self._phase_is_over:
            count = self.statistics.phases[self._run.phase]
            count.peak_bytes = max(count.peak_bytes, peak)
            count.held_bytes = max(count.held_bytes, now)
        self._monitor.reset_peak()

    def end_phase(self) -> None:
        """Take the peak; what follows, up to the next phase, belongs to none."""
        self.read_memory()
        self._phase_is_over = True

    def take_peak(self) -> int:
        """Return the highest peak since this was last asked."""
        self.read_memory()
        peak, self._peak = self._peak, 0
        return peak
