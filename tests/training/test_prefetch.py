"""Batches that are drawn ahead are those that are drawn when they are needed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from castwise.errors import SettingsError
from castwise.training.prefetch import Prefetch

PATIENCE = 20.0  # seconds until a thread that should have drawn is given up


class Drawer:
    """Draws `(step, key)` itself, and notes who drew when."""

    def __init__(self) -> None:
        self.drawn: list[tuple[int, str]] = []
        self.threads: dict[tuple[int, str], str] = {}
        self._news = threading.Condition()

    def __call__(self, step: int, key: str) -> tuple[int, str]:
        """Return what was asked for."""
        with self._news:
            self.drawn.append((step, key))
            self.threads[step, key] = threading.current_thread().name
            self._news.notify_all()
        return step, key

    def wait_for(self, done: Callable[[], bool]) -> None:
        """Wait until enough has been drawn."""
        with self._news:
            assert self._news.wait_for(done, PATIENCE)


@pytest.mark.parametrize(("depth", "num_workers"), [(0, 1), (1, 1), (3, 1), (4, 3)])
def test_batches_are_those_of_their_step_and_key_in_any_order(
    depth: int, num_workers: int
) -> None:
    """A run that goes back, repeats a step or changes its stage gets what it asks."""
    draws = Prefetch(Drawer(), num_steps=9, depth=depth, num_workers=num_workers)
    asked = [*((step, "plain") for step in (0, 1, 2, 2, 1, 2, 3))]
    asked += [*((step, "all") for step in (3, 4, 7, 8)), (8, "plain")]
    assert [draws.batch(*each) for each in asked] == asked


def test_the_next_batches_are_drawn_before_they_are_asked_for() -> None:
    """While the first step computes, the next two are begun, and no third."""
    drawer = Drawer()
    draws = Prefetch(drawer, num_steps=100, depth=2)
    draws.batch(0, "a")
    drawer.wait_for(lambda: len(drawer.drawn) == 3)
    assert sorted(drawer.drawn) == [(0, "a"), (1, "a"), (2, "a")]
    draws.batch(1, "a")
    drawer.wait_for(lambda: len(drawer.drawn) == 4)
    assert drawer.drawn.count((1, "a")) == 1
    assert drawer.threads[0, "a"] == threading.current_thread().name
    assert drawer.threads[3, "a"].startswith("prefetch")


def test_nothing_is_drawn_behind_the_last_step() -> None:
    """The data of a step that never comes may not even exist."""
    drawer = Drawer()
    draws = Prefetch(drawer, num_steps=3, depth=4)
    for step in range(3):
        draws.batch(step, "a")
    assert sorted(drawer.drawn) == [(0, "a"), (1, "a"), (2, "a")]


def test_without_depth_the_caller_draws_alone() -> None:
    """Nothing is begun, and no thread is made."""
    drawer, before = Drawer(), threading.active_count()
    draws = Prefetch(drawer, num_steps=3, depth=0)
    draws.batch(0, "a")
    assert drawer.drawn == [(0, "a")]
    assert threading.active_count() == before


def test_an_error_is_told_at_the_step_that_it_belongs_to() -> None:
    """A batch that cannot be drawn stops its own step, and not the one before."""

    def draw(step: int, key: str) -> int:
        if step == 1:
            message = f"no {key} for step 1"
            raise ValueError(message)
        return step

    draws = Prefetch(draw, num_steps=5, depth=2)
    assert draws.batch(0, "square") == 0
    with pytest.raises(ValueError, match="no square for step 1"):
        draws.batch(1, "square")
    assert draws.batch(2, "square") == 2


@pytest.mark.parametrize(("depth", "num_workers"), [(-1, 1), (2, 0)])
def test_a_depth_without_a_meaning_is_refused(depth: int, num_workers: int) -> None:
    """The message says what is needed."""
    with pytest.raises(SettingsError, match="at least 0 and a thread"):
        Prefetch(Drawer(), num_steps=1, depth=depth, num_workers=num_workers)
