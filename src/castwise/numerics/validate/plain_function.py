"""Validation of a plain function: a candidate against another algorithm in float64.

    report = validate_function(fast, slow, [(x, y)])
    report.check()

The reference is fed the same inputs in float64 or complex128, and the gradients that
both send back for one random upstream gradient are compared as well: a wrong sign, a
missing conjugate or a dropped term shows there and nowhere else. The noise floor is
that of the reference itself on the inputs as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from castwise.dtypes import format_of
from castwise.errors import TargetError
from castwise.formats import FORMATS
from castwise.numerics.census import FormatCount, observe
from castwise.numerics.error import DEFAULT_K, Measures, measure, tensors_of, worst_of
from castwise.numerics.operator_call import CAST
from castwise.numerics.replay import (
    SameDraws,
    as_leaves,
    first_line,
    line_of_user,
    runs_wide,
    seeded,
    wide_values,
)
from castwise.numerics.validate.validation import rule_for
from castwise.numerics.validate.verdicts import Judged, Validation

Function = Callable[..., Any]

_WIDEST = frozenset({"fp64", "complex128"})
_COMPLEX = {torch.complex32: "fp16", torch.complex64: "fp32", torch.complex128: "fp64"}


def validate_function(
    candidate: Function,
    reference: Function,
    inputs: Iterable[Sequence[Any]],
    *,
    gradient: bool = True,
    k: float = DEFAULT_K,
    tolerance: float | None = None,
    seeds: Sequence[int] = (0,),
) -> Validation:
    """Compare a function with another that should compute the same.

    Args:
        candidate: Called on inputs as they are given.
        reference: Called on the same in float64 or complex128.
        inputs: Tuples of arguments, one for each comparison.
        gradient: Whether gradients of floating arguments are compared.
        k: How many times the noise floor an error may be.
        tolerance: What is allowed on top. Default: 16 rounding errors of the format
            that the candidate returns.
        seeds: Of random draws, and of the upstream gradients.

    Raises:
        TargetError: One of them raises, or they return different structures.
    """
    given = [tuple(each) for each in inputs]
    if not given:
        raise TargetError("a validation needs inputs, such as [(x,)]")
    pairs = [
        _Pair.of(candidate, reference, arguments, seed, gradient=gradient)
        for seed in seeds
        for arguments in given
    ]
    fmt = max((each.format for each in pairs), key=lambda name: FORMATS[name].eps)
    rule, because = rule_for(fmt, k, tolerance)
    measured = [each.measured(fmt) for each in pairs]
    results = tuple(
        Judged(
            name=name,
            measures=_worst(each[name][0] for each in measured),
            floor=_worst(each[name][1] for each in measured),
            rule=rule,
        )
        for name in measured[0]
    )
    is_same = all(_same_computation(candidate, reference, each) for each in given)
    return Validation(
        candidate=_name(candidate),
        reference=f"{_name(reference)} in fp64",
        device=str(_device_of(given)),
        rule=rule,
        because=because,
        num_batches=len(given),
        seeds=tuple(seeds),
        results=results,
        loss_drift=None,
        loss_floor=0.0,
        scale=1.0,
        modules=(),
        operators=(),
        lifted=tuple(dict.fromkeys(text for each in pairs for text in each.lifted)),
        compared=not is_same and not all(each.is_exact for each in results),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """What one call returned, and the gradients that it sent back."""

    output: dict[str, torch.Tensor]
    gradients: tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair:
    """Candidate, baseline and reference on the same arguments and draws."""

    candidate: _Call
    baseline: _Call
    reference: _Call
    lifted: tuple[str, ...]

    @classmethod
    def of(
        cls,
        candidate: Function,
        reference: Function,
        arguments: tuple[Any, ...],
        seed: int,
        *,
        gradient: bool,
    ) -> Self:
        device = _device_of(arguments)

        def call(function: Function, given: tuple[Any, ...], what: str) -> _Call:
            try:
                with seeded(seed, device), SameDraws():
                    return _call(function, given, gradient=gradient)
            except RuntimeError as error:
                raise TargetError(
                    f"{what} {_name(function)} raised{line_of_user(error)}: "
                    f"{first_line(error)}"
                ) from error

        with seeded(seed, device), runs_wide("it", None, "fp64") as wide, SameDraws():
            wide_arguments = wide_values(arguments, "fp64")
            exact = _call(reference, wide_arguments, gradient=gradient)
        return cls(
            candidate=call(candidate, arguments, "the candidate"),
            baseline=call(reference, arguments, "the reference"),
            reference=exact,
            lifted=tuple(f"{e.where}: {e.call} names {e.format}" for e in wide.lifted),
        )

    @property
    def format(self) -> str:
        """The format with the fewest digits that the candidate returns."""
        found = (_format_of(each) for each in self.candidate.output.values())
        return max(found, key=lambda name: FORMATS[name].eps, default="fp64")

    def measured(self, fmt: str) -> dict[str, tuple[Measures, Measures]]:
        """Name of the result -> measures of candidate and baseline."""
        right, sides = self.reference, (self.candidate, self.baseline)
        first, second = (measure(each.output, right.output, fmt) for each in sides)
        found = {"output": (first, second)}
        if right.gradients:
            back = [each.gradients or _zeros(right.gradients) for each in sides]
            first, second = (measure(each, right.gradients, fmt) for each in back)
            found["input gradients"] = first, second
        return found


def _call(function: Function, arguments: tuple[Any, ...], *, gradient: bool) -> _Call:
    """Call a function, and send one random gradient back through it."""
    given, leaves = as_leaves(arguments)
    output = dict(tensors_of(function(*given)))
    gradients: tuple[torch.Tensor, ...] = ()
    sources = [each for each in output.values() if each.requires_grad]
    if gradient and sources:
        torch.manual_seed(torch.initial_seed() + 1)  # whatever was drawn before
        upstream = [torch.randn_like(each) for each in sources]
        found = torch.autograd.grad(sources, leaves, upstream, allow_unused=True)
        gradients = tuple(
            torch.zeros_like(leaf) if got is None else got
            for leaf, got in zip(leaves, found, strict=True)
        )
    return _Call(
        output={path: each.detach().clone() for path, each in output.items()},
        gradients=gradients,
    )


def _same_computation(
    candidate: Function, reference: Function, arguments: tuple[Any, ...]
) -> bool:
    """Whether both run the same operators, and the candidate runs them in float64."""
    found = []
    for function, given in (
        (candidate, arguments),
        (reference, wide_values(arguments, "fp64")),
    ):
        computed = _operators_of(function, given)
        if any(each.format not in _WIDEST for each in computed):
            return False
        counts: Counter[str] = Counter()
        for each in computed:
            counts[each.op] += each.num_calls
        found.append(counts)
    return bool(found[0]) and found[0] == found[1]


def _operators_of(function: Function, arguments: tuple[Any, ...]) -> list[FormatCount]:
    """What a function computes with, casts aside."""

    def run() -> None:
        function(*arguments)

    with torch.no_grad(), seeded(0, _device_of(arguments)):
        return [each for each in observe(run).counts if each.op != CAST]


def _worst(measures: Iterable[Measures]) -> Measures:
    worst = worst_of(measures)
    assert worst is not None, "there is at least one pair"
    return worst


def _zeros(gradients: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(map(torch.zeros_like, gradients))


def _device_of(values: Any) -> torch.device:
    return next((each.device for _, each in tensors_of(values)), torch.device("cpu"))


def _format_of(values: torch.Tensor) -> str:
    return _COMPLEX.get(values.dtype) or format_of(values.dtype)


def _name(function: Function) -> str:
    return getattr(function, "__name__", type(function).__name__)
