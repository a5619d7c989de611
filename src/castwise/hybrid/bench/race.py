"""Tune every method on one grid, run it on other seeds, and say whether it gained.

Every method gets the best point of one grid (rates, momenta, schedules), by the worse
of its times on the tuning seeds; a best rate at the edge of the grid is marked *. A run
of the tuning ends when it has taken longer than the best point so far, which cannot
change the choice. Then the method runs on other seeds.

Time is the processor time of the thread inside of steps, which neighbours on the
machine hardly lengthen, and the time of the clock beside it. Both include snapshots,
verification and rollback, and exclude evaluation for all alike. A difference counts
only if the ranges over seeds do not overlap; otherwise the verdict is `no gain`.
Virtual steps count for nothing.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from castwise.errors import LossScaleError
from castwise.hybrid.bench.notes import Notes
from castwise.hybrid.bench.problems import Problem
from castwise.hybrid.bench.rivals import RIVALS, Mount, Point, Rider
from castwise.training.averages import Averages, ExponentialAverage, LatestAverage

SAME_AS_PLAIN = {"bare": "plain", "null": "plain"}
"""Methods that are tuned with another, because their real steps have the same bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One run of one method; infinite where the target was not reached."""

    backwards: float
    """Backward passes until the weights of the method were at the target."""

    seconds: float
    """Processor time until then; of the whole run where there is no target."""

    seconds_ema: float
    """Until an exponential average was there, with the time that it took."""

    seconds_lawa: float
    """Until the mean of the latest weights was there, with the time that it took."""

    final: float
    """Loss at the end."""

    clock_seconds: float = math.inf
    """Time of the clock until the weights of the method were at the target."""

    spent: float = 0.0
    """Processor time of all steps that were made."""

    tries: int = 0
    """Predictions."""

    accepts: int = 0
    """Predictions at which it stayed."""


def run_one(
    problem: Problem,
    method: str,
    point: Point,
    *,
    whole: bool,
    mount: Mount | None = None,
    most: float = math.inf,
) -> Outcome:
    """Train to the target, or to the last step.

    Args:
        problem: A new one.
        method: One of `RIVALS`.
        point: Of the grid.
        whole: Whether to go on until averaged weights are at the target too.
        mount: Another method, which the race does not know by name.
        most: Seconds of steps after which it is given up. Default: never.
    """
    rider = (mount or RIVALS[method])(problem, point)
    clock = _Clock(problem, rider)
    for step in range(problem.max_steps):
        try:
            clock.step(step, point)
        except LossScaleError:  # too many steps in a row had no finite gradient
            break
        if clock.spent > most:
            break
        if (step + 1) % problem.evaluate_every:
            continue
        clock.look(step + 1, averages=whole)
        if clock.is_done(whole=whole):
            break
    return clock.outcome()


class _Clock:
    """Times a rider, and notes when it was at the target."""

    def __init__(self, problem: Problem, rider: Rider) -> None:
        self._problem, self._rider = problem, rider
        self._averages: dict[str, Averages] = {
            "ema": ExponentialAverage(problem.model, decay=problem.average_decay),
            "lawa": LatestAverage(problem.model, every=problem.latest_every),
        }
        self._extra = dict.fromkeys(self._averages, 0.0)
        self._reached = dict.fromkeys(("raw", *self._averages), math.inf)
        self._backwards = math.inf
        self.spent, self._loss = 0.0, math.inf
        self._clock_spent = self._clock_reached = 0.0

    def step(self, step: int, point: Point) -> None:
        problem, rider = self._problem, self._rider
        batch = problem.batch(step)
        for group in rider.optimizer.param_groups:
            if point.decay:
                group["lr"] = point.rate * point.factor(step)
        started, by_clock = time.thread_time(), time.perf_counter()
        rider.step(batch)
        self.spent += time.thread_time() - started
        self._clock_spent += time.perf_counter() - by_clock
        for name, average in self._averages.items():
            started = time.thread_time()
            average.update()
            self._extra[name] += time.thread_time() - started

    def look(self, steps: int, *, averages: bool) -> None:
        problem = self._problem
        with self._rider.where():
            self._loss = problem.evaluate()
        if not problem.has_target:
            return
        if self._loss <= problem.target and self._reached["raw"] == math.inf:
            self._reached["raw"] = self.spent
            self._clock_reached = self._clock_spent
            self._backwards = self._rider.backwards(steps)
        for name, average in self._averages.items():
            if averages and self._reached[name] == math.inf:
                with average.in_place_of_weights():
                    if problem.evaluate() <= problem.target:
                        self._reached[name] = self.spent + self._extra[name]

    def is_done(self, *, whole: bool) -> bool:
        wanted = self._reached.values() if whole else [self._reached["raw"]]
        return max(wanted) < math.inf or math.isnan(self._loss)

    def outcome(self) -> Outcome:
        trainer, has_target = self._rider.trainer, self._problem.has_target
        finished = math.isfinite(self._loss)
        whole = self.spent if finished else math.inf
        return Outcome(
            backwards=self._backwards,
            seconds=self._reached["raw"] if has_target else whole,
            seconds_ema=self._reached["ema"],
            seconds_lawa=self._reached["lawa"],
            final=self._loss,
            clock_seconds=self._clock_reached or math.inf,
            spent=self.spent,
            tries=trainer.statistics.tries if trainer else 0,
            accepts=trainer.statistics.accepts if trainer else 0,
        )


def tuned(kind: type[Problem], method: str) -> tuple[Point, bool]:
    """Return the best point of the grid by its worse seed, and if it is at an edge.

    Rates rise; where one diverges after a smaller one did not, larger ones are not run.
    """
    scores: dict[Point, float] = {}
    for momentum, decay in itertools.product(kind.momenta, kind.decays):
        stable = False
        for rate in kind.rates:
            point = Point(rate=rate, momentum=momentum, decay=decay)
            most = min(scores.values(), default=math.inf)
            scores[point] = _worse_score(kind, method, point, most)
            if stable and scores[point] == math.inf:
                break  # past the edge of stability
            stable = stable or scores[point] < math.inf
        if method == "lbfgs":
            break  # it has a rate of its own
    found = min(scores, key=lambda point: scores[point])
    return found, found.rate in {kind.rates[0], kind.rates[-1]} and method != "lbfgs"


def _worse_score(kind: type[Problem], method: str, point: Point, most: float) -> float:
    """Return the worse score of the tuning seeds, or one above `most` that ended it."""
    worst = -math.inf
    for seed in kind.tuning_seeds:
        limit = most if kind.has_target else math.inf
        outcome = run_one(kind(seed), method, point, whole=False, most=limit)
        worst = max(worst, _score(outcome, kind, limit))
        if worst > most:
            break
    return worst


def _score(outcome: Outcome, kind: type[Problem], most: float) -> float:
    if not kind.has_target:
        return math.inf if math.isnan(outcome.final) else outcome.final
    if outcome.seconds == math.inf and outcome.spent > most:
        return outcome.spent  # given up: too slow, and perhaps stable
    return outcome.seconds


def compare(
    kind: type[Problem], methods: Sequence[str], seeds: int, notes: Notes | None = None
) -> dict[str, dict[str, Any]]:
    """Run every method at its own point on the same seeds, seeds outermost.

    Args:
        kind: What is trained.
        methods: Of `RIVALS`.
        seeds: How many, from 0.
        notes: What was measured before is read there. Default: nothing was.
    """
    notes = notes or Notes()
    points: dict[str, tuple[Point, bool]] = {}
    for method in sorted(methods, key=lambda each: each in SAME_AS_PLAIN):
        like = SAME_AS_PLAIN.get(method, method)
        point, edge = notes.once(f"tuned {like}", partial(_tuned, kind, like))
        points[method] = Point(**point), edge
    runs: dict[str, list[Any]] = {method: [] for method in methods}
    for seed in range(seeds):
        for method in methods:
            point = points[method][0]
            measure = partial(_raced, kind, seed, method, point)
            outcome = notes.once(f"{method} of seed {seed}", measure)
            runs[method].append(outcome)
    return {
        method: {
            "point": asdict(points[method][0]),
            "edge": points[method][1],
            "runs": runs[method],
        }
        for method in methods
    }


def _tuned(kind: type[Problem], method: str) -> tuple[dict[str, Any], bool]:
    point, edge = tuned(kind, method)
    return asdict(point), edge


def _raced(kind: type[Problem], seed: int, method: str, point: Point) -> dict[str, Any]:
    return asdict(run_one(kind(seed), method, point, whole=True))


def table_of(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the race as lines of text: medians, ranges, ratios, verdicts."""
    return "\n".join(_line(method, found) for method in found)


