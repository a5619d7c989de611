"""Checks on what a model keeps beside its weights: angles, positions, constants.

A rotary table multiplies a frequency by a position, so an error of the frequency grows
with the position: 0.7 in bf16 is off by 0.002, and at position 4096 the angle is off by
more than a whole turn. A table of sines and cosines has no such problem.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from castwise.formats import FORMATS, Format
from castwise.islands.facts import join
from castwise.numerics.lint.findings import Finding
from castwise.numerics.lint.subject import Subject, low_format

ANGLE_LIMIT = 0.05
"""Radians: the rounding of a cosine to bf16 is a twelfth of it."""

FP16_MAX = FORMATS["fp16"].max

_FREQUENCIES = re.compile(
    r"(^|_)(inv_?freqs?|freqs?|frequenc(y|ies)|omegas?|thetas?|timescales?)(_|$)"
)
_POSITIONAL = re.compile(r"rot|rope|posit|sinus|fourier|alibi", re.IGNORECASE)
_MASKING = re.compile(r"mask|neg|inf|fill|minus", re.IGNORECASE)


def rounded_frequencies(subject: Subject) -> Iterator[Finding]:
    """Find rotary frequencies that are held in 16 bits."""
    for place, module, before, now in subject.tables():
        fmt = low_format(now)
        if fmt is None or not holds_frequencies(place, type(module).__name__, before):
            continue
        capacity = subject.capacity(module)
        error = _frequency_error(before, now, fmt) * capacity
        if error >= ANGLE_LIMIT:
            yield Finding(
                check="rounded-angle",
                place=place,
                where=f"buffer {place}",
                why=f"frequencies held in {fmt} give wrong angles at far positions",
                figure=f"up to {error:.3g} rad at position {capacity}",
                remedy="hold the buffer in fp32: drop the rule that names it, and call "
                "no .to() or .half() on the model",
            )


def holds_frequencies(place: str, owner: str, value: torch.Tensor) -> bool:
    """Whether a tensor looks like the frequencies of a rotary or sinusoidal table."""
    name = place.rpartition(".")[2]
    if value.numel() < 2 or value.dim() > 2:
        return False
    if _FREQUENCIES.search(name):
        return True
    return bool(_POSITIONAL.search(f"{owner}.{place}")) and _is_geometric(value)


def _is_geometric(value: torch.Tensor) -> bool:
    flat = value.detach().double().flatten()
    if flat.numel() < 4 or not bool((flat > 0).all()):
        return False
    steps = flat.log().diff()
    spread = float((steps - steps.mean()).abs().max())
    return float(steps.mean().abs()) > 1e-3 and spread < 1e-2


def _frequency_error(before: torch.Tensor, now: torch.Tensor, fmt: Format) -> float:
    """What rounding did to a frequency; the most it can have done if none can tell."""
    if low_format(before) is None:
        return float((before.double() - now.double()).abs().max())
    mantissa, exponent = torch.frexp(now.detach().double())
    inexact = mantissa.abs() != 0.5  # powers of two were surely exact
    halves = torch.ldexp(inexact.double(), exponent - 2 - fmt.mantissa_bits)
    return float(halves.max())


def integer_tables(subject: Subject) -> Iterator[Finding]:
    """Find tables of positions that are held in 16 bits."""
    for place, _, before, now in subject.tables():
        fmt = low_format(now)
        if fmt is not None:
            found = lost_integers(before, fmt)
            if found is not None:
                yield position_finding(place, f"buffer {place}", found, fmt)


def lost_integers(values: torch.Tensor, fmt: Format) -> float | None:
    """The largest of consecutive integers that a format cannot tell apart, or none."""
    flat = values.detach().flatten()
    if flat.numel() < 3:
        return None
    wide = flat.double()
    largest = float(wide.abs().max())
    if not 2.0 ** (fmt.mantissa_bits + 1) < largest < 2.0**24:
        return None
    if values.is_floating_point():
        row = values.detach().double().reshape(-1, values.shape[-1])[0]
        steps = row.diff()
        is_range = steps.numel() > 1 and bool((steps == steps[0]).all())
        if not is_range or float(steps[0]) == 0 or bool((wide != wide.round()).any()):
            return None
    return largest


def position_finding(place: str, where: str, largest: float, fmt: Format) -> Finding:
    """Say that integers beyond the format's digits collide."""
    last = 2 ** (fmt.mantissa_bits + 1)
    return Finding(
        check="integer-position",
        place=place,
        where=where,
        why=f"integers above {last} share one number in {fmt}",
        figure=f"integers up to {largest:.0f}",
        remedy="keep positions as integers or in fp32 until they are small: make the "
        "module an island in fp32",
    )


def constant_tables(subject: Subject) -> Iterator[Finding]:
    """Find mask constants that modules keep and that fp16 cannot hold."""
    for fqn, module, _ in subject.modules():
        if subject.compute_of(fqn) != "fp16":
            continue
        for name, value in vars(module).items():
            if (
                isinstance(value, float)
                and FP16_MAX < abs(value) < float("inf")
                and (value < 0 or _MASKING.search(name))
            ):
                yield constant_finding(fqn, f"attribute {join(fqn, name)}", value)
    for place, _, before, _ in subject.tables():
        owner = place.rpartition(".")[0]
        if subject.compute_of(owner) == "fp16":
            wide = before.detach().double()
            beyond = wide[(wide.abs() > FP16_MAX) & wide.isfinite()]
            if beyond.numel():
                yield constant_finding(place, f"buffer {place}", float(beyond[0]))


def constant_finding(place: str, where: str, value: float) -> Finding:
    """Say that a constant is infinite in fp16."""
    return Finding(
        check="overflowing-constant",
        place=place,
        where=where,
        why=f"a constant is beyond {FP16_MAX:.0f}, the largest number of fp16",
        figure=f"{value:.6g} becomes {'-' if value < 0 else ''}inf, or raises",
        remedy="write torch.finfo(x.dtype).min, or -inf where a row is never masked "
        "as a whole",
    )
