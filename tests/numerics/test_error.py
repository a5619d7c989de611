from __future__ import annotations

import functools
import math

import pytest
import torch

from castwise.errors import BudgetError, TargetError
from castwise.formats import FORMATS, parse_format
from castwise.numerics import error
from castwise.numerics.error import (
    Measures,
    NoiseRule,
    absolute_error,
    cosine,
    default_tolerance,
    loss_drift,
    maximum_error,
    measure,
    relative_error,
    share_nonfinite,
    share_zero,
    tensors_of,
    ulp_error,
    worst_of,
)


def test_relative_error_is_that_of_all_leaves_together() -> None:
    """The norm runs over the whole structure, not the mean of its parts."""
    reference = {"a": torch.tensor([3.0, 0.0]), "b": [torch.tensor([4.0])]}
    candidate = {"a": torch.tensor([3.0, 0.5]), "b": [torch.tensor([4.0])]}
    assert relative_error(candidate, reference) == pytest.approx(0.1)
    assert maximum_error(candidate, reference) == pytest.approx(0.125)
    assert absolute_error(candidate, reference) == 0.5


def test_differences_are_taken_in_float64() -> None:
    """Half a unit of bf16 is seen, which a difference in bf16 would not show."""
    reference = torch.full((63,), 1 + 2.0**-9, dtype=torch.float64)
    candidate = torch.ones(63, dtype=torch.bfloat16)
    assert relative_error(candidate, reference) == pytest.approx(2.0**-9, rel=1e-2)


def test_complex_results_are_measured_whole() -> None:
    """A wrong sign of the imaginary part is an error of twice that part."""
    reference = torch.tensor([0.6 + 0.8j])
    assert relative_error(reference.conj(), reference) == pytest.approx(1.6)
    assert cosine(reference.conj(), reference) == pytest.approx(0.36 - 0.64)
    assert ulp_error(reference + 2.0**-23 * 1j, reference) == pytest.approx(2, rel=0.3)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_candidate_that_is_not_finite_is_infinitely_wrong(value: float) -> None:
    """No measure may come out small because NaN compares false."""
    candidate, reference = torch.tensor([value, 1.0]), torch.tensor([1.0, 1.0])
    assert relative_error(candidate, reference) == math.inf
    assert maximum_error(candidate, reference) == math.inf
    assert ulp_error(candidate, reference) == math.inf
    assert math.isnan(cosine(candidate, reference))
    assert share_nonfinite(candidate) == 0.5


def test_equal_infinities_are_no_error() -> None:
    """A mask of -inf in both is right; one that is missing is wrong."""
    masked = torch.tensor([-math.inf, 2.0])
    assert relative_error(masked, masked.double()) == 0
    assert relative_error(torch.tensor([0.0, 2.0]), masked) == math.inf


def test_norms_neither_overflow_nor_underflow() -> None:
    """Squares of 1e200 and of 1e-200 do not exist in float64."""
    for size in (1e200, 1e-200):
        reference = torch.full((3,), size, dtype=torch.float64)
        assert relative_error(reference * 1.25, reference) == pytest.approx(0.25)
        assert cosine(reference * 1.25, reference) == pytest.approx(1)


def test_a_zero_reference_forgives_only_zero() -> None:
    """Relative to nothing every error is infinite."""
    zero = torch.zeros(5)
    assert relative_error(zero, zero) == 0
    assert relative_error(zero + 1e-30, zero) == math.inf
    assert cosine(zero, zero) == 1
    assert math.isnan(cosine(zero + 1, zero))


@pytest.mark.parametrize("fmt", ["fp32", "bf16", "fp16"])
def test_an_ulp_is_the_spacing_of_the_format(fmt: str) -> None:
    """Next to 1, just below a power of two, and in the subnormal range."""
    facts = FORMATS[fmt]
    at = torch.tensor([1.0, 1.999, facts.smallest_subnormal * 3], dtype=torch.float64)
    step = torch.tensor([facts.eps, facts.eps, facts.smallest_subnormal]).double()
    assert ulp_error(at + 2 * step, at, fmt) == pytest.approx(2)


def test_shares_count_elements_of_all_leaves() -> None:
    """Integers are not counted, whatever they are."""
    values = (torch.tensor([0.0, 1.0, math.nan]), torch.zeros(1), torch.zeros(9).int())
    assert share_zero(values) == 0.5
    assert share_nonfinite(values) == 0.25
    assert share_zero(()) == 0