def _line(method: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    point = found[method]["point"]
    edge = "*" if found[method]["edge"] else " "
    schedule = f"d{point['decay']}" if point["decay"] else "-"
    momentum = f"{point['momentum']:.3g}"
    cells = [f"{method:13s} {point['rate']:7.2g}{edge} {momentum:4s} {schedule:5s}"]
    for name in ("backwards", "seconds", "seconds_ema", "seconds_lawa", "final"):
        values = values_of(found, method, name)
        cells.append(
            f"{statistics.median(values):8.4g} [{min(values):.4g} {max(values):.4g}]"
        )
        if name in {"backwards", "seconds"}:
            cells.append(f"x{ratio(found, method, name):.2f}")
    runs = found[method]["runs"]
    jumps = f"{sum(r['accepts'] for r in runs)}/{sum(r['tries'] for r in runs)}"
    return "  ".join([*cells, jumps, verdict(found, method)])


def values_of(
    found: Mapping[str, Mapping[str, Any]], method: str, name: str
) -> list[float]:
    """Return one figure of every seed; infinite where it was not reached."""
    values = (run[name] for run in found[method]["runs"])
    return [math.inf if value is None else float(value) for value in values]


def verdict(
    found: Mapping[str, Mapping[str, Any]], method: str, over: str = "plain"
) -> str:
    """Say `gain` or `loss` only if the ranges of time lie apart."""
    mine, theirs = (values_of(found, each, "seconds") for each in (method, over))
    if method != over and max(mine) < min(theirs):
        return f"gain {1 / ratio(found, method, 'seconds', over):.2f} times"
    return "loss" if min(mine) > max(theirs) else "no gain"


def ratio(
    found: Mapping[str, Mapping[str, Any]],
    method: str,
    name: str,
    over: str = "plain",
) -> float:
    """Median of a method over median of another."""
    mine, theirs = (
        statistics.median(values_of(found, each, name)) for each in (method, over)
    )
    return mine / theirs if mine < math.inf or theirs < math.inf else math.nan
