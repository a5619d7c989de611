"""The history of a run's loss scale: its course, the skipped steps, and their causes.

It is plain data of bounded size, so that every checkpoint can hold it and a report can
draw it: the last changes of the scale, the last skipped steps, and how often each cause
was met, over the whole run.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from castwise.training.outcome import Skipped, Stepped

NUM_CHANGES = 512
"""Changes of the scale that are remembered."""

NUM_SKIPS = 128
"""Skipped steps that are remembered one by one."""

NUM_CAUSES = 64
"""Causes that are counted by name; the rest is counted together."""

OTHER = "other causes"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleChange:
    """From a step on, another scale."""

    step: int
    """Steps that were tried before, skipped ones included."""

    scale: float
    """The scale of the next step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedStep:
    """One step that was skipped, in a line."""

    step: int
    """Its number, skipped ones included; the first is 1."""

    scale: float
    """The loss scale that it used."""

    cause: str
    """What went wrong, as it is counted."""

    because: str
    """What went wrong, with all figures."""


class ScaleHistory:
    """What happened to the scale; one for each run."""

    def __init__(self) -> None:
        self._changes: deque[ScaleChange] = deque(maxlen=NUM_CHANGES)
        self._skips: deque[SkippedStep] = deque(maxlen=NUM_SKIPS)
        self._causes: Counter[str] = Counter()

    @property
    def changes(self) -> tuple[ScaleChange, ...]:
        """The course of the scale, oldest first."""
        return tuple(self._changes)

    @property
    def skips(self) -> tuple[SkippedStep, ...]:
        """The last skipped steps, oldest first."""
        return tuple(self._skips)

    @property
    def causes(self) -> dict[str, int]:
        """How often each cause was met in the whole run, most frequent first."""
        return dict(self._causes.most_common())

    def note_scale(self, step: int, scale: float) -> None:
        """Remember the scale that the next step uses."""
        if not self._changes or self._changes[-1].scale != scale:
            self._changes.append(ScaleChange(step=step, scale=scale))

    def note(self, step: int, outcome: Stepped | Skipped) -> None:
        """Remember what became of a step."""
        self.note_scale(step - 1, outcome.scale)
        if isinstance(outcome, Skipped):
            cause = outcome.cause()
            if cause not in self._causes and len(self._causes) >= NUM_CAUSES:
                cause = OTHER
            self._causes[cause] += 1
            self._skips.append(
                SkippedStep(
                    step=step,
                    scale=outcome.scale,
                    cause=cause,
                    because=outcome.because,
                )
            )

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "changes": [asdict(each) for each in self._changes],
            "skips": [asdict(each) for each in self._skips],
            "causes": dict(self._causes),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._changes.clear()
        self._changes.extend(ScaleChange(**each) for each in state["changes"])
        self._skips.clear()
        self._skips.extend(SkippedStep(**each) for each in state["skips"])
        self._causes = Counter(state["causes"])
