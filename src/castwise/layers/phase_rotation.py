"""The pointwise half of the propagator: a phase by intensity, the norm kept.

    I = |psi|^2 / mean |psi|^2            intensity, 1 on average over a token
    phi = pi (1 - 2 exp(-sharpness I))    uniform in (-pi, pi) for exponential I
    psi <- s psi exp(i phi) / damping,    damping = min(1 + |envelope| I^2, 10)

s restores the norm of the token exactly: s^2 = sum |psi|^2 / sum |psi / damping|^2, at
most 100. The backward is written by hand and keeps only the input: 30 pointwise
operations in place of some 60 recorded ones.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

MAX_DAMPING = 10.0


def rotate(
    planes: Tensor, envelope: Tensor, *, sharpness: float = 1.0, floor: float = 1e-6
) -> Tensor:
    """Rotate `[2, ..., D]` (real and imaginary plane), in the dtype of the planes.

    Args:
        planes: `[2, ..., D]`, fp32 or fp64.
        envelope: `[D]`, strength of the damping.
        sharpness: rate at which the phase turns with intensity.
        floor: least mean intensity that a token is normalised by.
    """
    turned = _Rotate.apply(planes, envelope.to(planes.dtype), sharpness, floor)  # type: ignore[no-untyped-call]
    return cast("Tensor", turned)


def _parts(
    planes: Tensor, envelope: Tensor, sharpness: float, floor: float
) -> tuple[Tensor, ...]:
    """Compute what forward and backward share."""
    power = planes.square().sum(0)
    mean = power.mean(-1, keepdim=True)
    intensity = power / mean.clamp_min(floor)
    decay = torch.exp(-sharpness * intensity)
    square = intensity.square()
    damping = torch.addcmul(torch.ones_like(square), envelope.abs(), square)
    damping.clamp_max_(MAX_DAMPING)
    damped = power / damping.square()
    norm_in = power.sum(-1, keepdim=True)
    norm_out = damped.sum(-1, keepdim=True)
    safe = torch.where(norm_out > 0, norm_out, 1.0)
    stretch = torch.where(norm_out > 0, norm_in / safe, 1.0).sqrt_()
    factor = stretch / damping
    phase = math.pi * (1 - 2 * decay)
    return (
        mean,
        intensity,
        decay,
        damping,
        damped,
        norm_in,
        safe,
        torch.cos(phase) * factor,
        torch.sin(phase) * factor,
    )


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, planes: Tensor, envelope: Tensor, sharpness: float, floor: float
    ) -> Tensor:
        ctx.sharpness, ctx.floor = sharpness, floor
        ctx.save_for_backward(planes, envelope)
        *_, cosine, sine = _parts(planes, envelope, sharpness, floor)
        re, im = planes
        out = torch.empty_like(planes)
        torch.addcmul(re * cosine, im, sine, value=-1, out=out[0])
        torch.addcmul(re * sine, im, cosine, out=out[1])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        planes, envelope = ctx.saved_tensors
        mean, intensity, decay, damping, damped, norm_in, norm_out, c, s = _parts(
            planes, envelope, ctx.sharpness, ctx.floor
        )
        (re, im), (g, h) = planes, grad
        # the gradient turned back: m exp(-i phi) g
        out = torch.stack((c * g + s * h, c * h - s * g))
        radial = out[0] * re + out[1] * im  # dL/dlog(factor)
        by_phase = out[1] * re - out[0] * im
        total = radial.sum(-1, keepdim=True)  # dL/dlog(stretch)
        by_damping = (total * damped / norm_out - radial) / damping
        by_damping = torch.where(damping < MAX_DAMPING, by_damping, 0.0)
        by_intensity = (2 * math.pi * ctx.sharpness) * decay * by_phase
        by_intensity.addcmul_(by_damping * (2 * envelope.abs()), intensity)
        # intensity = power / max(mean, floor)
        divisor = mean.clamp_min(ctx.floor)
        through_mean = (by_intensity * intensity).mean(-1, keepdim=True)
        through_mean = torch.where(mean > ctx.floor, through_mean, 0.0)
        by_power = (by_intensity - through_mean) / divisor
        tiny = torch.finfo(planes.dtype).tiny
        by_power = by_power + 0.5 * total * (
            1 / norm_in.clamp_min(tiny) - 1 / (damping.square() * norm_out)
        )
        by_power = torch.where(norm_in > 0, by_power, 0.0)
        out += 2 * by_power * planes
        by_envelope = None
        if ctx.needs_input_grad[1]:
            by_envelope = (by_damping * intensity.square()).flatten(0, -2).sum(0)
            by_envelope = by_envelope * envelope.sign()
        return out, by_envelope, None, None
