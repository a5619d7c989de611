from __future__ import annotations

import pytest

from castwise.hybrid import HybridSettings, HybridTrainer
from castwise.hybrid.arms import Arms
from planted import Planted, away
from small_task import SmallTask


def arms() -> Arms:
    """Lengths of 5, 10, 20 and 33 over cycles of 20 steps."""
    return Arms(least=5, most=33, full_steps=20)


def play(lengths: Arms, worth: dict[int, float], rounds: int) -> list[int]:
    """Reward each arm by what it is worth; return the arms by round, 0 for none."""
    played = []
    for _ in range(rounds):
        if lengths.decline():
            played.append(0)
            continue
        arm = lengths.length
        played.append(arm)
        lengths.accepted(credited=worth[arm] * arm, paid=0.7)
    return played


def test_every_length_inside_of_the_bounds_is_an_arm() -> None:
    """And the longest is one, though it stands in no list."""
    assert list(arms().lengths) == [5, 10, 20, 33]


def test_not_to_predict_wins_where_nothing_is_credited() -> None:
    """Each arm is tried, then ever more rarely."""
    played = play(arms(), dict.fromkeys((5, 10, 20, 33), 0.0), 400)
    assert set(played[:4]) == {5, 10, 20, 33}
    first, last = played[4:104], played[-100:]
    assert last.count(0) > first.count(0) >= 50
    assert last.count(0) >= 90


def test_the_arm_that_brings_most_is_played_most() -> None:
    """Twenty steps are worth what they claim, longer ones nothing."""
    played = play(arms(), {5: 0.2, 10: 0.6, 20: 1.0, 33: 0.0}, 200)
    assert played.count(20) > 0.6 * len(played)


def test_an_arm_is_tried_again_when_the_run_has_changed() -> None:
    """What was worth nothing becomes worth its steps, and is found."""
    lengths = arms()
    play(lengths, dict.fromkeys((5, 10, 20, 33), 0.0), 100)
    played = play(lengths, dict.fromkeys((5, 10, 20, 33), 1.0), 300)
    assert played[-100:].count(0) <= 5


def test_the_reason_names_the_next_best_arm() -> None:
    """A person learns what was declined."""
    lengths = arms()
    for _ in range(60):
        if not lengths.decline():
            lengths.refused(paid=3.0)
    reasons = [reason for _ in range(5) if (reason := lengths.decline())]
    assert reasons
    assert "not to predict is the best arm" in reasons[0]
    assert "steps" in reasons[0]


def test_a_caution_leaves_longer_arms_out_once() -> None:
    """The loss is leaving its course: go no further than before."""
    lengths = arms()
    assert lengths.decline() == ""
    assert lengths.length == 5
    lengths.refused(paid=1.0)
    lengths.shorten()
    lengths.decline()
    assert lengths.length == 5


def test_state_round_trips() -> None:
    """A resumed run chooses as the uninterrupted one."""
    one, other = arms(), arms()
    play(one, {5: 0.2, 10: 0.6, 20: 1.0, 33: 0.0}, 37)
    other.load_state_dict(one.state_dict())
    worth = {5: 0.9, 10: 0.1, 20: 0.3, 33: 0.5}
    assert play(one, worth, 50) == play(other, worth, 50)


def test_a_run_learns_not_to_predict() -> None:
    """Proposals that are always refused are declined, with the reason in the record."""
    task = SmallTask()
    settings = HybridSettings(
        warmup_steps=4, full_steps=4, phase_length="arms", max_predict_steps=20
    )
    trainer: HybridTrainer = task.trainer(settings, predictor=Planted(away))
    for step in range(300):
        trainer.step(task.batch(step))
    found = trainer.statistics
    assert found.refusals == found.tries > 2
    assert found.declined > found.tries
    reasons = [change.because for change in trainer.transitions]
    assert any("not to predict is the best arm" in reason for reason in reasons)


@pytest.mark.parametrize("name", ["phase_length", "predict_states"])
def test_a_word_that_is_no_choice_is_refused(name: str) -> None:
    """The choices are named."""
    from castwise.errors import SettingsError

    with pytest.raises(SettingsError, match=f"{name} needs"):
        HybridSettings(**{name: "sometimes"})  # type: ignore[arg-type]
