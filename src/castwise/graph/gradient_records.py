"""What a gradient flow says: the gradients of one batch, by exponent, for any scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from castwise.decision import Decision
from castwise.errors import TargetError
from castwise.formats import parse_format
from castwise.numerics.watch.exponents import ExponentHistogram

MARGIN_BITS = 3
"""Room that a suggested scale leaves for batches with larger gradients."""

_LARGEST_SCALE = 24
_TOLERATED_UNDERFLOW = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientNode:
    """The gradient of one value."""

    name: str
    """The node of the captured graph; a weight by its fqn."""

    op: str
    """The operator that made the value; `weight` or `input`."""

    module: str
    """fqn of the module that called it."""

    histogram: ExponentHistogram
    """Its numbers by exponent."""

    num_elements: int
    """How many numbers it has; the histogram may count a sample."""

    is_low: bool
    """Whether it, or a part of it, comes in a low format by the plan of the policy."""

    is_noise: bool = False
    """Whether it is zero in theory, and rounding in fact."""

    def shares(self, fmt: str, scale: float = 1.0) -> tuple[float, float]:
        """The shares that would underflow and overflow in a format, times a scale."""
        found = self.histogram.shares(fmt, scale)
        return found.underflow, found.overflow

    def __str__(self) -> str:
        highest = self.histogram.highest
        size = "all zero" if highest is None else f"largest 2^{highest}"
        noise = ", noise" if self.is_noise else ""
        return f"{self.module or 'root'}: {self.name} ({self.op}): {size}{noise}"


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientFlow:
    """The gradients of one batch."""

    nodes: tuple[GradientNode, ...]
    """In the order in which the forward makes their values."""

    @property
    def telling(self) -> tuple[GradientNode, ...]:
        """The gradients in a low format that are no noise and not zero."""
        return tuple(
            node
            for node in self.nodes
            if node.is_low and not node.is_noise and node.histogram.highest is not None
        )

    @property
    def highest(self) -> int | None:
        """The largest exponent of all gradients that tell something."""
        return max((n.histogram.highest or 0 for n in self.telling), default=None)

    def underflow(self, scale: float, fmt: str = "fp16") -> float:
        """The largest share of any gradient that would become zero at a loss scale."""
        return max((n.shares(fmt, scale)[0] for n in self.telling), default=0.0)

    def overflow(self, scale: float, fmt: str = "fp16") -> float:
        """The largest share of any gradient that would overflow at a loss scale."""
        return max((n.shares(fmt, scale)[1] for n in self.telling), default=0.0)

    def largest_scale(self, fmt: str = "fp16") -> float:
        """The largest power of two at which nothing overflows on this batch."""
        highest = self.highest
        if highest is None:
            return 1.0
        return 2.0 ** (parse_format(fmt).max_exponent - highest)

    def suggest_scale(
        self, fmt: str = "fp16", *, margin_bits: int = MARGIN_BITS
    ) -> Decision[float]:
        """A static loss scale, and why.

        Raises:
            TargetError: A gradient is not finite at scale 1 already.
        """
        bad = [n for n in self.nodes if n.histogram.nans or n.histogram.infinities]
        if bad:
            raise TargetError(
                f"need finite gradients to suggest a scale, got infinities or NaNs in "
                f"{bad[0]}; diagnose the model first"
            )
        if self.highest is None:
            return Decision(1.0, "no gradient that is not zero comes in a low format")
        most = math.log2(self.largest_scale(fmt))
        bits = min(most - margin_bits, _LARGEST_SCALE)
        scale = 2.0**bits
        return Decision(
            scale,
            f"gradients reach 2^{self.highest}, so nothing overflows {fmt} up to "
            f"2^{most:.0f}; {most - bits:.0f} bits are left as a margin, and at most "
            f"{100 * self.underflow(scale, fmt):.2g} % of any gradient is lost",
        )

    def formats(
        self, scale: float, candidates: Sequence[str] = ("fp16", "bf16", "fp8_e5m2")
    ) -> dict[str, tuple[str, ...]]:
        """Node -> the formats that its gradient may be held in at a loss scale."""
        found = {}
        for node in self.telling:
            shares = {fmt: node.shares(fmt, scale) for fmt in candidates}
            found[node.name] = tuple(
                fmt
                for fmt, (under, over) in shares.items()
                if over == 0 and under <= _TOLERATED_UNDERFLOW
            )
        return found

    def select(self, module: str) -> GradientFlow:
        """The gradients of a module and of those below it."""
        return GradientFlow(
            nodes=tuple(
                node
                for node in self.nodes
                if node.module == module or node.module.startswith(f"{module}.")
            )
        )

    def by_module(self) -> dict[str, ExponentHistogram]:
        """Module -> the exponents of all its gradients together."""
        found: dict[str, list[ExponentHistogram]] = {}
        for node in self.telling:
            found.setdefault(node.module, []).append(node.histogram)
        return {module: _merged(each) for module, each in found.items()}

    def summary(self) -> str:
        """One line for logs and reports."""
        noise = sum(node.is_noise for node in self.nodes)
        scale = self.suggest_scale()
        return (
            f"{len(self.nodes)} gradients, {noise} of them noise; largest "
            f"2^{self.highest}; static scale 2^{math.log2(scale.value):.0f}: "
            f"{scale.because}"
        )

    def __str__(self) -> str:
        return "\n".join(map(str, self.nodes))

    def record(self) -> dict[str, Any]:
        """Plain values for JSON; `from_record` reads them."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> GradientFlow:
        """Build a gradient flow from what `record` gave."""
        return cls(
            nodes=tuple(
                GradientNode(
                    **{
                        **each,
                        "histogram": ExponentHistogram.from_record(each["histogram"]),
                    }
                )
                for each in record["nodes"]
            )
        )


def _merged(histograms: Sequence[ExponentHistogram]) -> ExponentHistogram:
    """All numbers of several histograms in one."""
    used = [each for each in histograms if each.counts]
    lowest = min((each.lowest for each in used), default=0)
    top = max((each.lowest + len(each.counts) for each in used), default=0)
    counts = [0] * (top - lowest)
    for each in used:
        for at, count in enumerate(each.counts, each.lowest - lowest):
            counts[at] += count
    return ExponentHistogram(
        lowest=lowest,
        counts=tuple(counts),
        zeros=sum(each.zeros for each in histograms),
        infinities=sum(each.infinities for each in histograms),
        nans=sum(each.nans for each in histograms),
    )
