"""Gradients of which each process holds a part: what all must agree on before a step.

    finding = unscale(loss_scale, gradients)    # all processes skip, or none
    norm = clip(gradients, 1.0)                 # the norm of the whole gradients

Whole gradients are handled as in one process. DDP leaves the same ones everywhere, so
nothing more is sent. Of a sharded gradient each process sees its rows: one number goes
round for the finding, and one or two for the norm.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import distributed

from castwise.errors import SettingsError
from castwise.fitting import is_sharded
from castwise.loss_scale import LossScale, NonFinite
from castwise.optim.clipping import (
    clip_by_global_norm,
    global_norm,
    norm_over_processes,
    scale_down,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import nn


def unscale(
    loss_scale: LossScale, gradients: Mapping[str, torch.Tensor]
) -> NonFinite | None:
    """Divide gradients by the scale, and find one that is not finite anywhere."""
    local = {name: local_part(each) for name, each in gradients.items()}
    finding = loss_scale.unscale(local)
    if any(map(is_sharded, gradients.values())):
        finding = _agreed(finding, list(gradients))
    return finding


def clip(gradients: Iterable[torch.Tensor], max_norm: float | None) -> float:
    """Scale all gradients down together, in place; returns the norm before.

    Raises:
        SettingsError: `max_norm` is not above 0.
    """
    gradients = list(gradients)
    if all(type(each) is torch.Tensor for each in gradients):
        return clip_by_global_norm(gradients, max_norm)
    by_groups: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    for each in gradients:
        by_groups.setdefault(_groups_of(each), []).append(local_part(each))
    if not any(by_groups):
        return clip_by_global_norm(by_groups.get((), []), max_norm)
    if max_norm is not None and not max_norm > 0:
        raise SettingsError(f"a norm to clip at needs to be above 0; got {max_norm}")
    norms = []
    for groups, parts in by_groups.items():
        norm = global_norm(parts)
        for group in groups:
            norm = norm_over_processes(norm, group)
        norms.append(norm)
    whole = math.hypot(*norms)
    if max_norm is not None:
        scale_down(list(chain(*by_groups.values())), whole, max_norm)
    return whole


def share_step(model: nn.Module) -> None:
    """Note that a model's gradients are the same on all processes, as under DDP."""
    _SHARED.add(model)


def is_step_shared(model: nn.Module) -> bool:
    """Whether all processes step, or skip, together: under `replicate` and FSDP2."""
    if not distributed.is_available() or not distributed.is_initialized():
        return False
    if distributed.get_world_size() == 1:
        return False
    return model in _SHARED or any(map(is_sharded, model.parameters()))


_SHARED: WeakSet[nn.Module] = WeakSet()


def local_part(gradient: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, in the same memory; all of a whole one."""
    if not is_sharded(gradient):
        return gradient
    sharded: Any = gradient
    part: torch.Tensor = sharded.to_local()
    return part


def _groups_of(gradient: torch.Tensor) -> tuple[Any, ...]:
    """The groups of processes over which a gradient is cut into parts."""
    if not is_sharded(gradient):
        return ()
    sharded: Any = gradient
    mesh = sharded.device_mesh
    return tuple(
        mesh.get_group(axis)
        for axis, placement in enumerate(sharded.placements)
        if placement.is_shard()
    )


def _agreed(finding: NonFinite | None, names: Sequence[str]) -> NonFinite | None:
    """Let all processes take the first finding of any; NaN goes before inf.

    Parameter, kind and rank are one integer, so that one message tells all three.
    """
    size = distributed.get_world_size()
    nothing = code = 2 * len(names) * size
    if finding is not None:
        code = 2 * names.index(finding.parameter) + (finding.kind == "inf")
        code = code * size + distributed.get_rank()
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    first = torch.tensor(code, device=device)
    distributed.all_reduce(first, distributed.ReduceOp.MIN)
    if int(first) == nothing:
        return None
    code, rank = divmod(int(first), size)
    at, is_inf = divmod(code, 2)
    return NonFinite(parameter=names[at], kind="inf" if is_inf else "NaN", rank=rank)
