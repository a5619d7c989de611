"""How far a result is from the right one, and how far it may be.

Every measure takes a candidate and a reference of the same structure (a tensor, or
tuples, lists and dicts of them), computes in float64 or complex128, and returns one
number:

    relative_error    |c - r|_2 / |r|_2, over all elements together
    maximum_error     max |c - r| / max |r|: what an average hides
    ulp_error         max |c - r| in units of the last place of r in a format
    cosine            Re <c, r> / (|c| |r|): direction, whatever the length
    share_nonfinite   infinities and NaNs;   share_zero    exact zeros

One of them alone misleads: a correlation can stay at 0.9997 while the largest error
grows thirtyfold, and a result that is zero everywhere has no infinities.

What an error may be is told by a noise floor. The same model in fp32 is wrong as well,
by error(fp32, fp64), and nobody complains; a candidate is good enough when

    error(candidate, fp64) <= k * error(fp32, fp64) + tolerance

with k = 1.5 by default. The tolerance is the price that is paid for fewer bits on
purpose: by default 16 rounding errors of the narrowest format that computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from castwise.errors import BudgetError, TargetError
from castwise.formats import Format, parse_format

if TYPE_CHECKING:
    from castwise.numerics.error_kernel import Sums

DEFAULT_K = 1.5
"""How many times the noise floor an error may be."""

TOLERATED_ROUNDINGS = 16
"""How many rounding errors of the narrowest format the default tolerance allows."""

MOST_TOLERATED = 0.25
"""No default tolerance is larger."""


def relative_error(candidate: Any, reference: Any) -> float:
    """The error in the Euclidean norm over that of the reference, all leaves together.

    Infinite where the candidate is not finite and the reference is, or where the
    reference is zero and the candidate is not.
    """
    sums = _sums(candidate, reference)
    if sums is not None:
        return _ratio(sums.error, sums.wanted)
    return _relative(_compared(candidate, reference))


def maximum_error(candidate: Any, reference: Any) -> float:
    """The largest error of an element over the largest element of the reference."""
    return _maximum(_compared(candidate, reference))


def absolute_error(candidate: Any, reference: Any) -> float:
    """The largest error of an element."""
    compared = _compared(candidate, reference)
    return max((_largest(each.error) for each in compared), default=0.0)


def ulp_error(candidate: Any, reference: Any, fmt: str | Format = "fp32") -> float:
    """The largest error of an element in units of the last place of the reference.

    Args:
        candidate: What was computed; complex numbers count by their two parts.
        reference: What is right.
        fmt: The format whose units count; below its normal range they are constant.
    """
    return _ulps(_compared(candidate, reference), parse_format(fmt))


def cosine(candidate: Any, reference: Any) -> float:
    """The cosine of the angle between candidate and reference; 1 where both are zero.

    NaN where one of them is not finite or only one is zero.
    """
    return _cosine(_compared(candidate, reference))


def share_nonfinite(values: Any) -> float:
    """The share of infinities and NaNs among all elements."""
    return _share(values, lambda each: ~torch.isfinite(each))


def share_zero(values: Any) -> float:
    """The share of exact zeros among all elements."""
    return _share(values, lambda each: each == 0)


def loss_drift(candidate: float, reference: float) -> float:
    """How far a loss moved, relative to what it should be."""
    if not math.isfinite(candidate):
        return math.inf if math.isfinite(reference) else 0.0
    return _ratio(abs(candidate - reference), abs(reference))


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """Every measure of one result, or the worst of several."""

    relative: float
    """Relative error in the Euclidean norm."""

    maximum: float
    """Largest error of an element over the largest element of the reference."""

    ulp: float
    """Largest error in units of the last place, of the format measured in."""

    cosine: float
    """Cosine of the angle to the reference."""

    nonfinite: float
    """Share of infinities and NaNs in the candidate."""

    zero: float
    """Share of exact zeros in the candidate."""

    reference_zero: float
    """Share of exact zeros in the reference, which the other is to be read beside."""

    def worst(self, other: Measures) -> Measures:
        """The worse of two, measure by measure."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        values = dict(zip((f.name for f in fields(self)), map(_worse, pairs)))  # noqa: B905 -- both walk the fields
        values["cosine"] = _lower(self.cosine, other.cosine)
        return Measures(**values)

    def record(self) -> dict[str, float]:
        """Plain values for JSON."""
        return asdict(self)


