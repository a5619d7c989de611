"""A checkpoint laid out for a run: each rank takes its part of what was saved.

What was saved by one process, by DDP, or by another number of ranks comes as whole
tensors, or cut as this run cuts them but on the CPU. Here each becomes the tensor that
the run holds in its place. Every value stays as it is: nothing is cast or added up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from castwise.fitting import is_sharded


def laid_out(
    tree: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Return the tree of a checkpoint with every tensor cut as a sharded run holds it.

    Args:
        tree: What a trainer wrote.
        model: The sharded model.
        optimizer: Of its parameters.
    """
    held: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    stored = tree["optimizer"]
    places = [p for group in stored["param_groups"] for p in group["params"]]
    owners = dict(zip(places, weights, strict=False))  # torch itself refuses a misfit
    states = {
        place: _cut(state, owners.get(place))
        for place, state in stored["state"].items()
    }
    averages = dict(tree["averages"])
    for name, found in averages.items():
        averages[name] = _by_name(found, held)
    return {
        **tree,
        "model": _by_name(tree["model"], held),
        "optimizer": {**stored, "state": states},
        "averages": averages,
    }


def _by_name(found: Any, held: Mapping[str, Any]) -> Any:
    """Cut weights by their names, in the dicts and lists of an average too."""
    if isinstance(found, list):
        return [_by_name(each, held) for each in found]
    if not isinstance(found, Mapping):
        return found
    return {name: _cut(value, held.get(name)) for name, value in found.items()}


def _cut(value: Any, owner: Any) -> Any:
    """Cut what belongs to a weight as the weight is cut, along the first dim."""
    if isinstance(value, Mapping):
        return {key: _cut(each, owner) for key, each in value.items()}
    if not isinstance(value, torch.Tensor) or owner is None or not is_sharded(owner):
        return value
    if not value.ndim:  # a count of steps, a fingerprint: of the whole weight
        return value
    from torch.distributed.tensor import DTensor, Shard  # noqa: PLC0415 -- only a sharded run needs it

    mesh = owner.device_mesh
    same = value.shape == owner.shape
    placements = [
        Shard(p.dim if same else 0) if p.is_shard() else p for p in owner.placements
    ]
    local = value.to_local() if isinstance(value, DTensor) else value
    if not isinstance(value, DTensor):
        for axis, placement in enumerate(placements):
            if isinstance(placement, Shard):
                parts = local.chunk(mesh.size(axis), placement.dim)
                at = mesh.get_local_rank(axis)
                none = local.narrow(placement.dim, 0, 0)
                local = parts[at] if at < len(parts) else none
    return DTensor.from_local(
        local.contiguous().to(owner.device),
        mesh,
        placements,
        run_check=False,
        shape=value.shape,
        stride=torch.empty(value.shape, device="meta").stride(),
    )
