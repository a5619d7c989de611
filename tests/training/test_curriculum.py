"""Curricula: conditions, stages, and what a resumed run must find again."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castwise.errors import CastwiseError, ContradictionError, SettingsError
from castwise.training.conditions import Comparison, parse_condition
from castwise.training.curriculum import Curriculum, Dimension, Stage

NAN = math.nan


def stages(*texts: str, **more: object) -> tuple[Stage, ...]:
    """Stages a, b, c ... with these conditions; the last has none."""
    found = [
        Stage(name=chr(97 + index), advance=parse_condition(text), **more)  # type: ignore[arg-type]
        for index, text in enumerate(texts)
    ]
    return (*found, Stage(name=chr(97 + len(texts))))


def one(dimension: Dimension) -> Curriculum:
    """A curriculum of one dimension."""
    return Curriculum((dimension,))


def walk(curriculum: Curriculum, values: list[float], measure: str = "m") -> str:
    """The stage after each epoch, as one word."""
    letters = []
    for step, value in enumerate(values):
        curriculum.observe(step, {measure: value})
        stage = curriculum.stage(next(iter(curriculum.dimensions)))
        assert stage is not None
        letters.append(stage.name)
    return "".join(letters)


# --- conditions


@pytest.mark.parametrize(
    ("text", "measures", "met"),
    [
        ("m >= 1", {"m": 1.0}, True),
        ("m > 1", {"m": 1.0}, False),
        ("m <= -1e-3", {"m": -0.001}, True),
        ("m < .5 and n > 2", {"m": 0.4, "n": 3.0}, True),
        ("m < .5 and n > 2", {"m": 0.4}, False),
        ("m < .5 or n > 2", {"m": 0.4}, True),
        ("m<1 and n<1 or k<1", {"m": 2.0, "n": 0.0, "k": 0.0}, True),
        ("m<1 and (n<1 or k<1)", {"m": 2.0, "n": 0.0, "k": 0.0}, False),
        ("m >= 1", {"m": NAN}, False),
        ("m < 1", {"m": NAN}, False),
    ],
)
def test_a_condition_is_what_it_reads_like(
    text: str,
    measures: dict[str, float],
    met: bool,
) -> None:
    """`or` binds weaker than `and`; what is missing or NaN is never met."""
    assert parse_condition(text).is_met(measures, {}, 0.0) is met


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "needs a measure where the end stands"),
        ("m", "needs one of >= <= > < where the end"),
        ("m == 1", "cannot hold '== 1'"),
        ("m >=", "needs a number where the end"),
        ("m >= x", "needs a number where 'x'"),
        ("m >= 1 for 0", "whole number of epochs, got 0"),
        ("m >= 1 for 1.5", "whole number of epochs, got 1.5"),
        ("(m >= 1", "a closing parenthesis"),
        ("m >= 1 n < 2", "the end, `and` or `or` where 'n'"),
        ("and >= 1", "needs a measure where 'and'"),
        ("m >= 1e999", "needs a number"),
    ],
)
def test_a_bad_condition_says_what_stands_where(text: str, says: str) -> None:
    """The message names what is needed and what came."""
    with pytest.raises(SettingsError, match=says.replace("(", r"\(")):
        parse_condition(text)


@given(st.text(max_size=40) | st.from_regex(r"[mn()<>=\s\d.andorf]{0,40}"))
def test_no_text_breaks_the_parser(text: str) -> None:
    """Any text is a condition or one clear error, and a condition prints itself."""
    try:
        found = parse_condition(text)
    except CastwiseError:
        return
    assert parse_condition(str(found)) == found


def test_a_condition_prints_as_it_is_read() -> None:
    """Its text form is canonical."""
    text = "(a >= 0.5 for 2 or b < 1) and epoch >= 3"
    assert str(parse_condition(text)) == text
    assert [*parse_condition(text).measures()] == ["a", "b"]
    assert parse_condition("a >= 1") == Comparison("a", ">=", 1.0)


# --- stages


def test_stages_follow_in_order_and_never_skip_one() -> None:
    """Even when every condition is met at once."""
    line = Dimension(name="d", stages=stages("m >= 0", "m >= 0", "m >= 0"))
    assert walk(one(line), [1.0] * 5) == "bcddd"


def test_patience_counts_epochs_in_a_row() -> None:
    """One bad epoch starts the count again."""
    line = Dimension(name="d", stages=stages("m >= 1 for 3"))
    assert walk(one(line), [1, 1, 0, 1, 1, 1]) == "aaaaab"


def test_hysteresis_forgives_a_small_step_back_but_begins_nothing() -> None:
    """Within the band a streak goes on; it never starts there."""
    line = Dimension(name="d", stages=stages("m >= 1 for 3"), hysteresis=0.1)
    assert walk(one(line), [1.0, 0.95, 0.95]) == "aab"
    assert walk(one(line), [0.95, 0.95, 0.95, 0.95]) == "aaaa"
    falling = Dimension(name="d", stages=stages("m < 1 for 2"), hysteresis=0.1)
    assert walk(one(falling), [0.9, 1.05]) == "ab"


def test_missing_and_nan_measures_hold() -> None:
    """They neither advance, nor go back, nor break a streak, nor spoil the mean."""
    line = Dimension(name="d", stages=stages("m >= 1 for 2"), smoothing=0.5)
    curriculum = one(line)
    curriculum.observe(0, {"m": 1.0})
    curriculum.observe(1, {"m": NAN})
    curriculum.observe(2, {})
    assert curriculum.history == ()
    assert [str(t) for t in curriculum.observe(3, {"m": 1.0})] == [
        "d: a -> b (m >= 1 for 2: m 1)"
    ]


def test_smoothing_is_a_running_mean_that_starts_anew_with_a_stage() -> None:
    """Weight .5 on the past: 0, 1, 1, 1 gives 0, .5, .75, .875."""
    line = Dimension(name="d", stages=stages("m >= 0.8", "m >= 0.8"), smoothing=0.5)
    assert walk(one(line), [0, 1, 1, 1, 0, 1, 1, 1]) == "aaabbbbc"


def test_a_stage_lasts_its_least_and_is_forced_after_its_most() -> None:
    """A forced change says so."""
    line = Dimension(
        name="d",
        stages=(
            Stage(name="a", advance=parse_condition("m >= 1"), min_epochs=3),
            Stage(name="b", advance=parse_condition("m >= 2"), max_epochs=2),
            Stage(name="c"),
        ),
    )
    curriculum = one(line)
    assert walk(curriculum, [1, 1, 1, 1, 1]) == "aabbc"
    first, second = curriculum.history
    assert not first.forced
    assert second.forced
    assert second.because == "forced after 2 epochs"


def test_epochs_in_a_stage_are_a_measure() -> None:
    """`epoch` starts again with every stage, and needs no evaluation."""
    line = Dimension(name="d", stages=stages("epoch >= 2", "epoch >= 3"))
    assert walk(one(line), [NAN] * 6) == "abbbcc"


def test_a_stage_can_come_back() -> None:
    """Regress goes one stage back, for its own reason."""
    line = Dimension(
        name="d",
        stages=(
            Stage(name="a", advance=parse_condition("m >= 1")),
            Stage(name="b", regress=parse_condition("m < 0.5 for 2")),
        ),
    )
    curriculum = one(line)
    assert walk(curriculum, [1, 0.4, 1, 0.4, 0.4, 0.4, 1]) == "bbbbaab"
    assert [t.after for t in curriculum.history] == ["b", "a", "b"]


def test_rehearsal_shares_the_training_with_earlier_stages() -> None:
    """Evenly, and the shares sum to one."""
    line = Dimension(
        name="d",
        stages=(
            Stage(name="a", advance=parse_condition("epoch >= 1")),
            Stage(name="b", advance=parse_condition("epoch >= 1"), rehearsal=0.3),
            Stage(name="c", rehearsal=0.4),
        ),
    )
    curriculum = one(line)
    expected = [{"a": 1.0}, {"a": 0.3, "b": 0.7}, {"a": 0.2, "b": 0.2, "c": 0.6}]
    for step, shares in enumerate(expected):
        found = {stage.name: share for stage, share in curriculum.shares("d")}
        assert found == pytest.approx(shares)
        curriculum.observe(step, {})


def test_a_dimension_that_is_not_enabled_has_no_stage() -> None:
    """The user's own setting stays in force, whatever is measured."""
    first = Dimension(name="size", stages=stages("epoch >= 1"))
    second = Dimension(name="mode", stages=stages("epoch >= 1"))
    curriculum = Curriculum((first, second), enabled=("mode",))
    curriculum.observe(0, {})
    assert curriculum.stage("size") is None
    assert curriculum.shares("size") == ()
    assert [t.dimension for t in curriculum.history] == ["mode"]


