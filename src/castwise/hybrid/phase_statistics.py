"""What every phase cost and brought: counted while the run goes on.

Virtual steps are what proposals claimed; credited steps are what their measured fall of
the loss was worth at the pace of the real steps before. Neither is a speed: that is
measured with a clock, to a loss that was fixed before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from castwise.hybrid.phases import Phase


@dataclass(kw_only=True, slots=True)
class PhaseCount:
    """All steps of one phase so far."""

    asked: str = ""
    """The format that was asked for."""

    effective: str = ""
    """The format that the policy in force computes in."""

    steps: int = 0
    """Steps, each with one batch."""

    forwards: int = 0
    """Forward passes, of one batch each."""

    backwards: int = 0
    """Backward passes, of one batch each."""

    skips: int = 0
    """Steps in which a gradient was not finite."""

    seconds: float = 0.0
    """Time inside of `step`."""

    switches: int = 0
    """How often the precision of this phase was put into force after another one."""

    switch_seconds: float = 0.0
    """What that took."""

    product_formats: dict[str, float] = field(default_factory=dict)
    """Format -> share of the flops of matrix products, as observed."""

    peak_bytes: int = 0
    """Highest memory of the device within the phase; 0 if it was not measured."""

    held_bytes: int = 0
    """Most that was held when the phase ended; 0 if it was not measured."""

    scale: float = 1.0
    """The loss scale after its last step."""


@dataclass(kw_only=True, slots=True)
class PhaseStatistics:
    """All phases, and what became of the predictions."""

    phases: dict[str, PhaseCount] = field(
        default_factory=lambda: {phase.value: PhaseCount() for phase in Phase}
    )
    """Phase -> its count."""

    tries: int = 0
    """Proposals."""

    accepts: int = 0
    """Proposals at which the run stayed."""

    refusals: int = 0
    """Proposals that were rolled back before any gradient was computed there."""

    late_rollbacks: int = 0
    """Landings that were taken back after corrective steps."""

    virtual_steps: int = 0
    """Steps that accepted proposals claimed to be worth."""

    credited_steps: float = 0.0
    """Real steps that would have brought the same fall of the loss."""

    declined: int = 0
    """Times that the gate was open, and not to predict the better choice."""

    resting_bytes: int = 0
    """Bytes of optimizer states that were away in the last predict phase."""

    resting_seconds: float = 0.0
    """Time that it took to put them away and to bring them back."""

    calibration_count: int = 0
    """Windows whose back-test was followed by another, without a jump between."""

    calibration_sum: float = 0.0
    """Sum of what the back-tests of those were off by."""

    @property
    def backwards(self) -> int:
        """Backward passes of the run."""
        return sum(count.backwards for count in self.phases.values())

    @property
    def forwards(self) -> int:
        """Forward passes of the run, with those of real steps."""
        return sum(count.forwards for count in self.phases.values())

    @property
    def confidence_error(self) -> float:
        """Mean error of the confidence as a forecast of the next window's cosine."""
        if not self.calibration_count:
            return float("nan")
        return self.calibration_sum / self.calibration_count

    def shares(self) -> dict[str, float]:
        """Phase -> its share of the steps, as `estimate_memory_savings` takes it."""
        total = max(1, sum(count.steps for count in self.phases.values()))
        return {name: count.steps / total for name, count in self.phases.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values from which `from_dict` builds equal statistics."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PhaseStatistics:
        """Build statistics from plain values."""
        given = dict(values)
        phases = given.pop("phases").items()
        counts = {name: PhaseCount(**count) for name, count in phases}
        return cls(phases=counts, **given)
