"""How far a result may be from the exact one: one derived row per format.

    one rounding      |rounded - x| <= unit * |x| + step / 2    (nearest, no overflow)
    n roundings       |computed - exact| <= gamma(n) * sum |terms|  (any order)
    gamma(n)          n * unit / (1 - n * unit)

Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., theorem 2.2, lemma 3.1.
`unit` is half of eps and `step` the smallest subnormal number, both from the layout of
the format's bits. No environment loosens a row; a test that needs more counts more
roundings, and says which.
"""

from __future__ import annotations

from dataclasses import dataclass

from castwise.formats import FORMATS


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """What rounding alone may do in one format."""

    unit: float
    """Largest relative error of one rounding to nearest of a normal number."""

    step: float
    """Spacing of the subnormal numbers; half of it is the largest error there."""

    def gamma(self, num_roundings: int) -> float:
        """Return the largest relative error of that many roundings in a row."""
        error = num_roundings * self.unit
        assert error < 1, f"{num_roundings} roundings leave no digit"
        return error / (1 - error)


TOLERANCES = {
    name: Tolerance(unit=fmt.eps / 2, step=fmt.smallest_subnormal)
    for name, fmt in FORMATS.items()
}
"""fp64 1.1e-16, fp32 6.0e-8, tf32 4.9e-4, bf16 3.9e-3, fp16 4.9e-4, e4m3 6.3e-2, ..."""
