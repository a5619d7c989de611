"""The global norm of gradients, in fp32 whatever they are held in, and clipping by it.

    norm = sqrt(sum over all gradients g of |g|^2)        g *= min(1, max_norm / norm)

Each gradient is summed in fp32 (fp64 in fp64), so bf16 gradients lose nothing more, and
fp16 gradients do not overflow. Where the squares overflow fp32 although every gradient
is finite, the sum is taken again in fp64. A norm that is not finite is not clipped by:
dividing by it would turn every gradient into 0 or NaN.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from castwise.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

_ROUNDING_ROOM = 1e-6  # as in torch.nn.utils.clip_grad_norm_, to the last bit


def global_norm(gradients: Sequence[torch.Tensor]) -> float:
    """Return the 2-norm of all gradients together; 0 where there are none."""
    values = [_real_values(gradient) for gradient in gradients]
    norm = _norm_of_norms(_norms(values))
    if math.isinf(norm):
        norm = _norm_of_norms([each.double().norm() for each in values])
    return norm


def clip_by_global_norm(
    gradients: Sequence[torch.Tensor], max_norm: float | None
) -> float:
    """Scale all gradients down together, in place, to a global norm of `max_norm`.

    Returns:
        The norm before clipping. With `max_norm=None` nothing is clipped, and a norm
        that is not finite leaves the gradients as they are.

    Raises:
        SettingsError: `max_norm` is not above 0.
    """
    if max_norm is not None and not max_norm > 0:
        raise SettingsError(f"a norm to clip at needs to be above 0; got {max_norm}")
    norm = global_norm(gradients)
    if max_norm is None or not math.isfinite(norm):
        return norm
    factor = max_norm / (norm + _ROUNDING_ROOM)
    if factor < 1:
        for group in _by_kind([_stored_values(each) for each in gradients]):
            torch._foreach_mul_(group, factor)
    return norm


def _norms(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The norm of each tensor, at least in fp32."""
    found: list[torch.Tensor] = []
    for group in _by_kind(values):
        wide = torch.promote_types(group[0].dtype, torch.float32)
        found.extend(torch._foreach_norm(group, 2, dtype=wide))  # noqa: SLF001 -- the only fused norm
    return found


def _norm_of_norms(norms: Sequence[torch.Tensor]) -> float:
    """Combine norms; the host reads one number from each device."""
    by_device: dict[torch.device, list[torch.Tensor]] = defaultdict(list)
    for norm in norms:
        by_device[norm.device].append(norm)
    totals = []
    for each in by_device.values():
        widest = max((norm.dtype for norm in each), key=lambda dtype: dtype.itemsize)
        stacked = torch.stack([norm.to(widest) for norm in each])
        totals.append(torch.linalg.vector_norm(stacked).item())
    return math.hypot(*totals)


def _by_kind(values: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Group tensors that one fused operator can take; empty ones take no part."""
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]]
    groups = defaultdict(list)
    for value in values:
        if value.numel():
            groups[value.device, value.dtype].append(value)
    return list(groups.values())


def _real_values(gradient: torch.Tensor) -> torch.Tensor:
    """The numbers that a gradient adds up to; a sparse one may hold them in parts."""
    gradient = gradient.detach()
    return _stored_values(gradient.coalesce() if gradient.is_sparse else gradient)


def _stored_values(gradient: torch.Tensor) -> torch.Tensor:
    """A view of the numbers in memory, to change them in place."""
    gradient = gradient.detach()
    if gradient.is_sparse:
        gradient = gradient._values()  # noqa: SLF001 -- the only view of them
    if gradient.is_complex():
        return torch.view_as_real(gradient.conj() if gradient.is_conj() else gradient)
    return gradient
