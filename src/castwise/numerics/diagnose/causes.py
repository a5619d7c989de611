"""What a diagnosis says: one cause, where, the evidence and the remedy."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Cause = Literal["rounding", "range", "algorithm", "data", "nondeterminism", "none"]
"""Too few digits, too short an exponent, wrong in float64 as well, or none of these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvidenceRow:
    """One experiment and what came out of it."""

    what: str
    """What was run: `fp64`, `bf16-mixed`, `11 exponent bits, 7 digits`."""

    error: float | None = None
    """Largest relative error against the reference; none where there is none."""

    measure: float | None = None
    """The user's figure of merit; none where none was given."""

    note: str = ""
    """What else is to be known."""

    def __str__(self) -> str:
        parts = [self.what]
        if self.error is not None:
            parts.append(f"error {self.error:.3g}")
        if self.measure is not None:
            parts.append(f"measure {self.measure:.3g}")
        return ", ".join((*parts, self.note) if self.note else parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Blame:
    """The operator or tensor that a cause is found at."""

    op: str | None = None
    """ATen name without overload, `cast`, or `update`."""

    module: str | None = None
    """fqn of the module."""

    stage: str | None = None
    """`forward`, `recompute`, `backward` or `update`."""

    where: str | None = None
    """`file:line`; for data, the place in the batch."""

    tensor: str | None = None
    """The weight or buffer that is to blame, by name."""

    call: int | None = None
    """The how-manieth call of the operator from its line: the index in a recursion."""

    def __str__(self) -> str:
        named = [
            f"call {self.call} of {self.op}" if (self.call or 0) > 1 else self.op,
            f"of {self.tensor}" if self.tensor else None,
            f"in {self.module}" if self.module else None,
            f"({self.stage})" if self.stage else None,
            f"at {self.where}" if self.where else None,
        ]
        return " ".join(part for part in named if part)


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """Why something broke, or that nothing did."""

    subject: str
    """What was diagnosed, and under which policy."""

    cause: Cause
    """The cause."""

    because: str
    """One sentence that says how that is known."""

    remedy: str
    """What to do."""

    blame: Blame
    """What it is found at."""

    evidence: tuple[EvidenceRow, ...]
    """The experiments, in the order in which they were made."""

    @property
    def op(self) -> str | None:
        """The operator to blame."""
        return self.blame.op

    @property
    def module(self) -> str | None:
        """The module to blame."""
        return self.blame.module

    @property
    def where(self) -> str | None:
        """The line to blame."""
        return self.blame.where

    @property
    def is_sound(self) -> bool:
        """Whether nothing was found."""
        return self.cause == "none"

    def summary(self) -> str:
        """One line for logs and reports."""
        blamed = str(self.blame)
        at = f" at {blamed}" if blamed else ""
        return f"{self.subject}: {self.cause}{at}: {self.because}"

    def record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "summary": self.summary()}


def largest(values: list[float]) -> float:
    """The largest of some errors, of which one that is not a number is the worst."""
    if any(map(math.isnan, values)):
        return math.inf
    return max(values, default=0.0)
