"""The four phases of a run, and the table that says which follows which, and why.

    warmup --> full --> predict --> correct
                ^ |        |          |
                +-+ <------+ <--------+      (correct --> predict, if the gate is open)

After every step the rows of the phase are asked in order, and the first one that holds
is the transition; each carries its reason into the record. Warmup, full and correct
compute gradients, predict does not. Between two predict phases there is a gradient,
because the only ways out of predict lead to phases that compute one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, final

from castwise.errors import PhaseError
from castwise.policy import PHASES, PHASES_WITH_BACKWARD


class Phase(StrEnum):
    """Part of a run; the words are those of a policy's rules."""

    WARMUP = "warmup"
    FULL = "full"
    PREDICT = "predict"
    CORRECT = "correct"

    @property
    def computes_backward(self) -> bool:
        """Whether steps of this phase compute gradients."""
        return self.value in PHASES_WITH_BACKWARD


assert tuple(Phase) == PHASES, "a policy and a run must speak of the same phases"


def parse_phase(text: str) -> Phase:
    """Return the phase of a name.

    Raises:
        PhaseError: There is no such phase.
    """
    if text not in PHASES:
        raise PhaseError(f"a phase is one of {', '.join(PHASES)}, got {text!r}")
    return Phase(text)


PredictionState = Literal["none", "running", "accepted", "refused"]
"""Where a prediction stands; `refused` has been rolled back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseLengths:
    """What the table compares with."""

    warmup_steps: int
    """Steps before anything is predicted."""

    full_steps: int
    """Steps of a full phase before the gate is asked."""

    correct_steps: int
    """Real steps at a landing point; 0 leaves the phase out."""

    confidence_threshold: float
    """The gate opens at this confidence."""

    max_consecutive: int
    """Predict phases that may follow each other without a full phase between them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What the trainer knows after a step, for the rows to look at."""

    window_ended: bool = False
    """Whether the predictor has just seen enough steps to propose something."""

    confidence: float | None = None
    """The predictor's back-test; none before there was one."""

    cooling: int = 0
    """Real steps for which nothing is to be predicted."""

    declined: str = ""
    """Why not to predict is the better choice; empty if it is not."""

    prediction: PredictionState = "none"
    """Where the prediction of this phase stands."""

    because: str = ""
    """Why the prediction ended as it did, or what went wrong after it."""

    alarm: bool = False
    """Whether the loss has left its course; `because` says how."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transition:
    """One change of phase, for the record."""

    step: int
    """Steps of the run when it happened, predicted ones included."""

    source: str
    """The phase that ended."""

    target: str
    """The phase that begins."""

    because: str
    """The reason, one clause."""

    def __str__(self) -> str:
        return f"step {self.step}: {self.source} -> {self.target}, {self.because}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _View:
    """What a row can look at."""

    lengths: PhaseLengths
    evidence: Evidence
    num_steps: int
    full_length: int
    num_consecutive: int

    def gate(self) -> str | None:
        """Say why the gate is shut; None if it is open."""
        seen, lengths = self.evidence, self.lengths
        if seen.cooling > 0:
            return f"refused proposals are cooling down for {seen.cooling} steps"
        if self.num_consecutive >= lengths.max_consecutive:
            return f"{self.num_consecutive} predict phases had no full phase between"
        if seen.confidence is None:
            return "no prediction was back-tested yet"
        if not seen.confidence >= lengths.confidence_threshold:
            return (
                f"confidence {seen.confidence:.2f} is below "
                f"{lengths.confidence_threshold:g}"
            )
        return seen.declined or None

    def opens(self) -> bool:
        return self.evidence.window_ended and self.gate() is None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table: from where to where, when, and how to say why."""

    source: Phase
    target: Phase
    holds: Callable[[_View], bool]
    because: Callable[[_View], str]


def _confident(view: _View) -> str:
    return (
        f"confidence {view.evidence.confidence or 0.0:.2f} reaches "
        f"{view.lengths.confidence_threshold:g}"
    )


def _reason(view: _View) -> str:
    return view.evidence.because


