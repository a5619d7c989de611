"""The precision that was asked for, beside the one that is in force.

A device may be unable to do what a policy asks for. That is an error with a remedy,
unless the caller allowed a fallback; then the formats that were exchanged are recorded.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch

from castwise.decision import Decision
from castwise.dtypes import format_of, supports
from castwise.errors import FormatError, UnsupportedFormatError
from castwise.formats import parse_format

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from castwise.policy.precision import Precision
    from castwise.policy.rules import Policy

_USED = ("param", "compute", "output")  # reduce needs no product on the device


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionInForce:
    """What was asked for and what runs; goes into logs, checkpoints and reports."""

    asked: Policy
    """The policy that was given."""

    effective: Policy
    """The policy that is in force; another one only where a fallback was allowed."""

    fallbacks: tuple[Decision[str], ...]
    """The formats in force instead of ones that the device cannot do, and why."""

    device: str
    """Where it runs."""

    phase: str
    """The phase in force."""

    compute: str
    """What modules compute in outside of islands."""

    islands: str
    """One line on the modules that compute otherwise."""

    parameters: Mapping[str, int]
    """Format -> how many numbers of the model's weights are held in it."""

    loss_scale: Decision[str]
    """The kind of loss scale, and why."""

    def summary(self) -> str:
        """One line for a log."""
        held = ", ".join(f"{n:,} in {fmt}" for fmt, n in self.parameters.items())
        lines = [
            f"{self.effective.name}: compute in {self.compute} on {self.device}",
            f"weights {held}",
            self.islands,
            f"loss scale {self.loss_scale}",
        ]
        lines.extend(f"fallback: {decision}" for decision in self.fallbacks)
        return "; ".join(lines)


def fit_to_device(
    policy: Policy, device: torch.device, fallback: str | None
) -> tuple[Policy, tuple[Decision[str], ...]]:
    """Return the policy that the device can do, and what was exchanged for it.

    Raises:
        UnsupportedFormatError: It cannot do a format and no fallback was allowed, or it
            cannot do the fallback either.
    """
    refused = {}
    for name in sorted(_formats_of(policy)):
        answer = supports(device, name)
        if not answer.value:
            refused[name] = answer.because
    if not refused:
        return policy, ()
    first = next(iter(refused))
    if fallback is None:
        raise UnsupportedFormatError(
            f"the policy {policy.name!r} needs {first} on {device}: {refused[first]}; "
            "choose another format, or allow one with fallback="
        )
    fallback = parse_format(fallback).name
    answer = supports(device, fallback)
    if not answer.value:
        raise UnsupportedFormatError(
            f"the fallback {fallback} cannot be used on {device}: {answer.because}; "
            "choose another one"
        )
    decisions = tuple(
        Decision(fallback, f"instead of {name}: {because}")
        for name, because in refused.items()
    )
    exchange = dict.fromkeys(refused, fallback)
    fitted = replace(
        policy,
        default=_exchanged(policy.default, exchange),
        rules=tuple(
            replace(rule, precision=_exchanged(rule.precision, exchange))
            for rule in policy.rules
        ),
    )
    return fitted, decisions


def held_formats(model: nn.Module) -> dict[str, int]:
    """Count the model's weights by the format that they are held in."""
    held: Counter[str] = Counter()
    for weight in model.parameters():
        held[_name_of(weight.dtype)] += weight.numel()
    return dict(held)


def _name_of(dtype: torch.dtype) -> str:
    try:
        return format_of(dtype)
    except FormatError:  # complex and integer weights have no row in the table
        return str(dtype).removeprefix("torch.")


def _formats_of(policy: Policy) -> set[str]:
    asked = (policy.default, *(rule.precision for rule in policy.rules))
    return {name for precision in asked for name in _named(precision)}


def _named(precision: Precision) -> Iterator[str]:
    for field in _USED:
        name = getattr(precision, field)
        if name is not None:
            yield name


def _exchanged(precision: Precision, exchange: Mapping[str, str]) -> Precision:
    changed = {
        field.name: exchange[getattr(precision, field.name)]
        for field in fields(precision)
        if getattr(precision, field.name) in exchange
    }
    return replace(precision, **changed)