def test_the_learning_rate_rises_anew_after_a_change_of_stage() -> None:
    """Linearly over `num_rewarm` updates; before the first change it is untouched."""
    line = Dimension(name="d", stages=stages("epoch >= 1"))
    curriculum = Curriculum((line,), num_rewarm=3)
    assert curriculum.rate_factor(0) == 1.0
    curriculum.observe(10, {})
    factors = [curriculum.rate_factor(step) for step in range(10, 15)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0]
    with pytest.raises(SettingsError, match="num_rewarm"):
        Curriculum((line,), num_rewarm=-1)


def test_a_measure_that_never_comes_is_refused_before_the_first_step() -> None:
    """With the nearest name that does come."""
    curriculum = one(Dimension(name="d", stages=stages("solvd >= 1")))
    with pytest.raises(SettingsError, match=r"no measure solvd \(did you mean solved"):
        curriculum.check_measures(["solved", "loss"])
    curriculum.check_measures(["solvd"])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Dimension(name="d", stages=()), "needs stages"),
        (
            lambda: Dimension(name="d", stages=(Stage(name="a"), Stage(name="a"))),
            "names of their own",
        ),
        (
            lambda: Dimension(name="d", stages=(Stage(name="a"), Stage(name="b"))),
            "stage a would never end",
        ),
        (
            lambda: Dimension(name="d", stages=(Stage(name="a", rehearsal=0.1),)),
            "has no stage before it",
        ),
        (
            lambda: Dimension(name="d", stages=(Stage(name="a", max_epochs=3),)),
            "has no stage after it",
        ),
        (lambda: Stage(name="a", rehearsal=1.0), "rehearsal needs a share"),
        (lambda: Stage(name="a", min_epochs=3, max_epochs=2), "min_epochs <= max"),
        (lambda: Dimension(name="d", stages=stages("m>1"), smoothing=1.0), "smoothing"),
        (
            lambda: Curriculum(
                (
                    Dimension(name="d", stages=stages("m>1")),
                    Dimension(name="d", stages=stages("m>1")),
                )
            ),
            "share a name",
        ),
        (
            lambda: Curriculum(
                (Dimension(name="mode", stages=stages("m>1")),), enabled=("mod",)
            ),
            r"no dimension mod \(did you mean mode",
        ),
    ],
)
def test_curricula_that_cannot_be_walked_are_refused(make: object, says: str) -> None:
    """Each names the place and the remedy."""
    with pytest.raises(SettingsError, match=says):
        make()  # type: ignore[operator]


