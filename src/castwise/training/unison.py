"""What processes that train together decide as one: one of them says it, all follow.

Each process sees its own rows of a batch, and often its own part of the weights. Where
one of them alone has something to say, all must do the same, or they end up with
different weights. Of several proposals that of the lowest rank is taken.

What goes round while nobody has anything to say is one integer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import distributed

from castwise.numerics.watch.table import num_ranks

_T = TypeVar("_T")


def first_proposal(own: _T) -> _T:
    """Return what the first process that has a proposal says; the same on all.

    Every process must call it, with plain data, or with None for no proposal.
    """
    if num_ranks() == 1:
        return own
    nobody = num_ranks()
    rank = torch.tensor(
        nobody if own is None else distributed.get_rank(), device=_device()
    )
    distributed.all_reduce(rank, distributed.ReduceOp.MIN)
    if int(rank) == nobody:
        return own  # None, as on every rank
    told: list[Any] = [own]
    distributed.broadcast_object_list(told, src=int(rank))
    found: _T = told[0]
    return found


def largest(own: Mapping[str, float]) -> dict[str, float]:
    """Return the largest of each number over all processes, in the order of names."""
    if num_ranks() == 1:
        return dict(own)
    gathered: list[Any] = [None] * num_ranks()
    distributed.all_gather_object(gathered, dict(own))
    names = sorted({name for each in gathered for name in each})
    return {name: max(each.get(name, 0.0) for each in gathered) for name in names}


def _device() -> str:
    """Where tensors must be to go round."""
    return "cuda" if distributed.get_backend() == "nccl" else "cpu"
