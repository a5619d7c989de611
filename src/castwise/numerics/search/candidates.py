"""Candidates: the precisions that a search may give to a module.

A candidate is named by its format, `bf16`, or written as a precision, `c=fp32,o=bf16`,
which computes in fp32 and hands out bf16. Two of them, `fp32/bf16`, are the forward and
a backward of its own: the module is run again in bf16 for its gradients. Weights are
held in fp32 throughout: how they are stored is the optimizer's matter. The first low
candidate of one format for both, or else the first one, is the policy's default; the
others become islands in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from castwise.errors import SettingsError
from castwise.formats import parse_format
from castwise.fp8_products import FP8
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

    backward: Precision | None = None
    """Of the backward, where it has a precision of its own."""

    @property
    def compute(self) -> str:
        """The format that operators of the forward run in."""
        assert self.precision.compute is not None
        return self.precision.compute

    @property
    def bits(self) -> int:
        """Bits of the format that the forward is computed in."""
        return _bits(self.compute)

    @property
    def compute_backward(self) -> str:
        """The format that operators of the backward run in."""
        found = self.precision if self.backward is None else self.backward
        assert found.compute is not None
        return found.compute

    @property
    def least_bits(self) -> int:
        """Bits of the narrower of the two stages."""
        return min(self.bits, _bits(self.compute_backward))

    @property
    def is_fp8(self) -> bool:
        """Whether products run in fp8 in a stage; other operators then run in bf16."""
        return bool({self.compute, self.compute_backward} & set(FP8))

    @property
    def work(self) -> float:
        """Work of a step, in forwards of 32 bits; a backward is two forwards.

        A backward of its own runs the module once more.
        """
        again = 0 if self.backward is None else 1
        return (self.bits + (2 + again) * _bits(self.compute_backward)) / 32

    @property
    def digits(self) -> tuple[int, int, int]:
        """Mantissa bits of the forward, of the backward, and of what is handed out."""
        formats = (
            self.compute,
            self.compute_backward,
            self.precision.output or self.compute,
        )
        one, two, three = (parse_format(each).mantissa_bits for each in formats)
        return one, two, three


def _bits(name: str) -> int:
    return parse_format(name).storage_bytes * 8


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
    found = tuple(map(_candidate, names))
    if all(each.backward is not None for each in found):
        raise SettingsError(
            "a search needs a format that serves forward and backward alike, for "
            f"modules that cannot be run again; got {', '.join(names)}; add fp32"
        )
    return found


def default_of(candidates: tuple[Candidate, ...]) -> Candidate:
    """The candidate that the policy's default becomes."""
    whole = [each for each in candidates if each.backward is None]
    low = [each for each in whole if each.compute in LOW]
    return (low or sorted(whole, key=lambda each: each.bits))[0]


def _candidate(name: str) -> Candidate:
    forward, slash, backward = (part.strip() for part in name.partition("/"))
    if not slash:
        return _of_both(name)
    one, other = _of_both(forward), _of_both(backward)
    if one.compute == other.compute:
        raise SettingsError(
            f"a backward of its own needs another format than the forward, got "
            f"{name!r}; write {forward!r}"
        )
    # what a backward hands out has the formats of its neighbours, not its own
    return Candidate(
        name=name,
        precision=one.precision,
        backward=replace(other.precision, param=None, output=one.precision.output),
    )


def _of_both(name: str) -> Candidate:
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