def test_a_structure_that_differs_is_refused() -> None:
    """Comparing what does not correspond would be an invention."""
    with pytest.raises(TargetError, match="same structure"):
        relative_error((torch.ones(1),), torch.ones(1))
    with pytest.raises(TargetError, match=r"same shapes.*\(2,\) and \(1,\).*\[0\]"):
        relative_error((torch.ones(2),), (torch.ones(1),))


def test_tensors_are_found_with_their_paths() -> None:
    """Floating and complex ones, in order."""
    found = tensors_of(
        {"a": [torch.ones(1), 3], "b": torch.ones(1, dtype=torch.cfloat)}
    )
    assert [path for path, _ in found] == ["['a'][0]", "['b']"]


def test_the_worst_of_measures_is_taken_measure_by_measure() -> None:
    """The cosine is worst where it is lowest; what is not a number stays so."""
    reference = torch.tensor([1.0, 2.0])
    one = measure(torch.tensor([1.5, 2.0]), reference)
    other = measure(torch.tensor([-1.0, 2.0]), reference)
    both = worst_of([one, other])
    assert both is not None
    assert both.relative == other.relative
    assert both.cosine == other.cosine < one.cosine
    assert worst_of([]) is None
    broken = measure(torch.tensor([math.nan, 2.0]), reference)
    assert math.isnan(both.worst(broken).cosine)
    assert Measures(**broken.record()).relative == math.inf


def test_the_rule_is_k_times_the_floor_and_a_tolerance() -> None:
    """An error that is not a number is never allowed."""
    rule = NoiseRule(k=2, tolerance=0.25)
    assert rule.limit(0.5) == 1.25
    assert rule.holds(1.25, 0.5)
    assert not rule.holds(1.26, 0.5)
    assert not rule.holds(math.nan, math.inf)
    assert default_tolerance("bf16") == 16 * 2.0**-8
    assert default_tolerance("fp8_e5m2") == 0.25  # and not 2, which zeros would meet
    for wrong in ({"k": -1}, {"tolerance": math.nan}):
        with pytest.raises(BudgetError, match="finite number from 0 on"):
            NoiseRule(**wrong)


def test_drift_of_the_loss_is_relative() -> None:
    """A loss that is not finite has drifted infinitely, unless it should be so."""
    assert loss_drift(1.1, 1.0) == pytest.approx(0.1)
    assert loss_drift(-1.0, 1.0) == 2
    assert loss_drift(math.nan, 1.0) == math.inf
    assert loss_drift(0.0, 0.0) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 63, 1000])
def test_one_pass_measures_what_operators_measure(
    dtype: torch.dtype, size: int
) -> None:
    """Machine code on the CPU agrees with the operators that other devices use."""
    torch.manual_seed(size)
    wide = torch.randn(size, dtype=torch.float64) * 2.0 ** torch.randint(
        -30, 9, (size,)
    )
    wide[::7] = 0
    candidate, reference = (
        {"a": wide.to(dtype), "b": [wide[:1]]},
        {"a": wide, "b": [wide[:1] * 1.1]},
    )
    sums = error._sums(candidate, reference, "bf16")
    assert sums is not None
    compared = error._compared(candidate, reference)
    close = functools.partial(pytest.approx, rel=1e-12, abs=1e-300)
    assert sums.error == close(math.hypot(*(error._norm(e.error) for e in compared)))
    assert error._ratio(sums.error, sums.wanted) == close(error._relative(compared))
    assert error._ratio(sums.largest_error, sums.largest_wanted) == close(
        error._maximum(compared)
    )
    assert sums.ulps == close(error._ulps(compared, parse_format("bf16")))
    assert sums.cosine == close(error._cosine(compared))
    assert sums.zero == share_zero(candidate)
    assert sums.wanted_zero == share_zero(reference)


@pytest.mark.parametrize("odd", [math.inf, math.nan, 1e-200, 1e200])
def test_what_one_pass_cannot_sum_is_left_to_operators(odd: float) -> None:
    """Sums of squares that overflow or vanish, and what is not finite."""
    values = torch.ones(5, dtype=torch.float64)
    strange = values * odd
    assert error._sums(strange, values if odd != 1e-200 else strange * 2) is None
    assert error._sums(values * 1j, values * 1j) is None
    assert error._sums(torch.zeros(0), torch.zeros(0)) is None
    assert measure(strange, strange).relative == 0
