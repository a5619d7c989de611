"""Intervals: of a paired difference over seeds, of a pooled share, of a median.

Seeds are the units. Samples within one seed share its weights, so a difference between
arms is judged by how it varies from seed to seed, never by the number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from scipy import stats

from castwise.recipes.kenken.measures import Rate
from experiments.contract import Results


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over seeds with its interval."""

    value: float
    """The mean."""

    interval: tuple[float, float]
    """Student's 95 % interval."""

    narrow: tuple[float, float]
    """Student's 90 % interval: two one-sided tests at 5 % ask whether it lies within
    the bounds of equivalence."""

    num: int
    """Seeds."""


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate a mean; one value, or one that is not finite, has no interval."""
    num = len(values)
    mean = fmean(values) if all(map(math.isfinite, values)) else math.nan
    if num < 2 or math.isnan(mean):
        unknown = (-math.inf, math.inf)
        return Estimate(value=mean, interval=unknown, narrow=unknown, num=num)
    error = stdev(values) / math.sqrt(num)

    def around(level: float) -> tuple[float, float]:
        half = float(stats.t.ppf(0.5 + level / 2, num - 1)) * error
        return mean - half, mean + half

    return Estimate(value=mean, interval=around(0.95), narrow=around(0.9), num=num)


def paired(
    results: Results, first: str, second: str, value: str, *, share: float = 1.0
) -> Estimate:
    """Estimate `first` minus a share of `second` over the seeds that both have."""
    seeds = sorted(results[first].keys() & results[second].keys())
    return estimate(
        [
            float(results[first][seed][value])
            - share * float(results[second][seed][value])
            for seed in seeds
        ]
    )


def over_seeds(results: Results, arm: str, value: str) -> Estimate:
    """Estimate a value of one arm."""
    return estimate([float(values[value]) for values in results[arm].values()])


def pooled_rate(counts: Mapping[int, Sequence[int]]) -> Rate:
    """Put hits and numbers of all seeds together; the interval is Wilson's."""
    return Rate(
        hits=sum(hits for hits, _ in counts.values()),
        num=sum(num for _, num in counts.values()),
    )


def bootstrap_median(
    values: Sequence[float], *, num_draws: int = 2000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Return a median with its 95 % percentile interval."""
    sample = np.asarray(values, dtype=np.float64)
    rows = np.random.default_rng(seed).integers(
        len(sample), size=(num_draws, len(sample))
    )
    medians = np.median(sample[rows], axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(np.median(sample)), (float(low), float(high))
