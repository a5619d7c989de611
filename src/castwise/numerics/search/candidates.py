"""Candidates: the precisions that a search may give to a module.

A candidate is named by its format, `bf16`, or written as a precision, `c=fp32,o=bf16`,
which computes in fp32 and hands out bf16. Weights are held in fp32 throughout: how they
are stored is the optimizer's matter. The first low candidate, or else the first one, is
the policy's default; the others become islands in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from castwise.errors import SettingsError
from castwise.formats import parse_format
from castwise.islands.border import LOW
from castwise.policy.precision import Precision

# what surrounds it seldom takes fp64, and no tensor is held in tf32 or handed on in fp8
_HANDED_OUT = {"fp64": "fp32", "tf32": "fp32", "fp8_e4m3": "bf16", "fp8_e5m2": "bf16"}

_HELD = Precision(param="fp32", reduce="fp32")


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One precision that a module may get."""

    name: str
    """As the user wrote it."""

    precision: Precision
    """All four formats."""

    @property
    def compute(self) -> str:
        """The format that operators run in."""
        assert self.precision.compute is not None
        return self.precision.compute

    @property
    def bits(self) -> int:
        """Bits of the format that is computed in."""
        return parse_format(self.compute).storage_bytes * 8

    @property
    def digits(self) -> tuple[int, int]:
        """Mantissa bits that it computes with, and that it hands out."""
        output = self.precision.output or self.compute
        return (
            parse_format(self.compute).mantissa_bits,
            parse_format(output).mantissa_bits,
        )


def parse_candidates(formats: Iterable[str]) -> tuple[Candidate, ...]:
    """Read the formats that a search may use, each once, in the user's order.

    Raises:
        SettingsError: None is given, one is given twice, or weights are mentioned.
        FormatError: A format is unknown.
    """
    names = [text.strip() for text in formats]
    if not names or len(set(names)) != len(names):
        raise SettingsError(
            f"a search needs formats, each once, such as bf16 and fp32; got {names}"
        )
    return tuple(map(_candidate, names))


def default_of(candidates: tuple[Candidate, ...]) -> Candidate:
    """The candidate that the policy's default becomes."""
    low = [each for each in candidates if each.compute in LOW]
    return (low or sorted(candidates, key=lambda each: each.bits))[0]


def _candidate(name: str) -> Candidate:
    asked = Precision.parse(name) if "=" in name else None
    compute = asked.compute if asked else parse_format(name).name
    if compute is None or (asked and (asked.param or asked.reduce)):
        raise SettingsError(
            f"a candidate says what a module computes in and hands out, such as bf16 "
            f"or c=fp32,o=bf16; got {name!r}"
        )
    output = (asked.output if asked else None) or _HANDED_OUT.get(compute, compute)
    precision = Precision(compute=compute, output=output).over(_HELD)
    return Candidate(name=name, precision=precision)
