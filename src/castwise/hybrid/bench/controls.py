"""The benches by name, and the controls that have to come out.

A control that fails says that the harness is not to be trusted: the exit code is 1.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import torch

from castwise.hybrid.bench.notes import Notes
from castwise.hybrid.bench.problems import (
    Curve,
    Language,
    Minibatch,
    Problem,
    Softmax,
    TwoLayers,
)
from castwise.hybrid.bench.race import (
    Outcome,
    compare,
    ratio,
    run_one,
    table_of,
    tuned,
    values_of,
)
from castwise.hybrid.bench.regimes import (
    FineTuning,
    FullBatch,
    LargeBatch,
    LateTraining,
    Physics,
)
from castwise.hybrid.bench.rivals import (
    HYBRID,
    RIVALS,
    Mount,
    Point,
    bare,
    hybrid,
    plain,
)
from castwise.hybrid.bench.stacking import stacking as measure_stacking
from castwise.hybrid.bench.stacking import table_of as table_of_stacking

NOISY = tuple(each for each in RIVALS if each not in {"lbfgs", "rna", "dmd"})
"""Methods for problems whose gradients are noisy."""

WANTED_GAIN = 1.3


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """One thing that has to come out."""

    name: str
    """What it is."""

    value: float
    """What came out."""

    least: float = -math.inf
    """What it has to reach."""

    most: float = math.inf
    """What it must not pass."""

    @property
    def holds(self) -> bool:
        """Whether it came out."""
        return self.least <= self.value <= self.most

    @property
    def wanted(self) -> str:
        """What it was held against."""
        if self.most < math.inf:
            return f"at most {self.most:g}"
        return f"at least {self.least:g}"

    @property
    def word(self) -> str:
        """`holds` or `FAILS`."""
        return "holds" if self.holds else "FAILS"

    def __str__(self) -> str:
        return f"control: {self.name} is {self.value:.3g}, {self.wanted}: {self.word}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a bench found."""

    record: Mapping[str, Any]
    """Every run."""

    text: str
    """For a person."""

    controls: Sequence[Control] = ()
    """What had to come out."""


Bench: TypeAlias = Callable[[int, Notes], Finding]
"""Takes the number of seeds and what was measured before."""


def softmax(seeds: int, notes: Notes) -> Finding:
    """Positive control: noise-free and convex, so that a prediction has to pay."""
    methods = [each for each in RIVALS if each != "arms"]
    found = compare(Softmax, methods, seeds, notes)
    return Finding(
        record=found,
        text=table_of(found),
        controls=(
            Control(
                name="rna over plain, backward passes",
                value=ratio(found, "rna", "backwards"),
                most=0.65,
            ),
            Control(
                name="window_line over plain, backward passes",
                value=ratio(found, "window_line", "backwards"),
                most=0.75,
            ),
            Control(
                name="null over plain, time",
                value=ratio(found, "null", "seconds"),
                least=1.2,
            ),
        ),
    )


def minibatch(seeds: int, notes: Notes) -> Finding:
    """The noise of small batches; null has to lose."""
    found = compare(Minibatch, NOISY, seeds, notes)
    control = Control(
        name="null over plain, time", value=ratio(found, "null", "seconds"), least=1.2
    )
    return Finding(record=found, text=table_of(found), controls=(control,))


def language(seeds: int, notes: Notes) -> Finding:
    """Negative control: a char transformer at its tuned rate jumps hardly ever."""
    gate = hybrid(replace(HYBRID, confidence_threshold=0.4, warmup_steps=100))
    mounts = {"plain": plain, "gate 0.4": gate}
    point = Point(**notes.once("tuned", lambda: asdict(tuned(Language, "plain")[0])))
    runs: dict[str, list[Outcome]] = {name: [] for name in mounts}
    for seed in range(seeds):
        for name, mount in mounts.items():
            measure = partial(_language_run, seed, name, point, mount)
            outcome = notes.once(f"{name} of seed {seed}", measure)
            runs[name].append(Outcome(**outcome))
    finals = {name: [each.final for each in runs[name]] for name in runs}
    rise = statistics.mean(finals["gate 0.4"]) - statistics.mean(finals["plain"])
    found = {
        name: {
            "point": asdict(point),
            "edge": False,
            "runs": [asdict(each) for each in runs[name]],
        }
        for name in runs
    }
    return Finding(
        record=found,
        text=table_of(found),
        controls=(
            Control(
                name="accepted jumps in 1,500 steps",
                value=max(each.accepts for each in runs["gate 0.4"]),
                most=5,
            ),
            Control(
                name="rise of the final loss in deviations of plain",
                value=rise / statistics.stdev(finals["plain"]),
                most=2.0,
            ),
        ),
    )


def _language_run(seed: int, name: str, point: Point, mount: Mount) -> dict[str, Any]:
    return asdict(run_one(Language(seed), name, point, whole=False, mount=mount))


def shut(seeds: int, notes: Notes) -> Finding:
    """What a gate that never opens costs over a raw loop, and over `run.step`."""
    mounts = {
        "bare": bare,
        "plain": plain,
        "shut": hybrid(replace(HYBRID, confidence_threshold=0.9999999)),
        "bare again": bare,
    }
    times = [
        notes.once(f"seed {seed}", partial(_interleaved, seed, mounts))
        for seed in range(seeds)
    ]
    ratios = {
        name: statistics.median(each[name] / each["bare"] for each in times)
        for name in mounts
    }
    step = statistics.median(each["bare"] for each in times)
    lines = [
        f"{name:11s} x{value:.3f} of a raw loop, {1e3 * step * (value - 1):+.3f} ms"
        for name, value in ratios.items()
    ]
    control = Control(
        name="shut gate over a raw loop, time", value=ratios["shut"], most=1.05
    )
    text = "\n".join([f"a raw step takes {1e3 * step:.2f} ms", *lines])
    return Finding(record={"seconds": times}, text=text, controls=(control,))


