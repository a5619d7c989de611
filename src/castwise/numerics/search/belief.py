r"""Beliefs: what scores and trials together say about a choice that was not run yet.

The squared use of the budget, as a function of a choice c, is taken for a random one
with mean and covariance

    m(c)     = sum of the loads of c, as they were scored
    k(c, d)  = sum of their variances over the loads that c and d share
               + interplay^2 * (loads that both have) / (loads that one of them has)

The first part is the doubt about each load, the second the doubt whether loads add up,
which choices share that are nearly the same. Trials measure some values; conditioned on
these (a matrix as large as there are trials), a failure makes those modules suspect
that it had low, and those most that were least sure. What is worth a trial is told by
the saving expected from it: what it saves, times the probability that it holds.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from castwise.numerics.search.found import Trial
from castwise.numerics.search.problem import Choice, Problem

_DEVIATION = 0.7  # of a load that was only scored, relative to it
_LEAST = 1e-3  # deviation of any load, relative to what is allowed in all
_INTERPLAY = 0.2  # by how much sums of loads are off, relative to what is allowed
_NOISE = 1e-3  # of a measure, relative to what is allowed
_SHARES = (0.9, 1.0, 1.15)  # of the margin, to solve for
_MOST_MOVES = 400  # those that change the cost the most; pairs of them are looked at


@dataclass(frozen=True, kw_only=True, slots=True)
class Prospect:
    """A choice that is worth a trial."""

    choice: Choice
    """For each group the place of its candidate."""

    gain: float
    """The saving expected from it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Overlap:
    """Sums over the loads of some choices, and over those shared with each trial."""

    load: torch.Tensor
    """(choices,): the mean of each."""

    variance: torch.Tensor
    """(choices,): the sum of the variances of its loads."""

    load_shared: torch.Tensor
    """(choices, trials)."""

    variance_shared: torch.Tensor
    """(choices, trials)."""

    def plus(self, other: _Overlap) -> _Overlap:
        """Sums of both, for changes that are made together."""
        return _Overlap(
            load=self.load + other.load,
            variance=self.variance + other.variance,
            load_shared=self.load_shared + other.load_shared,
            variance_shared=self.variance_shared + other.variance_shared,
        )

    def minus(self, other: _Overlap) -> _Overlap:
        """What a change takes away."""
        return _Overlap(
            load=self.load - other.load,
            variance=self.variance - other.variance,
            load_shared=self.load_shared - other.load_shared,
            variance_shared=self.variance_shared - other.variance_shared,
        )

    def at(self, places: torch.Tensor) -> _Overlap:
        """Some of the choices."""
        return _Overlap(
            load=self.load[places],
            variance=self.variance[places],
            load_shared=self.load_shared[places],
            variance_shared=self.variance_shared[places],
        )


