"""Unscale, check and clip gradients by their global norm, reading them twice at most.

    norm = unscale_and_clip(gradients, scale=scaler_scale, max_norm=1.0)
    if math.isfinite(norm):
        optimizer.step()

`torch.amp` divides and checks, `clip_grad_norm_` sums and multiplies: gradients are
read three times and written twice. Here they are read for the norm, which is not finite
exactly where a gradient is not, and multiplied once by both factors together; where
nothing is to be changed, they are not written at all:

    norm = |g| / scale          g *= min(1, max_norm / norm) / scale

Machine code for fp32 and bf16 on a CPU (`machine_checks`, `gradient_kernel`), fused
operators of torch elsewhere. Gradients in bf16 are rounded once instead of twice.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from castwise.errors import SettingsError
from castwise.optim import machine_rows as rows
from castwise.optim.clipping import global_norm

if TYPE_CHECKING:
    from collections.abc import Sequence

_ROUNDING_ROOM = 1e-6  # as in torch.nn.utils.clip_grad_norm_
_FORMATS = {torch.float32: rows.FP32, torch.bfloat16: rows.BF16}
_GRAIN = 1 << 15  # numbers below which torch itself uses one thread


@torch.no_grad()
def unscale_and_clip(
    gradients: Sequence[torch.Tensor],
    *,
    scale: float = 1.0,
    max_norm: float | None = None,
) -> float:
    """Divide gradients by a loss scale and clip them to a global norm, in place.

    Args:
        gradients: Real tensors of any format, on any devices.
        scale: What the loss was multiplied by. Default: 1.
        max_norm: Largest norm that is left as it is. Default: nothing is clipped.

    Returns:
        The norm of the unscaled gradients before clipping. Where it is not finite,
        some gradient is not, and none is changed.

    Raises:
        SettingsError: `scale` or `max_norm` is not above 0.
    """
    for name, value in (("scale", scale), ("max_norm", max_norm)):
        if value is not None and not value > 0:
            raise SettingsError(
                f"unscaling and clipping need {name} above 0; got {value}"
            )
    values = [each.detach() for each in gradients if each.numel()]
    table = _table(values)
    if table is None:
        norm = global_norm(values) / scale
    else:
        from castwise.optim import gradient_kernel, machine_checks  # noqa: PLC0415 -- numba is imported by those who need it

        sums = np.empty(len(table))
        machine_checks.square_sums(table, np.float32(1 / scale), sums)
        norm = math.sqrt(sums.sum())
    if not math.isfinite(norm):
        return norm
    clip = 1.0 if max_norm is None else min(1.0, max_norm / (norm + _ROUNDING_ROOM))
    factor = clip / scale
    if factor == 1.0:
        return norm
    if table is None:
        for each in values:
            each.mul_(factor)
    else:
        gradient_kernel.scale(table, np.float32(factor))
        for each in values:
            torch.autograd.graph.increment_version(each)
    return norm


def _table(values: list[torch.Tensor]) -> Any:
    """Rows of addresses for machine code; none where operators have to do it."""
    threads = torch.get_num_threads() > 1
    for each in values:
        if (
            each.device.type != "cpu"
            or type(each) is not torch.Tensor
            or each.dtype not in _FORMATS
            or not each.is_contiguous()
            or (threads and each.numel() > _GRAIN)
        ):
            return None
    if not values:
        return None
    table = np.zeros((len(values), rows.NUM_COLUMNS), np.int64)
    table[:, rows.COUNT] = [each.numel() for each in values]
    table[:, rows.GRADIENT] = [each.data_ptr() for each in values]
    table[:, rows.GRADIENT_FORMAT] = [_FORMATS[each.dtype] for each in values]
    return table