def _interleaved(seed: int, mounts: Mapping[str, Any]) -> dict[str, float]:
    """Median processor times of a step, every method at each step, in turns."""
    problems = {name: TwoLayers(seed) for name in mounts}
    riders = {
        name: mount(problems[name], Point(rate=2e-3)) for name, mount in mounts.items()
    }
    times: dict[str, list[float]] = {name: [] for name in mounts}
    order = list(riders)
    for step in range(150):
        order = [*order[1:], order[0]]
        for name in order:
            batch = problems[name].batch(step)
            started = time.thread_time()
            riders[name].step(batch)
            times[name].append(time.thread_time() - started)
    return {name: statistics.median(each[20:]) for name, each in times.items()}


def stacking(seeds: int, notes: Notes) -> Finding:
    """Memory of all savings together, against vanilla fp32."""
    del seeds, notes  # bytes do not depend on a seed, and take a minute
    found = measure_stacking()
    vanilla, *_, everything = (max(arm["phases"].values()) for arm in found.values())
    control = Control(
        name="peak of everything together over vanilla fp32",
        value=everything / vanilla,
        most=1.0,
    )
    return Finding(record=found, text=table_of_stacking(found), controls=(control,))


def _race(kind: type[Problem], methods: Sequence[str]) -> Bench:
    def run(seeds: int, notes: Notes) -> Finding:
        found = compare(kind, methods, seeds, notes)
        return Finding(record=found, text=f"{table_of(found)}\n{conclusion(found)}")

    run.__doc__ = kind.__doc__
    return run


def conclusion(found: Mapping[str, Any]) -> str:
    """Say whether any prediction gained 1.3 times over the best other loop."""
    times = {method: values_of(found, method, "seconds") for method in found}
    medians = {method: statistics.median(each) for method, each in times.items()}
    best = min((m for m in found if m in PREDICTIONS), key=medians.__getitem__)
    loop = min((m for m in found if m in ("plain", "bare")), key=medians.__getitem__)
    fastest = min(medians, key=medians.__getitem__)
    if medians[best] == math.inf:
        who = "no method" if medians[fastest] == math.inf else "no prediction"
        return f"no gain of {WANTED_GAIN} times: {who} reached the target in time"
    gain = medians[loop] / medians[best]
    apart = max(times[best]) < min(times[loop])
    word = "a gain" if gain >= WANTED_GAIN and apart else "no gain"
    return (
        f"{word} of {WANTED_GAIN} times: {best} is {gain:.2f} times as fast as {loop}, "
        f"and the ranges over seeds {'lie apart' if apart else 'overlap'}; the fastest "
        f"of all is {fastest}"
    )


PREDICTIONS = ("window_line", "arms", "rna", "dmd", "adam_hold")
"""Methods that predict; Lookahead and SNOO are outer optimizers."""

BENCHES: Mapping[str, Bench] = MappingProxyType(
    {
        "softmax": softmax,
        "minibatch": minibatch,
        "language": language,
        "shut": shut,
        "curve": _race(Curve, tuple(RIVALS)),
        "full_batch": _race(FullBatch, tuple(RIVALS)),
        "physics": _race(Physics, tuple(RIVALS)),
        "large_batch": _race(LargeBatch, NOISY),
        "fine_tuning": _race(FineTuning, NOISY),
        "late_training": _race(LateTraining, NOISY),
        "stacking": stacking,
    }
)
"""Every bench by its name."""


PROBLEMS: Mapping[str, type[Problem]] = MappingProxyType(
    {
        "softmax": Softmax,
        "minibatch": Minibatch,
        "language": Language,
        "curve": Curve,
        "full_batch": FullBatch,
        "physics": Physics,
        "large_batch": LargeBatch,
        "fine_tuning": FineTuning,
        "late_training": LateTraining,
    }
)
"""What is trained in the benches that train to a target."""


def header_of(name: str, seeds: int) -> dict[str, Any]:
    """Return what a bench fixes before it runs: grid, target, seeds."""
    header: dict[str, Any] = {"seeds": seeds, "torch": str(torch.__version__)}
    if name not in PROBLEMS:
        return header
    kind = PROBLEMS[name]
    return header | {
        "target": kind.target_is or kind.target,
        "rates": kind.rates,
        "momenta": kind.momenta,
        "decays": kind.decays,
        "tuning_seeds": kind.tuning_seeds,
        "max_steps": kind.max_steps,
    }


def run_benches(
    names: Sequence[str], *, seeds: int, out: Path | None, tell: Callable[[str], None]
) -> bool:
    """Run benches one after the other; return whether all controls held.

    Args:
        names: Of `BENCHES`.
        seeds: Of each comparison.
        out: The file that all benches join, or none. What it holds is not run again.
        tell: What a person reads goes here.
    """
    torch.set_num_threads(1)
    good = True
    for name in names:
        bench = BENCHES[name]
        tell(f"{name}: {bench.__doc__}")
        notes = Notes(out, name, header_of(name, seeds))
        found = bench(seeds, notes)
        tell(found.text)
        for control in found.controls:
            tell(str(control))
            good = good and control.holds
        notes.finish(
            {
                "runs": found.record,
                "text": found.text,
                "controls": [asdict(each) for each in found.controls],
            }
        )
    return good