TABLE: tuple[Row, ...] = (
    Row(
        source=Phase.WARMUP,
        target=Phase.FULL,
        holds=lambda view: view.num_steps >= view.lengths.warmup_steps,
        because=lambda view: f"{view.lengths.warmup_steps} steps of warmup are done",
    ),
    Row(
        source=Phase.FULL,
        target=Phase.FULL,
        holds=lambda view: view.evidence.alarm,
        because=_reason,
    ),
    Row(
        source=Phase.FULL,
        target=Phase.PREDICT,
        holds=lambda view: view.num_steps >= view.full_length and view.opens(),
        because=_confident,
    ),
    Row(
        source=Phase.FULL,
        target=Phase.FULL,
        holds=lambda view: (
            view.num_steps >= view.full_length and view.evidence.window_ended
        ),
        because=lambda view: view.gate() or "the gate is shut",
    ),
    Row(
        source=Phase.PREDICT,
        target=Phase.FULL,
        holds=lambda view: view.evidence.prediction == "refused",
        because=_reason,
    ),
    Row(
        source=Phase.PREDICT,
        target=Phase.CORRECT,
        holds=lambda view: (
            view.evidence.prediction == "accepted" and view.lengths.correct_steps > 0
        ),
        because=_reason,
    ),
    Row(
        source=Phase.PREDICT,
        target=Phase.FULL,
        holds=lambda view: view.evidence.prediction == "accepted",
        because=_reason,
    ),
    Row(
        source=Phase.CORRECT,
        target=Phase.FULL,
        holds=lambda view: view.evidence.alarm,
        because=_reason,
    ),
    Row(
        source=Phase.CORRECT,
        target=Phase.PREDICT,
        holds=lambda view: (
            view.num_steps >= view.lengths.correct_steps and view.opens()
        ),
        because=_confident,
    ),
    Row(
        source=Phase.CORRECT,
        target=Phase.FULL,
        holds=lambda view: view.num_steps >= view.lengths.correct_steps,
        because=lambda view: f"{view.lengths.correct_steps} corrective steps are done",
    ),
)
"""Asked from top to bottom; the first row of the phase that holds decides."""

ALLOWED = frozenset((row.source, row.target) for row in TABLE)
"""Every change of phase that the table knows."""


@final
class PhaseMachine:
    """Where a run stands among its phases."""

    def __init__(self, lengths: PhaseLengths) -> None:
        self._lengths = lengths
        self.phase = Phase.WARMUP
        self.num_steps = 0
        """Steps of the run so far, predicted ones included."""
        self.steps_in_phase = 0
        self.num_consecutive = 0
        """Predict phases since the last full phase."""
        self.full_length = lengths.full_steps
        """Steps of the present full phase; longer after an alarm."""

    def would_predict(self, evidence: Evidence) -> bool:
        """Say whether the step that `advance` is to count would begin a prediction."""
        row = self._row_of(evidence, self.steps_in_phase + 1)
        return row is not None and row.target is Phase.PREDICT

    def _row_of(self, evidence: Evidence, num_steps: int) -> Row | None:
        view = self._view(evidence, num_steps)
        rows = (row for row in TABLE if row.source is self.phase and row.holds(view))
        return next(rows, None)

    def _view(self, evidence: Evidence, num_steps: int) -> _View:
        return _View(
            lengths=self._lengths,
            evidence=evidence,
            num_steps=num_steps,
            full_length=self.full_length,
            num_consecutive=self.num_consecutive,
        )

    def advance(self, evidence: Evidence) -> Transition | None:
        """Count one step of the phase, and change phase if a row holds."""
        self.num_steps += 1
        self.steps_in_phase += 1
        row = self._row_of(evidence, self.steps_in_phase)
        if row is None:
            return None
        view = self._view(evidence, self.steps_in_phase)
        longer = evidence.alarm and row.target is Phase.FULL
        return self.go(row.target, row.because(view), times=1 + longer)

    def go(self, target: Phase, because: str, *, times: int = 1) -> Transition:
        """Change phase.

        Args:
            target: The phase to begin.
            because: The reason, for the record.
            times: How many times `full_steps` a full phase shall last. Default: 1.

        Raises:
            PhaseError: The table knows no such transition.
        """
        if (self.phase, target) not in ALLOWED:
            allowed = sorted(to.value for here, to in ALLOWED if here is self.phase)
            raise PhaseError(
                f"{self.phase.value} is followed by {' or '.join(allowed)}, got "
                f"{target.value}; go through full"
            )
        made = Transition(
            step=self.num_steps,
            source=self.phase.value,
            target=target.value,
            because=because,
        )
        self.phase, self.steps_in_phase = target, 0
        if target is Phase.PREDICT:
            self.num_consecutive += 1
        elif target is Phase.FULL:
            self.num_consecutive = 0
            self.full_length = times * self._lengths.full_steps
        return made

    def state_dict(self) -> dict[str, Any]:
        """Return where the run stands, as plain values."""
        return {
            "phase": self.phase.value,
            "num_steps": self.num_steps,
            "steps_in_phase": self.steps_in_phase,
            "num_consecutive": self.num_consecutive,
            "full_length": self.full_length,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.phase = parse_phase(state["phase"])
        self.num_steps = int(state["num_steps"])
        self.steps_in_phase = int(state["steps_in_phase"])
        self.num_consecutive = int(state["num_consecutive"])
        self.full_length = int(state["full_length"])
