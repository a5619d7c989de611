"""A curriculum: what is trained on, stage by stage, along any number of dimensions.

    mode = Dimension(name="mode", stages=(
        Stage(name="plain",  value=..., advance=parse_condition("solved >= 0.9 for 2")),
        Stage(name="signed", value=..., rehearsal=0.2),
    ))
    curriculum = Curriculum(dimensions=(size, mode), enabled=("mode",))

At the end of every epoch `observe` is given the measures of the evaluation. Each
dimension then stays, advances or goes back by one stage; a stage that has lasted its
`max_epochs` is left by force, and the record says so. What a stage means is the
recipe's business: the curriculum moves values and never looks into them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, final

from castwise.errors import ContradictionError, SettingsError
from castwise.training.conditions import EPOCH, Condition, Streaks
from castwise.wording import did_you_mean


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of a dimension."""

    name: str
    """What logs and the report call it."""

    value: Any = None
    """What it means to the recipe."""

    advance: Condition | None = None
    """When the next stage begins; None waits for `max_epochs`, or for ever."""

    regress: Condition | None = None
    """When the stage before comes back; None for never."""

    min_epochs: int = 1
    """Epochs that it lasts at least, whatever the measures say."""

    max_epochs: int | None = None
    """Epochs after which the next stage is forced; None for no limit."""

    rehearsal: float = 0.0
    """Share of the training that goes, evenly, to the stages before this one."""

    @property
    def least_epochs(self) -> int:
        """Epochs that it lasts in any case, when another one follows."""
        if self.advance is None and self.max_epochs is not None:
            return self.max_epochs
        return self.min_epochs

    def __post_init__(self) -> None:
        """Refuse lengths and shares that have no meaning.

        Raises:
            SettingsError: Naming the stage and the setting.
        """
        if not 0.0 <= self.rehearsal < 1.0:
            raise SettingsError(
                f"stage {self.name}: rehearsal needs a share in [0, 1), got "
                f"{self.rehearsal:g}"
            )
        longest = math.inf if self.max_epochs is None else self.max_epochs
        if not 1 <= self.min_epochs <= longest:
            raise SettingsError(
                f"stage {self.name}: need 1 <= min_epochs <= max_epochs, got "
                f"{self.min_epochs} and {self.max_epochs}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimension:
    """Stages in order along one line, such as the size of the puzzles."""

    name: str
    """What it is called."""

    stages: tuple[Stage, ...]
    """In the order in which they come; at least one."""

    smoothing: float = 0.0
    """Weight of the past in the running mean of each measure, in [0, 1)."""

    hysteresis: float = 0.0
    """How far a measure may fall back before a streak that has begun is lost."""

    def __post_init__(self) -> None:
        """Refuse a line that cannot be walked.

        Raises:
            SettingsError: Naming the dimension.
        """
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise SettingsError(
                f"dimension {self.name} needs stages with names of their own, got "
                f"{', '.join(names) or 'none'}"
            )
        if not 0.0 <= self.smoothing < 1.0 or not self.hysteresis >= 0.0:
            raise SettingsError(
                f"dimension {self.name} needs smoothing in [0, 1) and hysteresis >= 0, "
                f"got {self.smoothing:g} and {self.hysteresis:g}"
            )
        first, last = self.stages[0], self.stages[-1]
        if first.regress is not None or first.rehearsal:
            raise SettingsError(
                f"dimension {self.name}: its first stage, {first.name}, has no stage "
                "before it to go back to or to rehearse"
            )
        if last.advance is not None or last.max_epochs is not None:
            raise SettingsError(
                f"dimension {self.name}: its last stage, {last.name}, has no stage "
                "after it; leave out advance and max_epochs"
            )
        for stage in self.stages[:-1]:
            if stage.advance is None and stage.max_epochs is None:
                raise SettingsError(
                    f"dimension {self.name}: stage {stage.name} would never end; give "
                    "it advance or max_epochs"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Transition:
    """One change of stage, with its reason."""

    dimension: str
    """Which line."""

    before: str
    """Stage that ended."""

    after: str
    """Stage that began."""

    step: int
    """Updates made when it happened."""

    because: str
    """The condition that was met, with the measures; or that it was forced."""

    forced: bool
    """Whether the longest stay ended it, and not a measure."""

    def record(self) -> dict[str, Any]:
        """Plain values for the journal, where the step stands already."""
        return {name: value for name, value in asdict(self).items() if name != "step"}

    def __str__(self) -> str:
        return f"{self.dimension}: {self.before} -> {self.after} ({self.because})"


@dataclass(kw_only=True, slots=True)
class _Place:
    """Where one dimension stands."""

    index: int = 0
    epochs: int = 0
    began_at: int = 0
    smoothed: dict[str, float] = field(default_factory=dict)
    advance_streaks: Streaks = field(default_factory=dict)
    regress_streaks: Streaks = field(default_factory=dict)


@final
class Curriculum:
    """Walks every enabled dimension; keeps the history; is saved and resumed.

    Args:
        dimensions: The lines, each with a name of its own.
        enabled: Names of those that are walked. A dimension that is not keeps the
            user's own setting: it has no stage.
        num_rewarm: Updates of a linear rise of the learning rate after every change
            of stage.

    Raises:
        SettingsError: Two dimensions share a name, an enabled one is unknown, or
            num_rewarm is negative.
    """

    def __init__(
        self,
        dimensions: Sequence[Dimension],
        enabled: Sequence[str] | None = None,
        *,
        num_rewarm: int = 0,
    ) -> None:
        if num_rewarm < 0:
            raise SettingsError(
                f"num_rewarm needs a number of updates, got {num_rewarm}"
            )
        by_name = {dimension.name: dimension for dimension in dimensions}
        if len(by_name) < len(dimensions):
            raise SettingsError("two dimensions of a curriculum share a name")
        for name in enabled or ():
            if name not in by_name:
                raise SettingsError(
                    f"no dimension {name}{did_you_mean(name, by_name)}; there are "
                    f"{', '.join(by_name) or 'none'}"
                )
        walked = by_name if enabled is None else enabled
        self._dimensions = {n: d for n, d in by_name.items() if n in walked}
        self._places = {name: _Place() for name in self._dimensions}
        self._history: list[Transition] = []
        self._num_rewarm = num_rewarm

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        """The lines that are walked."""
        return self._dimensions

    @property
    def history(self) -> tuple[Transition, ...]:
        """Every change of stage so far."""
        return tuple(self._history)

    def check_measures(self, known: Sequence[str]) -> None:
        """Refuse a condition on a measure that will never come.

        Raises:
            SettingsError: Naming dimension, stage, measure and the nearest known one.
        """
        for dimension in self._dimensions.values():
            for stage in dimension.stages:
                for condition in filter(None, (stage.advance, stage.regress)):
                    for measure in condition.measures():
                        if measure not in known:
                            raise SettingsError(
                                f"dimension {dimension.name}, stage {stage.name}: no "
                                f"measure {measure}{did_you_mean(measure, known)}; the "
                                f"evaluation gives {', '.join(known)}"
                            )

    def check_length(self, num_epochs: int) -> None:
        """Refuse stages that leave no epoch of a run to the last one.

        Raises:
            SettingsError: Naming the dimension, and by how much it is too long.
        """
        for dimension in self._dimensions.values():
            *earlier, last = dimension.stages
            least = sum(stage.least_epochs for stage in earlier)
            if least >= num_epochs:
                raise SettingsError(
                    f"dimension {dimension.name}: the stages before {last.name} last "
                    f"{least} epochs or more, and the run has {num_epochs}; shorten "
                    f"them by {least - num_epochs + 1}, or train longer"
                )

    def stage(self, name: str) -> Stage | None:
        """The stage in which a dimension stands; None if it is not walked."""
        if name not in self._dimensions:
            return None
        return self._dimensions[name].stages[self._places[name].index]

    def shares(self, name: str) -> tuple[tuple[Stage, float], ...]:
        """The stages to train on now and their shares, rehearsal included."""
        now = self.stage(name)
        if now is None:
            return ()
        earlier = self._dimensions[name].stages[: self._places[name].index]
        each = now.rehearsal / len(earlier) if earlier else 0.0
        rehearsed = tuple((stage, each) for stage in earlier if each)
        return (*rehearsed, (now, 1.0 - each * len(rehearsed)))

    def rate_factor(self, step: int) -> float:
        """Return the factor for the learning rate: it rises anew after a change."""
        if not self._history:
            return 1.0
        since = step - max(place.began_at for place in self._places.values())
        return min(1.0, (since + 1) / (self._num_rewarm + 1))

    def observe(
        self, step: int, measures: Mapping[str, float]
    ) -> tuple[Transition, ...]:
        """End an epoch: stay, advance or go back.

        Args:
            step: Updates made so far.
            measures: What the evaluation gave; missing and NaN ones hold.

        Returns:
            The changes of stage, also kept in `history`.
        """
        found = tuple(
            transition
            for dimension in self._dimensions.values()
            if (transition := self._walk(dimension, step, measures)) is not None
        )
        self._history += found
        return found

    def _walk(
        self, dimension: Dimension, step: int, measures: Mapping[str, float]
    ) -> Transition | None:
        place = self._places[dimension.name]
        place.epochs += 1
        _smooth(place.smoothed, measures, dimension.smoothing)
        seen = {
            name: place.smoothed[name]
            for name, value in measures.items()
            if name in place.smoothed and not math.isnan(value)
        }
        seen[EPOCH] = float(place.epochs)
        stage, band = dimension.stages[place.index], dimension.hysteresis
        back = stage.regress is not None and stage.regress.is_met(
            seen, place.regress_streaks, band
        )
        on = stage.advance is not None and stage.advance.is_met(
            seen, place.advance_streaks, band
        )
        if place.epochs < stage.min_epochs:
            return None
        if on and not back:
            return self._move(dimension, +1, step, _told(stage.advance, seen))
        if back and not on:
            return self._move(dimension, -1, step, _told(stage.regress, seen))
        if stage.max_epochs is not None and place.epochs >= stage.max_epochs:
            because = f"forced after {place.epochs} epochs"
            return self._move(dimension, +1, step, because, forced=True)
        return None

    def _move(
        self,
        dimension: Dimension,
        by: int,
        step: int,
        because: str,
        *,
        forced: bool = False,
    ) -> Transition:
        before = self._places[dimension.name].index
        self._places[dimension.name] = _Place(index=before + by, began_at=step)
        return Transition(
            dimension=dimension.name,
            before=dimension.stages[before].name,
            after=dimension.stages[before + by].name,
            step=step,
            because=because,
            forced=forced,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain data from which `load_state_dict` goes on exactly."""
        return {
            "places": {
                name: {
                    "stage": self._dimensions[name].stages[place.index].name,
                    **{k: v for k, v in asdict(place).items() if k != "index"},
                }
                for name, place in self._places.items()
            },
            "history": [asdict(each) for each in self._history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back where every dimension stood.

        Raises:
            ContradictionError: The state belongs to another curriculum.
        """
        places = state.get("places", {})
        if places.keys() != self._places.keys():
            raise ContradictionError(
                "the checkpoint's curriculum walks "
                f"{', '.join(sorted(places)) or 'nothing'}, this one "
                f"{', '.join(sorted(self._places)) or 'nothing'}; resume with the same "
                "flags"
            )
        restored = {}
        for name, stored in places.items():
            rest = dict(stored)
            stage = rest.pop("stage")
            names = [each.name for each in self._dimensions[name].stages]
            if stage not in names:
                raise ContradictionError(
                    f"the checkpoint's curriculum stands in stage {stage} of {name}, "
                    f"and there are {', '.join(names)}; resume with the same stages"
                )
            restored[name] = _Place(index=names.index(stage), **rest)
        self._places = restored
        self._history = [Transition(**each) for each in state.get("history", [])]


def _smooth(
    smoothed: dict[str, float], measures: Mapping[str, float], past: float
) -> None:
    for name, value in measures.items():
        if not math.isnan(value):
            before = smoothed.get(name, value)
            smoothed[name] = past * before + (1.0 - past) * value


def _told(condition: Condition | None, seen: Mapping[str, float]) -> str:
    names = dict.fromkeys(condition.measures()) if condition else {}
    values = ", ".join(f"{name} {seen[name]:.4g}" for name in names if name in seen)
    return f"{condition}{': ' if values else ''}{values}"