LINE = Dimension(
    name="d",
    stages=(
        Stage(name="a", advance=parse_condition("m >= 0.6 for 2"), max_epochs=6),
        Stage(
            name="b",
            advance=parse_condition("m >= 0.7 or epoch >= 5"),
            regress=parse_condition("m < 0.2 for 2"),
            min_epochs=2,
            rehearsal=0.2,
        ),
        Stage(name="c", regress=parse_condition("m < 0.1"), rehearsal=0.5),
    ),
    smoothing=0.3,
    hysteresis=0.05,
)
SERIES = st.lists(st.floats(0, 1) | st.just(NAN) | st.none(), min_size=1, max_size=30)


@given(SERIES, st.integers(0, 30))
def test_a_resumed_curriculum_goes_the_same_way(
    series: list[float | None], cut: int
) -> None:
    """State goes through JSON at any epoch; nothing afterwards differs."""

    def measures(value: float | None) -> dict[str, float]:
        return {} if value is None else {"m": value}

    whole, resumed = one(LINE), one(LINE)
    for step, value in enumerate(series):
        if step == cut:
            state = json.loads(json.dumps(resumed.state_dict()))
            resumed = one(LINE)
            resumed.load_state_dict(state)
        assert whole.observe(step, measures(value)) == resumed.observe(
            step, measures(value)
        )
    assert whole.state_dict() == resumed.state_dict()


@given(SERIES)
def test_every_walk_is_one_of_neighbours_and_keeps_its_dwell(
    series: list[float | None],
) -> None:
    """No stage is skipped, none is shorter than its least or longer than its most."""
    curriculum = one(LINE)
    began = 0
    for step, value in enumerate(series):
        before = curriculum.stage("d")
        assert before is not None
        changed = curriculum.observe(step, {} if value is None else {"m": value})
        assert sum(share for _, share in curriculum.shares("d")) == pytest.approx(1)
        lasted = step + 1 - began
        assert lasted <= (before.max_epochs or len(series))
        for transition in changed:
            assert lasted >= before.min_epochs
            assert abs(ord(transition.after) - ord(transition.before)) == 1
            began = step + 1


def test_state_of_another_curriculum_is_refused() -> None:
    """Other dimensions, or stages that are gone."""
    curriculum = one(LINE)
    curriculum.observe(0, {})
    state = curriculum.state_dict()
    other = one(Dimension(name="e", stages=stages("m>1")))
    with pytest.raises(ContradictionError, match="walks d, this one e"):
        other.load_state_dict(state)
    state["places"]["d"]["stage"] = "z"
    with pytest.raises(ContradictionError, match="stands in stage z of d"):
        curriculum.load_state_dict(state)


def test_stages_that_outlast_the_run_are_refused() -> None:
    """The last stage needs an epoch; the message says how many are missing."""
    waits = Stage(name="a", max_epochs=3)
    may_end = Stage(name="b", min_epochs=2, advance=parse_condition("m > 1"))
    walk = Curriculum((Dimension(name="d", stages=(waits, may_end, Stage(name="c"))),))
    walk.check_length(6)
    with pytest.raises(
        SettingsError, match=r"before c last 5 epochs.*shorten them by 1"
    ):
        walk.check_length(5)
    with pytest.raises(SettingsError, match="has 3; shorten them by 3"):
        walk.check_length(3)
