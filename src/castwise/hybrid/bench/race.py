"""Tune every method on one grid, run it on other seeds, and say whether it gained.

Every method gets the best point of one grid (rates, momenta, schedules), by the worse
of its times on the tuning seeds; a best rate at the edge of the grid is marked *. Then
it runs on other seeds. Time is the processor time of the thread inside of steps:
snapshots, verification and rollback included, evaluation excluded for all alike. A
difference counts only if the ranges over seeds do not overlap; otherwise the verdict is
`no gain`. Virtual steps count for nothing.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from castwise.errors import LossScaleError
from castwise.hybrid.bench.problems import Problem
from castwise.hybrid.bench.rivals import RIVALS, Mount, Point, Rider
from castwise.training.averages import Averages, ExponentialAverage, LatestAverage

SAME_AS_PLAIN = {"bare": "plain"}
"""Methods that are tuned with another, because their steps have the same bits."""


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
) -> Outcome:
    """Train to the target, or to the last step.

    Args:
        problem: A new one.
        method: One of `RIVALS`.
        point: Of the grid.
        whole: Whether to go on until averaged weights are at the target too.
        mount: Another method, which the race does not know by name.
    """
    rider = (mount or RIVALS[method])(problem, point)
    clock = _Clock(problem, rider)
    for step in range(problem.max_steps):
        try:
            clock.step(step, point)
        except LossScaleError:  # too many steps in a row had no finite gradient
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
        self._spent, self._loss = 0.0, math.inf

    def step(self, step: int, point: Point) -> None:
        problem, rider = self._problem, self._rider
        batch = problem.batch(step)
        for group in rider.optimizer.param_groups:
            if point.decay:
                group["lr"] = point.rate * point.factor(step)
        started = time.thread_time()
        rider.step(batch)
        self._spent += time.thread_time() - started
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
            self._reached["raw"] = self._spent
            self._backwards = self._rider.backwards(steps)
        for name, average in self._averages.items():
            if averages and self._reached[name] == math.inf:
                with average.in_place_of_weights():
                    if problem.evaluate() <= problem.target:
                        self._reached[name] = self._spent + self._extra[name]

    def is_done(self, *, whole: bool) -> bool:
        wanted = self._reached.values() if whole else [self._reached["raw"]]
        return max(wanted) < math.inf or math.isnan(self._loss)

    def outcome(self) -> Outcome:
        trainer, has_target = self._rider.trainer, self._problem.has_target
        finished = math.isfinite(self._loss)
        whole = self._spent if finished else math.inf
        return Outcome(
            backwards=self._backwards,
            seconds=self._reached["raw"] if has_target else whole,
            seconds_ema=self._reached["ema"],
            seconds_lawa=self._reached["lawa"],
            final=self._loss,
            tries=trainer.statistics.tries if trainer else 0,
            accepts=trainer.statistics.accepts if trainer else 0,
        )


def tuned(kind: type[Problem], method: str) -> tuple[Point, bool]:
    """Return the best point of the grid by its worse seed, and if it is at an edge.

    Rates rise; where one diverges after a smaller one did not, larger ones are not run.
    """
    scores: dict[Point, float] = {}
    for momentum, decay in itertools.product(kind.momenta, kind.decays):
        best = math.inf
        for rate in kind.rates:
            point = Point(rate=rate, momentum=momentum, decay=decay)
            scores[point] = max(
                _score(run_one(kind(seed), method, point, whole=False), kind)
                for seed in kind.tuning_seeds
            )
            if best < scores[point] == math.inf:
                break  # past the edge of stability
            best = min(best, scores[point])
        if method == "lbfgs":
            break  # it has a rate of its own
    found = min(scores, key=lambda point: scores[point])
    return found, found.rate in {kind.rates[0], kind.rates[-1]} and method != "lbfgs"


def _score(outcome: Outcome, kind: type[Problem]) -> float:
    score = outcome.seconds if kind.has_target else outcome.final
    return math.inf if math.isnan(score) else score


def compare(
    kind: type[Problem],
    methods: Sequence[str],
    seeds: int,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, dict[str, Any]]:
    """Run every method at its own point on the same seeds, seeds outermost."""
    points = {}
    for method in methods:
        if method not in SAME_AS_PLAIN:
            points[method] = tuned(kind, method)
            tell(f"tuned {method}: {points[method][0]}")
    points |= {m: points[SAME_AS_PLAIN[m]] for m in methods if m in SAME_AS_PLAIN}
    runs: dict[str, list[Outcome]] = {method: [] for method in methods}
    for seed in range(seeds):
        for method in methods:
            outcome = run_one(kind(seed), method, points[method][0], whole=True)
            runs[method].append(outcome)
    return {
        method: {
            "point": asdict(points[method][0]),
            "edge": points[method][1],
            "runs": [asdict(each) for each in runs[method]],
        }
        for method in methods
    }


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
        values = _values(found, method, name)
        cells.append(
            f"{statistics.median(values):8.4g} [{min(values):.4g} {max(values):.4g}]"
        )
        if name in {"backwards", "seconds"}:
            cells.append(f"x{ratio(found, method, name):.2f}")
    runs = found[method]["runs"]
    jumps = f"{sum(r['accepts'] for r in runs)}/{sum(r['tries'] for r in runs)}"
    return "  ".join([*cells, jumps, verdict(found, method)])


def _values(
    found: Mapping[str, Mapping[str, Any]], method: str, name: str
) -> list[float]:
    return [float(run[name]) for run in found[method]["runs"]]


def verdict(
    found: Mapping[str, Mapping[str, Any]], method: str, over: str = "plain"
) -> str:
    """Say `gain` or `loss` only if the ranges of time lie apart."""
    mine, theirs = (_values(found, each, "seconds") for each in (method, over))
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
        statistics.median(_values(found, each, name)) for each in (method, over)
    )
    return mine / theirs if mine < math.inf or theirs < math.inf else math.nan
