"""What a watched run tells: windows of steps, each with the numbers of every tensor.

A window is plain data. It goes into the journal of a run, into JSON and into reports,
and answers there for formats and loss scales that the run never used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from castwise.formats import Format
from castwise.numerics.watch.exponents import ExponentHistogram, RangeShares

TensorKind = Literal["weight", "gradient", "output", "output_gradient"]
"""What was counted: parameters, their gradients, what modules hand out, and the
gradients of that."""

WHAT_IF = ("fp16", "bf16", "fp8_e4m3", "fp8_e5m2")
"""Formats that a summary answers for, besides the one that runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorWatch:
    """The numbers of one tensor in one window."""

    kind: TensorKind
    """What the tensor is."""

    name: str
    """fqn of the parameter, or of the module whose output it is."""

    format: str
    """The format that it runs in."""

    num_elements: int
    """How many numbers it has, of which some or all were counted."""

    histogram: ExponentHistogram
    """The exponents counted; those of gradients without the loss scale."""

    lost: Mapping[str, float] | None = None
    """For weights: format -> share of the updates that rounded to nothing in it, or
    would have. The running format comes from what happened. None for other tensors, and
    for weights whose exact value is held elsewhere."""

    def shares(
        self, fmt: str | Format | None = None, scale: float = 1.0
    ) -> RangeShares:
        """What becomes of the numbers in a format, the running one by default."""
        return self.histogram.shares(fmt or self.format, scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchWindow:
    """The statistics of some steps, over all ranks."""

    first_step: int
    """The first step that was looked at, counted from 0."""

    last_step: int
    """The last one."""

    scale: float
    """The loss scale of the last one."""

    num_ranks: int
    """How many processes were counted together."""

    num_skipped: int
    """Steps between the window before and the end of this one that were skipped."""

    tensors: Sequence[TensorWatch]
    """Everything that was counted."""

    def of(self, *kinds: TensorKind) -> tuple[TensorWatch, ...]:
        """The tensors of some kinds."""
        return tuple(each for each in self.tensors if each.kind in kinds)

    def total(self, *kinds: TensorKind) -> ExponentHistogram:
        """One histogram of all tensors of some kinds."""
        return joined(tuple(each.histogram for each in self.of(*kinds)))

    def largest_scale(self, fmt: str = "fp16") -> float | None:
        """The largest loss scale by which no gradient overflows a format."""
        return self.total("gradient", "output_gradient").largest_scale(fmt)

    def lost_updates(self, fmt: str | None = None) -> float | None:
        """Share of the updates that round to nothing, over all weights."""
        known = [
            (each.num_elements, each.lost[fmt or each.format])
            for each in self.of("weight")
            if each.lost is not None and (fmt or each.format) in each.lost
        ]
        weight = sum(size for size, _ in known)
        return sum(size * share for size, share in known) / weight if weight else None

    def measures(self) -> dict[str, float]:
        """A few numbers for the journal of a run, and for its curves."""
        gradients = self.total("gradient", "output_gradient")
        outputs = self.total("output")
        found: dict[str, float] = {}
        for fmt in ("fp16", "bf16"):
            shares = gradients.shares(fmt, self.scale)
            found[f"gradient_underflow_{fmt}"] = shares.underflow
            found[f"output_overflow_{fmt}"] = outputs.shares(fmt).overflow
            lost = self.lost_updates(fmt)
            if lost is not None:
                found[f"lost_updates_{fmt}"] = lost
        lost = self.lost_updates()
        if lost is not None:
            found["lost_updates"] = lost
        found["nonfinite"] = (
            self.total("weight", "gradient", "output", "output_gradient")
            .shares("fp32")
            .nonfinite
        )
        scale = self.largest_scale()
        if scale is not None:
            found["largest_scale_fp16"] = scale
        return found

    def record(self) -> dict[str, Any]:
        """Plain values for JSON; `from_record` reads them."""
        values = {name: getattr(self, name) for name in self.__slots__[:-1]}
        tensors = [
            {
                "kind": each.kind,
                "name": each.name,
                "format": each.format,
                "num_elements": each.num_elements,
                "histogram": each.histogram.record(),
                "lost": None if each.lost is None else dict(each.lost),
            }
            for each in self.tensors
        ]
        return {**values, "tensors": tensors}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> WatchWindow:
        """Build a window from what `record` gave."""
        tensors = tuple(
            TensorWatch(
                **{
                    **each,
                    "histogram": ExponentHistogram.from_record(each["histogram"]),
                }
            )
            for each in record["tensors"]
        )
        known = {name: record[name] for name in cls.__slots__[:-1]}
        return cls(**known, tensors=tensors)


def joined(histograms: tuple[ExponentHistogram, ...]) -> ExponentHistogram:
    """Add histograms up."""
    counts: dict[int, int] = {}
    for each in histograms:
        for at, count in enumerate(each.counts, each.lowest):
            counts[at] = counts.get(at, 0) + count
    used = [at for at, count in counts.items() if count]
    lowest, highest = (min(used), max(used)) if used else (0, -1)
    special = {
        name: sum(getattr(each, name) for each in histograms)
        for name in ("zeros", "infinities", "nans")
    }
    return ExponentHistogram(
        lowest=lowest,
        counts=tuple(counts.get(at, 0) for at in range(lowest, highest + 1)),
        **special,
    )