class Belief:
    """What is believed after some trials.

    Args:
        problem: Loads and costs.
        trials: What was measured; those without a finite measure teach nothing here.
        margin: The share of the budget that must suffice.
    """

    def __init__(
        self, problem: Problem, trials: Sequence[Trial], margin: float
    ) -> None:
        self._problem, self._allowed = problem, margin * margin
        self._width = len(problem.candidates)
        known = [t for t in trials if math.isfinite(t.usage) and t.predicted > 0]
        ratios = [(t.usage / t.predicted) ** 2 for t in known if t.usage > 0]
        factor = statistics.median(ratios) if ratios else 1.0
        flat = [load for row in problem.loads for load in row]
        flat += [pair.load for pair in problem.pairs]
        loads = factor * torch.tensor(flat, dtype=torch.float64)
        loads[~loads.isfinite()] = 0.0  # is never asked for
        self._mean = loads
        deviation = _DEVIATION * loads + _LEAST * self._allowed * (loads > 0)
        self._variance = deviation.square()
        self._had = torch.zeros(len(known), len(loads), dtype=torch.float64)
        for row, trial in zip(self._had, known, strict=True):
            row[self._places(trial.choice)] = 1.0
        self._constant = factor * problem.constant
        self._condition([trial.usage**2 for trial in known])

    def _condition(self, measured: list[float]) -> None:
        """Solve for what the trials teach."""
        self._tried = self._had @ self._mean  # their loads
        own = self._overlap(self._had)
        covariance = self._covariance(own)
        noise = (_NOISE * self._allowed) ** 2 + 1e-9 * covariance.diag()
        self._root = torch.linalg.cholesky(covariance + noise.diag())
        wanted = torch.tensor(measured, dtype=torch.float64) - self._constant
        error = (wanted - self._tried)[:, None]
        self._taught = torch.cholesky_solve(error, self._root)[:, 0]

    def _places(self, choice: Choice) -> list[int]:
        pairs = (place for place, _ in self._problem.active(choice))
        start = len(choice) * self._width
        own = [at * self._width + one for at, one in enumerate(choice)]
        return [*own, *(start + place for place in pairs)]

    def _overlap(self, rows: torch.Tensor) -> _Overlap:
        """Sums over the loads that each row has.

        Args:
            rows: (choices, loads), 1 where a choice has a load.
        """
        return _Overlap(
            load=rows @ self._mean,
            variance=rows @ self._variance,
            load_shared=(rows * self._mean) @ self._had.T,
            variance_shared=(rows * self._variance) @ self._had.T,
        )

    def _covariance(self, each: _Overlap) -> torch.Tensor:
        """With each trial."""
        either = each.load[..., None] + self._tried - each.load_shared
        alike = torch.where(either > 0, each.load_shared / either, 1.0)
        return each.variance_shared + (_INTERPLAY * self._allowed) ** 2 * alike

    def _chance(self, each: _Overlap) -> torch.Tensor:
        """The probability that a choice holds."""
        covariance = self._covariance(each)
        mean = each.load + self._constant + covariance @ self._taught
        known = torch.linalg.solve_triangular(self._root, covariance.T, upper=False)
        known = known.square().sum(0)
        variance = each.variance + (_INTERPLAY * self._allowed) ** 2 - known
        least = (_NOISE * self._allowed) ** 2
        room = self._allowed - mean
        return 0.5 * torch.erfc(-room / (2 * variance.clamp_min(least)).sqrt())

    def loads(self) -> list[list[float]]:
        """Loads as they are believed now, for the knapsack."""
        mean = self._mean + self._variance * (self._taught @ self._had)
        count = len(self._problem.loads) * self._width
        rows = mean[:count].clamp_min(0.0).reshape(-1, self._width).tolist()
        return [
            [
                math.inf if math.isinf(before) else now
                for now, before in zip(new, old, strict=True)
            ]
            for new, old in zip(rows, self._problem.loads, strict=True)
        ]

    def solved(self) -> Iterator[Choice]:
        """Solve with what is believed, a little below the budget and above it."""
        loads, margin = self.loads(), math.sqrt(self._allowed)
        for share in _SHARES:
            choice = self._problem.solve(share * margin, loads)
            if choice is not None:
                yield choice

    def best_prospect(self, best: Trial, tried: set[Choice]) -> Prospect | None:
        """The choice from which the largest saving is expected, if there is any.

        Args:
            best: The cheapest trial that held.
            tried: What was run.
        """
        found = [
            Prospect(choice=choice, gain=self._gain(best, choice))
            for choice in dict.fromkeys(self.solved())
            if choice not in tried
        ]
        found += itertools.islice(self._neighbours(best, tried), 1)
        return max(found, key=lambda each: each.gain, default=None)

    def _gain(self, best: Trial, choice: Choice) -> float:
        """The saving expected from any choice."""
        saved = best.cost - self._problem.cost(choice)
        return max(0.0, saved) * float(self._chance(self._overlap(self._row(choice))))

    def _row(self, choice: Choice) -> torch.Tensor:
        row = torch.zeros(1, len(self._mean), dtype=torch.float64)
        row[0, self._places(choice)] = 1.0
        return row

    def _neighbours(self, best: Trial, tried: set[Choice]) -> Iterator[Prospect]:
        """Choices that change one group or two, the largest gain first."""
        moves = self._moves(best)
        if not moves:
            return
        saved = torch.tensor([each for _, _, each in moves], dtype=torch.float64)
        alone = self._overlap(torch.cat([self._row(_made(best, m)) for m in moves]))
        changes = alone.minus(self._overlap(self._row(best.choice)))
        first, second = torch.triu_indices(len(moves), len(moves), offset=1)
        groups = torch.tensor([at for at, _, _ in moves])
        worth = (groups[first] != groups[second]) & (saved[first] + saved[second] > 0)
        first, second = first[worth], second[worth]
        both = alone.at(first).plus(changes.at(second))
        gains = torch.cat(
            [
                saved.clamp_min(0.0) * self._chance(alone),
                (saved[first] + saved[second]) * self._chance(both),
            ]
        )
        for place in gains.argsort(descending=True, stable=True).tolist():
            gain = float(gains[place])
            if gain <= 0:
                return
            pair = place - len(moves)
            made = [place] if pair < 0 else [int(first[pair]), int(second[pair])]
            choice = _made(best, *(moves[move] for move in made))
            if choice not in tried:
                yield Prospect(choice=choice, gain=gain)

    def _moves(self, best: Trial) -> list[tuple[int, int, float]]:
        """Group, another candidate for it, and what that saves; dearer ones too."""
        costs, loads = self._problem.costs, self._problem.loads
        moves = [
            (at, other, costs[at][one] - costs[at][other])
            for at, one in enumerate(best.choice)
            for other in range(self._width)
            if other != one and math.isfinite(loads[at][other])
        ]
        return sorted(moves, key=lambda move: -abs(move[2]))[:_MOST_MOVES]


def _made(best: Trial, *moves: tuple[int, int, float]) -> Choice:
    """The best choice with some groups changed."""
    changed = {at: other for at, other, _ in moves}
    return tuple(changed.get(at, one) for at, one in enumerate(best.choice))
