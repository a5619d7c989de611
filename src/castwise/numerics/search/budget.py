"""An error budget: how wrong gradient, output, loss or a measure of one's own may be.

    Budget(gradient=1e-2)                        the whole gradient, relative L2 error
    Budget(gradient=1e-2, output=5e-3)           both must hold
    Budget(measure=Measure(name="drift", of=function, limit=0.1))

Every error is taken against the same model in the reference format. A budget holds on
a batch when no error is above its limit, and on several when it holds on each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from castwise.errors import BudgetError

KINDS = ("gradient", "output", "loss", "measure")
"""What a budget can limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """A measure of one's own, from the model's output and the reference's."""

    name: str
    """How it is called in reports."""

    of: Callable[[Any, Any], float]
    """From the candidate's output and the reference's to a number; less is better."""

    limit: float
    """The largest value that is good enough."""

    def __post_init__(self) -> None:
        _check_limit(f"the measure {self.name!r}", self.limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """The largest errors that are good enough; at least one is given."""

    gradient: float | None = None
    """Relative L2 error of the gradients of all weights together."""

    output: float | None = None
    """Relative L2 error of what the model returns."""

    loss: float | None = None
    """Relative error of the loss."""

    measure: Measure | None = None
    """A measure of one's own."""

    def __post_init__(self) -> None:
        if not self.limits:
            raise BudgetError(
                "a budget needs at least one of gradient, output, loss, measure; "
                "write Budget(gradient=1e-2)"
            )
        for kind, limit in self.limits.items():
            _check_limit(kind, limit)

    @property
    def limits(self) -> dict[str, float]:
        """Kind -> the largest error allowed."""
        given = {
            "gradient": self.gradient,
            "output": self.output,
            "loss": self.loss,
            "measure": None if self.measure is None else self.measure.limit,
        }
        return {kind: limit for kind, limit in given.items() if limit is not None}

    def usage(self, errors: Mapping[str, float]) -> float:
        """How much of the budget the worst error uses up; above 1 it is broken."""
        shares = [errors[kind] / limit for kind, limit in self.limits.items()]
        return math.inf if any(map(math.isnan, shares)) else max(shares)

    def __str__(self) -> str:
        return ", ".join(f"{kind}={limit:g}" for kind, limit in self.limits.items())


def parse_budget(text: str) -> Budget:
    """Read `gradient=1e-2` or `gradient=1e-2,output=5e-3`.

    Raises:
        BudgetError: The text is none of these.
    """
    given: dict[str, Any] = {}
    for part in text.split(","):
        kind, equals, number = (piece.strip() for piece in part.partition("="))
        if kind not in KINDS[:-1] or not equals or kind in given:
            raise BudgetError(
                f"a budget is written gradient=1e-2[,output=...][,loss=...], each once;"
                f" got {text!r}"
            )
        try:
            given[kind] = float(number)
        except ValueError:
            raise BudgetError(f"{kind} needs a number, got {number!r}") from None
    return Budget(**given)


def _check_limit(name: str, limit: float) -> None:
    if not math.isfinite(limit) or limit <= 0:
        raise BudgetError(f"the budget of {name} is a number above 0, got {limit}")
