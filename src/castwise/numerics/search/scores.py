"""Scores: what was learnt about every unit and candidate, as plain values.

They are all that a solution needs, so that another budget is solved without running the
model again. From K probes with products a_k comes D = mean of a_k^2, an unbiased but
noisy estimate; from one look at the reference step comes Fisher's F = |gy * delta|^2,
which is precise but only proportional. Both together:

    v = (K D + 4 min(c F, 10 D)) / (K + 4)        c the median of D / F

The shrinkage is against the winner's curse: the cheapest solution picks the units whose
error happens to be underestimated.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from castwise.numerics.search.units import Unit

_PRIOR = 4.0  # how many probes Fisher's estimate is worth
_CAP = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What one candidate does to one unit."""

    gradient: tuple[float, ...]
    """Products of the probes with the gradient; fewer where a probe did not fit."""

    output: tuple[float, ...]
    """Products of the probes with the output; none where no one asked."""

    loss: float
    """<gy, delta>: the change of the loss, to first order."""

    fisher: float
    """|gy * delta|^2."""

    forced: str = ""
    """Why the candidate cannot be taken, or nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Everything that a solution needs to know about a model."""

    fingerprint: str
    """Of the model, the batches, the formats and the settings."""

    tree: tuple[tuple[str, str], ...]
    """All names of all modules, each with the first name of its module."""

    units: tuple[Unit, ...]
    """What gets a format of its own."""

    groups: tuple[tuple[int, ...], ...]
    """What moves together, as places in `units`."""

    candidates: tuple[str, ...]
    """By name, in the user's order."""

    default: str
    """The candidate that is the policy's default."""

    scored: tuple[str, ...]
    """Candidates that were replayed; the errors of others count as `rest`."""

    rest: Mapping[str, float]
    """Kind -> error of the model all in fp32, the noise floor."""

    scales: Mapping[str, float]
    """Kind -> what errors are relative to: norms of gradient and output, the loss."""

    loss_scale: float
    """For backwards in fp16."""

    values: Mapping[str, Mapping[str, Score]]
    """Unit -> candidate -> score."""

    costs: Mapping[str, Mapping[str, float]]
    """Unit -> candidate -> cost, by the model asked for."""

    unstable: Mapping[str, str]
    """Unit -> the decision in it that turned over in a probe."""

    never_called: tuple[str, ...]
    """Modules with weights that no batch reached."""

    num_steps: int
    """Forward and backward runs that scoring took, replays included."""

    has_outputs: bool = False
    """Whether products with the output were taken."""

    operators: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)
    """Operator that may be put low -> unit that calls it -> what that does to it."""

    def record(self) -> dict[str, Any]:
        """Plain values for JSON; `from_record` reads them."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Build scores from what `record` gave."""
        values = {
            fqn: {name: Score(**_frozen(score)) for name, score in each.items()}
            for fqn, each in record["values"].items()
        }
        units = tuple(Unit(**_frozen(unit)) for unit in record["units"])
        operators = {
            op: {fqn: Score(**_frozen(score)) for fqn, score in each.items()}
            for op, each in record["operators"].items()
        }
        fields: dict[str, Any] = _frozen(record) | {
            "values": values,
            "units": units,
            "operators": operators,
        }
        return cls(**fields)

    def squared_errors(self, kind: str) -> list[dict[str, float]]:
        """For every group and candidate, the squared relative error that it causes.

        Infinite where the candidate cannot be taken.
        """
        raw, constant, scale = self._raw(kind)
        return [
            {name: _shrunk(pair, constant) / scale for name, pair in each.items()}
            for each in raw
        ]

    def operator_errors(self, kind: str) -> dict[tuple[str, str], float]:
        """The same for operators put low: operator and the unit that calls it."""
        _, constant, scale = self._raw(kind)
        source = _source(kind)
        return {
            (op, fqn): _shrunk(_estimate([score], source), constant) / scale
            for op, each in self.operators.items()
            for fqn, score in each.items()
        }

    def _raw(self, kind: str) -> tuple[list[dict[str, _Estimate]], float, float]:
        """Estimates of all groups, the ratio to Fisher's, the squared scale."""
        source = _source(kind)
        raw = [self._estimates(group, source) for group in self.groups]
        constant = _median_ratio([pair for each in raw for pair in each.values()])
        return raw, constant, self.scales[source] ** 2 or 1.0

    def group_cost(self, group: Sequence[int], candidate: str) -> float:
        """What a group costs in a candidate."""
        return sum(self.costs[self.units[at].fqn][candidate] for at in group)

    def _estimates(self, group: Sequence[int], kind: str) -> dict[str, _Estimate]:
        """Candidate -> what is known of the squared error."""
        found: dict[str, _Estimate] = {}
        for name in self.candidates:
            if name not in self.scored:
                found[name] = (0.0, 0.0, 1)
                continue
            scores = [self.values[self.units[at].fqn][name] for at in group]
            found[name] = _estimate(scores, kind)
        return found


_Estimate = tuple[float | None, float, int]
"""Estimate of the squared error, Fisher's, number of probes."""


def _estimate(scores: Sequence[Score], kind: str) -> _Estimate:
    """What is known of units that move together."""
    fisher = sum(score.fisher for score in scores)
    if any(score.forced for score in scores):
        fisher = math.inf
    if kind == "loss":
        change = sum(score.loss for score in scores)
        return (change * change + fisher) / 2, fisher, 1
    columns = [getattr(score, kind) for score in scores]
    count = min(map(len, columns))
    sums = [sum(column[k] for column in columns) for k in range(count)]
    return sum(a * a for a in sums) / count if count else None, fisher, count


def _source(kind: str) -> str:
    """Which products say something about a kind of error."""
    return "output" if kind == "measure" else kind


def _frozen(record: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping whose lists are tuples, two levels down."""
    return {
        key: tuple(tuple(e) if isinstance(e, list) else e for e in value)
        if isinstance(value, list)
        else value
        for key, value in record.items()
    }


def _median_ratio(pairs: Sequence[tuple[float | None, float, int]]) -> float:
    ratios = [
        mean / fisher
        for mean, fisher, _ in pairs
        if mean and fisher and math.isfinite(mean) and math.isfinite(fisher)
    ]
    return statistics.median(ratios) if ratios else 0.0


def _shrunk(pair: tuple[float | None, float, int], constant: float) -> float:
    mean, fisher, count = pair
    if math.isinf(fisher) or (mean is not None and not math.isfinite(mean)):
        return math.inf
    prior = constant * fisher
    if mean is None:
        return _CAP * prior
    return (count * mean + _PRIOR * min(prior, _CAP * mean)) / (count + _PRIOR)
