"""What an experiment is: arms and seeds to run, and checks that judge what came out.

A *trial* is one arm with one seed; it returns plain values and knows nothing of the
others. A *check* compares what the trials of an experiment gave with a threshold that
was written down before. Arms share their seeds, so that differences are paired.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

THRESHOLDS = Path(__file__).with_name("thresholds.json")

Values = Mapping[str, Any]
"""What one trial measured, as plain data."""

Results = Mapping[str, Mapping[int, Values]]
"""Values by arm and seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One arm with one seed."""

    experiment: str
    """Name of the experiment, such as A5."""

    arm: str
    """What is done."""

    seed: int
    """Of weights, data order and masks."""

    @property
    def key(self) -> str:
        """How the record calls it."""
        return f"{self.arm}/{self.seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One figure against one threshold."""

    name: str
    """What was measured."""

    value: float
    """The figure."""

    interval: tuple[float, float] | None = None
    """Its 95 % interval; None for what is counted and not estimated."""

    num: int
    """What it rests on: paired seeds, samples, or cases."""

    need: str
    """What it has to be, in words."""

    holds: bool
    """Whether it is."""

    control: bool = False
    """Whether this shows that the experiment would notice a failure."""

    def __str__(self) -> str:
        verdict = "holds " if self.holds else "MISSED"
        between = ""
        if self.interval is not None:
            between = f" [{self.interval[0]:.4g}, {self.interval[1]:.4g}]"
        word = "control: " if self.control else ""
        return (
            f"{verdict} {word}{self.name}: {self.value:.4g}{between} of {self.num}; "
            f"needs {self.need}"
        )


class Experiment(ABC):
    """One question with its arms, its seeds and its thresholds."""

    name: ClassVar[str]
    """A1 to A10."""

    question: ClassVar[str]
    """One sentence."""

    arms: ClassVar[tuple[str, ...]]
    """What is compared."""

    num_seeds: ClassVar[int] = 1
    """Seeds of every arm."""

    first_seed: ClassVar[int] = 0
    """The first of them: none that anyone looked at while the design was made."""

    settings: ClassVar[Mapping[str, Any]] = {}
    """Every number that changes what a trial gives."""

    shows: ClassVar[Mapping[str, str]] = {}
    """Values that the page lists for every arm, with their headings."""

    rooms: ClassVar[tuple[ModuleType, ...]] = ()
    """Shared rooms of this package that the trials run through."""

    @abstractmethod
    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Run one trial, single-threaded, and return what it measured."""

    @abstractmethod
    def judge(self, results: Results, limits: Mapping[str, float]) -> list[Check]:
        """Compare the results of all arms and seeds with the frozen thresholds."""

    def trials(self, num_seeds: int | None = None) -> list[Trial]:
        """List what has to run, seed by seed, so that pairs are complete early."""
        return [
            Trial(experiment=self.name, arm=arm, seed=seed)
            for seed in range(
                self.first_seed, self.first_seed + (num_seeds or self.num_seeds)
            )
            for arm in self.arms
        ]

    def digest(self) -> str:
        """Hash the settings and the code of the trials: another hash, other figures.

        Judging is left out: it looks at what is recorded, and costs nothing to repeat.
        """
        told = hashlib.blake2b(digest_size=8)
        told.update(json.dumps(dict(self.settings), sort_keys=True).encode())
        own = inspect.getsource(inspect.getmodule(type(self)) or type(self))
        told.update(own.replace(inspect.getsource(type(self).judge), "").encode())
        for room in self.rooms:
            told.update(inspect.getsource(room).encode())
        return told.hexdigest()


def frozen_thresholds() -> dict[str, dict[str, float]]:
    """Read the thresholds, by experiment and name."""
    tree: dict[str, dict[str, float]] = json.loads(THRESHOLDS.read_text())
    return tree
