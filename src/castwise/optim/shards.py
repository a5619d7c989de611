"""Parameters that are sharded over processes (FSDP2's `DTensor`): their own part of it.

A sharded parameter is one logical tensor of which every process holds some rows. What
is computed number by number happens to the local part alone; what looks at the whole,
such as a norm, is summed over the mesh. This room is all that knows of it, and imports
`torch.distributed` only when a sharded parameter is at hand.
"""

from __future__ import annotations

from typing import Any

import torch

from castwise.errors import WeightStorageError


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a `DTensor`, without importing what it is."""
    return hasattr(tensor, "device_mesh")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds; all of a plain one."""
    if not is_sharded(tensor):
        return tensor
    part: torch.Tensor = tensor._local_tensor  # type: ignore[attr-defined]  # noqa: SLF001 -- to_local() is a view that autograd records
    return part


def sharded_like(
    whole: torch.Tensor,
    part: torch.Tensor,
    shape: torch.Size | tuple[int, ...] | None = None,
) -> torch.Tensor:
    """Return a tensor of which `part` is local, sharded as `whole` is.

    Args:
        whole: The tensor to follow; a plain one gives back `part` itself.
        part: What this process holds.
        shape: Shape of the new tensor, sharded along its first dim where `whole` is
            sharded at all (default: that of `whole`).
    """
    if not is_sharded(whole):
        return part
    from torch.distributed.tensor import DTensor, Shard  # noqa: PLC0415 -- optional

    like: Any = whole
    placements = like.placements
    if shape is not None:
        placements = [Shard(0) if p.is_shard() else p for p in placements]
    size = torch.Size(shape or like.shape)
    stride = like.stride() if shape is None else _contiguous_stride(size)
    return DTensor.from_local(
        part,
        like.device_mesh,
        placements,
        run_check=False,
        shape=size,
        stride=stride,
    )


def change_format(
    parameter: torch.nn.Parameter, dtype: torch.dtype, storage: str
) -> None:
    """Hold a sharded parameter in another format; it stays the object that it is.

    FSDP2 takes the new local part over at its first forward, so this must come before.

    Raises:
        WeightStorageError: Something else already refers to the former tensor.
    """
    if parameter.dtype == dtype:
        return
    part = local(parameter).to(dtype)
    other = torch.nn.Parameter(sharded_like(parameter, part), parameter.requires_grad)
    try:
        torch.utils.swap_tensors(parameter, other)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise WeightStorageError(
            f"storage {storage} must take a sharded parameter of {parameter.dtype} "
            f"over before anything was computed with it; hold the weights right after "
            "fully_shard, or cast the model to 16 bits before it"
        ) from error


def splits_blocks(parameter: torch.Tensor, block: int) -> bool:
    """Return whether a border between processes falls inside a block of numbers.

    Where none does, states with a scale for each block can be saved by some processes
    and loaded by another number of them.
    """
    if not is_sharded(parameter):
        return False
    like: Any = parameter
    shards = [
        like.device_mesh.size(axis)
        for axis, placement in enumerate(like.placements)
        if placement.is_shard()
    ]
    if not shards or not parameter.numel():
        return False
    if len(shards) > 1 or any(p.is_shard() and p.dim != 0 for p in like.placements):
        return True
    rows = -(-parameter.shape[0] // shards[0])
    size = rows * (parameter.numel() // parameter.shape[0])
    num_blocks = -(-parameter.numel() // block)
    return bool(size % block or size // block != -(-num_blocks // shards[0]))


def add_up(parameters: list[torch.Tensor], sums: list[float]) -> list[float]:
    """Add sums over the parts of each parameter, in the same order on every process.

    Args:
        parameters: Sharded or not.
        sums: One for each, over the local part; fp64.
    """
    meshes: dict[Any, list[int]] = {}
    for place, parameter in enumerate(parameters):
        if is_sharded(parameter):
            like: Any = parameter
            meshes.setdefault((like.device_mesh, like.placements), []).append(place)
    total = list(sums)
    for (mesh, placements), places in meshes.items():
        device = local(parameters[places[0]]).device
        some = torch.tensor([sums[p] for p in places], dtype=torch.float64).to(device)
        for axis, placement in enumerate(placements):
            if placement.is_shard():
                torch.distributed.all_reduce(some, group=mesh.get_group(axis))
        for place, value in zip(places, some.tolist(), strict=True):
            total[place] = value
    return total


def _contiguous_stride(shape: torch.Size) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= size
    return tuple(reversed(stride))
