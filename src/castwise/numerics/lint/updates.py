"""Checks on what an optimizer can do to weights in the format that they are held in.

A number w in [2^e, 2^(e+1)) of a format with m mantissa bits has neighbours 2^(e-m)
away, and a change below half of that rounds to nothing:

    bf16, m = 7, w = 1.0      up 2^-7, down 2^-8: a change below 2^-9 = 0.00195 is lost

so a norm weight that starts at 1 in bf16 does not move at a learning rate of 1e-3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from castwise.errors import FormatError
from castwise.formats import FORMATS, Format
from castwise.islands.facts import join
from castwise.numerics.lint.findings import Finding
from castwise.numerics.lint.subject import Subject, format_name

MOST = 0.5
"""A finding needs this share of a parameter's numbers to be lost."""

_SAMPLE = 65536
_SIGNED = ("adam", "lion", "lamb", "adafactor", "adabelief", "signsgd")
_DECOUPLED = ("AdamW", "Lion", "AdamW8bit", "AdamW4bit", "AdamWFp8", "SGDW")
_HOLD = (
    "write storage: split in the policy, hold the weights with "
    "cw.hold_weights(optimizer), or in fp32 (p=fp32)"
)


def lost_updates(subject: Subject) -> Iterator[Finding]:
    """Find parameters that the learning rate cannot move."""
    for name, weight, group in _plain_weights(subject):
        rate = _rate(group)
        sample = _sample(weight)
        size = _update_size(subject, name, weight, rate, group)
        if size is None or rate == 0:
            continue
        fmt = FORMATS[format_name(weight)]
        lost = _lost_share(sample, size, fmt)
        if lost >= MOST:
            typical = float(sample.abs().median())
            yield Finding(
                check="lost-update",
                place=name,
                where=f"parameter {name} ({fmt})",
                why="most updates are below half an ulp of the weight and round away",
                figure=f"{100 * lost:.0f} % of the numbers do not move at learning "
                f"rate {rate:g}; half an ulp of {typical:.3g} is "
                f"{float(half_ulp(torch.tensor(typical), fmt)):.2g}",
                remedy=_HOLD,
            )


def lost_decay(subject: Subject) -> Iterator[Finding]:
    """Find parameters whose weight decay rounds away."""
    for name, weight, group in _plain_weights(subject):
        decay = float(group.get("weight_decay") or 0.0)
        rate = _rate(group)
        if decay == 0 or rate == 0 or not _is_decoupled(subject.optimizer, group):
            continue
        fmt = FORMATS[format_name(weight)]
        sample = _sample(weight)
        lost = _lost_share(sample, rate * decay * sample.abs(), fmt)
        if lost >= MOST:
            yield Finding(
                check="lost-decay",
                place=name,
                where=f"parameter {name} ({fmt})",
                why="weight decay changes most weights by less than half an ulp",
                figure=f"{rate * decay:.2g} of the weight per step, where {fmt} needs "
                f"{fmt.eps / 4:.2g}; {100 * lost:.0f} % of the numbers do not decay",
                remedy=_HOLD,
            )


def vanishing_optimizer_eps(subject: Subject) -> Iterator[Finding]:
    """Find an optimizer's eps that is zero in the format of its states."""
    for name, weight, group in _plain_weights(subject):
        eps = group.get("eps")
        fmt = FORMATS[format_name(weight)]
        if isinstance(eps, float) and vanishes(eps, fmt):
            yield eps_finding(
                name,
                f"optimizer, parameter {name} ({fmt})",
                eps,
                fmt,
                "the divisor is zero where a gradient vanishes",
            )


