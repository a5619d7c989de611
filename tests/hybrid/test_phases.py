"""The table of transitions, without a model."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castwise.errors import PhaseError
from castwise.hybrid.phases import (
    ALLOWED,
    Evidence,
    Phase,
    PhaseLengths,
    PhaseMachine,
    parse_phase,
)
from castwise.policy import PHASES, PHASES_WITH_BACKWARD

LENGTHS = PhaseLengths(
    warmup_steps=3,
    full_steps=4,
    correct_steps=2,
    confidence_threshold=0.6,
    max_consecutive=2,
)
OPEN = Evidence(window_ended=True, confidence=0.6)


def machine_in(phase: str, *, steps_in_phase: int = 0) -> PhaseMachine:
    """A machine that has been in a phase for some steps."""
    machine = PhaseMachine(LENGTHS)
    state = machine.state_dict()
    machine.load_state_dict(state | {"phase": phase, "steps_in_phase": steps_in_phase})
    return machine


def test_phases_are_those_of_a_policy() -> None:
    """A rule on a phase and a phase of a run are one word."""
    assert tuple(Phase) == PHASES
    assert {p.value for p in Phase if p.computes_backward} == set(PHASES_WITH_BACKWARD)


@pytest.mark.parametrize(
    ("source", "done", "evidence", "target", "because"),
    [
        ("warmup", 1, OPEN, None, ""),
        ("warmup", 2, Evidence(), "full", "3 steps of warmup are done"),
        ("full", 2, OPEN, None, ""),
        ("full", 3, Evidence(confidence=0.9), None, ""),
        ("full", 3, OPEN, "predict", "confidence 0.60 reaches 0.6"),
        (
            "full",
            3,
            Evidence(window_ended=True, confidence=0.59),
            "full",
            "confidence 0.59 is below 0.6",
        ),
        (
            "full",
            3,
            Evidence(window_ended=True, confidence=0.9, cooling=7),
            "full",
            "refused proposals are cooling down for 7 steps",
        ),
        ("full", 3, Evidence(window_ended=True), "full", "no prediction was back-t"),
        ("full", 0, Evidence(alarm=True, because="the loss rose"), "full", "the loss"),
        ("predict", 0, Evidence(prediction="running"), None, ""),
        ("predict", 0, Evidence(prediction="accepted", because="x"), "correct", "x"),
        ("predict", 0, Evidence(prediction="refused", because="NaN"), "full", "NaN"),
        ("correct", 0, OPEN, None, ""),
        ("correct", 0, Evidence(alarm=True, because="the loss rose"), "full", "the lo"),
        ("correct", 1, OPEN, "predict", "confidence 0.60 reaches 0.6"),
        ("correct", 1, Evidence(), "full", "2 corrective steps are done"),
    ],
)
def test_each_row_of_the_table(
    source: str, done: int, evidence: Evidence, target: str | None, because: str
) -> None:
    """Every transition happens when its row says so, and gives its reason."""
    machine = machine_in(source, steps_in_phase=done)
    made = machine.advance(evidence)
    if target is None:
        assert made is None
        assert machine.phase == source
    else:
        assert made is not None
        assert (made.source, made.target) == (source, target)
        assert because in made.because
        assert machine.phase == target
        assert machine.steps_in_phase == 0


def test_without_corrective_steps_a_landing_leads_to_full() -> None:
    """`correct_steps=0` leaves the phase out."""
    lengths = PhaseLengths(
        warmup_steps=1,
        full_steps=1,
        correct_steps=0,
        confidence_threshold=0.5,
        max_consecutive=1,
    )
    machine = PhaseMachine(lengths)
    machine.go(Phase.FULL, "begin")
    machine.go(Phase.PREDICT, "try")
    made = machine.advance(Evidence(prediction="accepted", because="it fell"))
    assert made is not None
    assert made.target == "full"


def test_an_alarm_doubles_the_full_phase() -> None:
    """After an alarm the gate is asked half as soon."""
    machine = machine_in("full")
    machine.advance(Evidence(alarm=True, because="the loss rose"))
    assert machine.full_length == 2 * LENGTHS.full_steps
    for _ in range(2 * LENGTHS.full_steps - 1):
        assert machine.advance(OPEN) is None
    assert machine.advance(OPEN) is not None


def test_predictions_in_a_row_are_limited() -> None:
    """Correct may lead back to predict, but only so often without a full phase."""
    machine = machine_in("full", steps_in_phase=3)
    targets = []
    for _ in range(12):
        accepted = machine.phase is Phase.PREDICT
        evidence = Evidence(prediction="accepted") if accepted else OPEN
        made = machine.advance(evidence)
        targets += [made.target] if made else []
    assert targets[:5] == ["predict", "correct", "predict", "correct", "full"]


@pytest.mark.parametrize(
    ("source", "target"),
    [(a, b) for a in Phase for b in Phase if (a, b) not in ALLOWED],
)
def test_other_transitions_are_refused(source: Phase, target: Phase) -> None:
    """Predict cannot be reached from warmup, warmup from nowhere, and so on."""
    machine = machine_in(source.value)
    with pytest.raises(PhaseError, match=f"{source.value} is followed by"):
        machine.go(target, "just so")


EVIDENCE = st.builds(
    Evidence,
    window_ended=st.booleans(),
    confidence=st.none() | st.floats(allow_nan=True),
    cooling=st.integers(0, 3),
    prediction=st.sampled_from(["none", "running", "accepted", "refused"]),
    alarm=st.booleans(),
)


@given(st.lists(EVIDENCE, max_size=80))
def test_a_gradient_lies_between_any_two_predictions(course: list[Evidence]) -> None:
    """Whatever the evidence, predict is left for a phase that computes a gradient."""
    machine = PhaseMachine(LENGTHS)
    for evidence in course:
        before = machine.phase
        made = machine.advance(evidence)
        if made is not None:
            assert (before, machine.phase) in ALLOWED
            if before is Phase.PREDICT:
                assert machine.phase.computes_backward
        if before is Phase.WARMUP:
            assert machine.phase is not Phase.PREDICT


def test_a_confidence_that_is_no_number_keeps_the_gate_shut() -> None:
    """NaN is below every threshold."""
    machine = machine_in("full", steps_in_phase=3)
    made = machine.advance(Evidence(window_ended=True, confidence=float("nan")))
    assert made is not None
    assert made.target == "full"


def test_an_unknown_phase_is_refused_with_the_list() -> None:
    """The message names all four."""
    with pytest.raises(PhaseError, match="warmup, full, predict, correct, got 'train'"):
        parse_phase("train")


def test_a_transition_reads_as_a_sentence() -> None:
    """The record is for people."""
    made: Any = machine_in("warmup", steps_in_phase=2).advance(Evidence())
    assert str(made) == "step 1: warmup -> full, 3 steps of warmup are done"