def measure(candidate: Any, reference: Any, fmt: str | Format = "fp32") -> Measures:
    """Take every measure of a candidate against a reference.

    Args:
        candidate: What was computed: a tensor or a structure of them.
        reference: What is right, of the same structure and shapes.
        fmt: The format whose units `ulp` counts.

    Raises:
        TargetError: Structures or shapes differ.
    """
    sums = _sums(candidate, reference, fmt)
    if sums is not None:
        return Measures(
            relative=_ratio(sums.error, sums.wanted),
            maximum=_ratio(sums.largest_error, sums.largest_wanted),
            ulp=sums.ulps,
            cosine=sums.cosine,
            nonfinite=0.0,
            zero=sums.zero,
            reference_zero=sums.wanted_zero,
        )
    compared = _compared(candidate, reference)
    return Measures(
        relative=_relative(compared),
        maximum=_maximum(compared),
        ulp=_ulps(compared, parse_format(fmt)),
        cosine=_cosine(compared),
        nonfinite=share_nonfinite(candidate),
        zero=share_zero(candidate),
        reference_zero=share_zero(reference),
    )


def share_flushed(candidate: Any, reference: Any) -> float:
    """The share of elements that are zero and should not be."""
    sums = _sums(candidate, reference)
    if sums is not None:
        return sums.flushed
    flushed = total = 0
    for got, wanted in zip(*_side_by_side(candidate, reference), strict=True):
        flushed += int(((got == 0) & (wanted != 0)).sum())
        total += got.numel()
    return flushed / total if total else 0.0


def worst_of(measures: Iterable[Measures]) -> Measures | None:
    """The worst of several, measure by measure; none of none."""
    worst = None
    for each in measures:
        worst = each if worst is None else worst.worst(each)
    return worst


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseRule:
    """What an error may be: error <= k * floor + tolerance."""

    k: float = DEFAULT_K
    """How many times the noise floor."""

    tolerance: float = 0.0
    """What is allowed on top, for fewer bits on purpose."""

    def __post_init__(self) -> None:
        for name, value in (("k", self.k), ("tolerance", self.tolerance)):
            if not math.isfinite(value) or value < 0:
                raise BudgetError(f"{name} is a finite number from 0 on, got {value}")

    def limit(self, floor: float) -> float:
        """The largest error that is allowed above a noise floor."""
        return self.k * floor + self.tolerance

    def holds(self, error: float, floor: float) -> bool:
        """Whether an error is allowed; one that is not a number never is."""
        return error <= self.limit(floor)

    def __str__(self) -> str:
        return f"error <= {self.k:g} x floor + {self.tolerance:.3g}"


def default_tolerance(fmt: str | Format) -> float:
    """The tolerance for results that are computed in a format.

    In 8 bits 16 roundings would allow a result of nothing but zeros.
    """
    return min(TOLERATED_ROUNDINGS * parse_format(fmt).eps / 2, MOST_TOLERATED)