def vanishing_module_eps(subject: Subject) -> Iterator[Finding]:
    """Find an eps of a hand-written norm that is zero in the module's format.

    Norms of PyTorch add their eps inside of a kernel that computes in fp32.
    """
    for fqn, module, cls in subject.modules():
        compute = subject.compute_of(fqn)
        if cls.__module__.startswith("torch.") or compute == "tf32":
            continue
        for name, value in vars(module).items():
            fmt = FORMATS[compute]
            if (
                isinstance(value, float)
                and "eps" in name.lower()
                and vanishes(value, fmt)
            ):
                yield eps_finding(
                    fqn,
                    f"attribute {join(fqn, name)}",
                    value,
                    fmt,
                    "nothing keeps the divisor from zero",
                )


def vanishes(eps: float, fmt: Format) -> bool:
    """Whether a positive number rounds to zero in a format."""
    return 0 < eps <= fmt.smallest_subnormal / 2


def eps_finding(place: str, where: str, eps: float, fmt: Format, why: str) -> Finding:
    """Say that an eps is zero in a format."""
    return Finding(
        check="vanishing-eps",
        place=place,
        where=where,
        why=f"eps rounds to zero in {fmt}, so {why}",
        figure=f"{eps:g}, and the smallest number is {fmt.smallest_subnormal:.2g}",
        remedy=f"raise eps to {fmt.smallest_normal:.1g} or more, or compute it in fp32",
    )


def half_ulp(weights: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Half the distance to the nearer neighbour: below a power of two it is closer."""
    mantissa, exponent = torch.frexp(weights.detach().double())
    at_power = (mantissa.abs() == 0.5).int()
    exponent = torch.where(mantissa == 0, fmt.min_exponent, exponent - 1 - at_power)
    exponent = exponent.clamp(min=fmt.min_exponent)
    return torch.ldexp(torch.ones_like(mantissa), exponent - fmt.mantissa_bits - 1)


def _plain_weights(
    subject: Subject,
) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
    """Parameters whose format is all that keeps an update."""
    if subject.is_held:
        return
    for name, weight, group in subject.weights():
        try:
            known = FORMATS.get(format_name(weight)) is not None
        except FormatError:
            known = False
        is_live = weight.numel() and weight.requires_grad
        if known and is_live and not subject.is_kept(name):
            yield name, weight, group


def _lost_share(
    weights: torch.Tensor, size: float | torch.Tensor, fmt: Format
) -> float:
    """Share of the numbers, of those that would change, that do not."""
    change = torch.as_tensor(size, dtype=torch.float64).expand(weights.shape)
    moves = change > 0
    lost = moves & (change < half_ulp(weights, fmt))
    return float(lost.sum()) / max(1, int(moves.sum()))


def _update_size(
    subject: Subject,
    name: str,
    weight: torch.Tensor,
    rate: float,
    group: dict[str, Any],
) -> float | torch.Tensor | None:
    """How much one step changes each number; none where nobody can tell."""
    kind = type(subject.optimizer).__name__.lower()
    if any(word in kind for word in _SIGNED):
        return rate
    gradient = subject.gradients.get(name)
    if gradient is None or not kind.startswith("sgd"):
        return None
    momentum = float(group.get("momentum") or 0.0)
    gain = (1 - float(group.get("dampening") or 0.0)) / (1 - momentum)
    return _sample(gradient, weight.numel()).abs() * rate * (gain if momentum else 1)


def _rate(group: dict[str, Any]) -> float:
    """The largest rate that a group is known to get: a warmup begins with zero."""
    return max(float(group["lr"]), float(group.get("initial_lr", 0.0)))


def _is_decoupled(
    optimizer: torch.optim.Optimizer | None, group: dict[str, Any]
) -> bool:
    decided = group.get("decoupled_weight_decay")
    return type(optimizer).__name__ in _DECOUPLED if decided is None else bool(decided)


def _sample(tensor: torch.Tensor, num_elements: int | None = None) -> torch.Tensor:
    """At most 65,536 numbers, the same of a weight and its gradient, in fp64."""
    flat = tensor.detach().flatten()
    total = num_elements or flat.numel()
    if total > _SAMPLE:
        chosen = torch.Generator().manual_seed(total)
        flat = flat[torch.randint(total, (_SAMPLE,), generator=chosen)]
    return flat.double()