def tensors_of(values: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the floating and complex tensors of a structure, each with its path.

    Dataclass-like outputs of models (mappings, named tuples) are walked by name.
    """
    if isinstance(values, torch.Tensor):
        if values.is_floating_point() or values.is_complex():
            yield path, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from tensors_of(value, f"{path}[{key!r}]")
    elif isinstance(values, (list, tuple)):
        for index, value in enumerate(values):
            yield from tensors_of(value, f"{path}[{index}]")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Compared:
    """Two tensors side by side in float64 or complex128, and how far they are apart."""

    got: torch.Tensor
    wanted: torch.Tensor
    error: torch.Tensor


def _sums(candidate: Any, reference: Any, fmt: str | Format = "fp32") -> Sums | None:
    """Sum in one pass where that can be; none where `_compared` has to."""
    left, right = _side_by_side(candidate, reference)
    if not all(each.device.type == "cpu" for each in (*left, *right)):
        return None
    from castwise.numerics.error_kernel import (  # noqa: PLC0415 -- imports numba
        sums_of,
    )

    return sums_of(left, right, parse_format(fmt))


def _compared(candidate: Any, reference: Any) -> list[_Compared]:
    """Compare two structures tensor by tensor."""
    found = []
    for one, other in zip(*_side_by_side(candidate, reference), strict=True):
        got, wanted = _wide(one), _wide(other)
        found.append(_Compared(got=got, wanted=wanted, error=_difference(got, wanted)))
    return found


def _side_by_side(
    candidate: Any, reference: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Walk two structures side by side.

    Raises:
        TargetError: Structures or shapes differ.
    """
    left, right = list(tensors_of(candidate)), list(tensors_of(reference))
    if [path for path, _ in left] != [path for path, _ in right]:
        raise TargetError(
            f"candidate and reference must return the same structure, got {len(left)} "
            f"and {len(right)} floating tensors at {[path for path, _ in left][:4]} "
            f"and {[path for path, _ in right][:4]}"
        )
    for (path, one), (_, other) in zip(left, right, strict=True):
        if one.shape != other.shape:
            raise TargetError(
                f"candidate and reference must have the same shapes, got "
                f"{tuple(one.shape)} and {tuple(other.shape)} at "
                f"{path or 'the output'}"
            )
    return [one for _, one in left], [other for _, other in right]


def _relative(compared: list[_Compared]) -> float:
    error = math.hypot(*(_norm(each.error) for each in compared))
    return _ratio(error, math.hypot(*(_norm(each.wanted) for each in compared)))


def _maximum(compared: list[_Compared]) -> float:
    error = max((_largest(each.error) for each in compared), default=0.0)
    return _ratio(error, max((_largest(e.wanted) for e in compared), default=0.0))


def _ulps(compared: list[_Compared], fmt: Format) -> float:
    worst = 0.0
    for each in compared:
        error = each.error
        if each.got.is_complex():
            error = _difference(_as_real(each.got), _as_real(each.wanted))
        if _largest(error):
            worst = max(worst, _largest(error / _ulp(_as_real(each.wanted), fmt)))
    return worst


def _cosine(compared: list[_Compared]) -> float:
    sizes = [(_norm(each.got), _norm(each.wanted)) for each in compared]
    norms = [math.hypot(*side) for side in zip(*sizes, strict=True)]
    if not any(norms):
        return 1.0
    if not all(map(math.isfinite, norms)) or not all(norms):
        return math.nan
    return sum(
        float(
            (_as_real(each.got) / norms[0]).flatten()
            @ (_as_real(each.wanted) / norms[1]).flatten()
        )
        for each in compared
    )


def _wide(values: torch.Tensor) -> torch.Tensor:
    dtype = torch.complex128 if values.is_complex() else torch.float64
    return values.detach().to(dtype)


def _difference(got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The error; infinite where the candidate is not finite and the reference is.

    Two equal infinities, and NaN where NaN is right, are no error.
    """
    plain = (got - wanted).abs()
    if math.isfinite(_largest(plain)):
        return plain
    same = (got == wanted) | (torch.isnan(got) & torch.isnan(wanted))
    error = torch.where(same, torch.zeros_like(plain), plain)
    return torch.where(torch.isnan(error), torch.full_like(error, math.inf), error)


def _norm(values: torch.Tensor) -> float:
    """The Euclidean norm, which overflows only where the norm itself does."""
    norm = float(torch.linalg.vector_norm(values))
    if 1e-140 < norm < math.inf:
        return norm
    largest = _largest(values)
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * math.sqrt(float((_as_real(values) / largest).square().sum()))


def _largest(values: torch.Tensor) -> float:
    if not values.numel():
        return 0.0
    if values.is_complex():
        return float(values.abs().max())
    low, high = torch.aminmax(values)
    return max(-float(low), float(high)) if low == low else math.nan  # noqa: PLR0124 -- NaN


def _as_real(values: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values


def _ratio(error: float, norm: float) -> float:
    if error == 0:
        return 0.0
    if math.isnan(error) or math.isnan(norm) or norm == 0:
        return math.inf
    return math.inf if math.isinf(error) else error / norm


def _ulp(values: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The spacing of a format's numbers at each value."""
    exponent = torch.frexp(torch.nan_to_num(values.abs(), posinf=fmt.max)).exponent - 1
    exponent = exponent.clamp(fmt.min_exponent, fmt.max_exponent) - fmt.mantissa_bits
    return torch.ldexp(torch.ones_like(values), exponent)


def _share(values: Any, condition: Callable[[torch.Tensor], torch.Tensor]) -> float:
    counted = total = 0
    for _, each in tensors_of(values):
        counted += int(condition(each.detach()).sum())
        total += each.numel()
    return counted / total if total else 0.0


def _worse(pair: tuple[float, float]) -> float:
    return math.nan if any(map(math.isnan, pair)) else max(pair)


def _lower(one: float, other: float) -> float:
    return math.nan if math.isnan(one) or math.isnan(other) else min(one, other)
