"""Are weights summed by DDP? Then nobody may step by them inside of the backward.

DDP sums gradients when the last one of a bucket is there, by hooks in C++ that leave no
trace on a weight. So the wrappers themselves are looked for, among all objects that
Python knows of: once for an optimizer, and only where there are several processes.
"""

from __future__ import annotations

import gc

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from castwise.errors import WeightStorageError


def refuse_replicas(parameter: torch.Tensor) -> None:
    """Refuse to step by a gradient that DDP has not summed yet.

    Raises:
        WeightStorageError: The parameter is one of a model in DDP.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return
    if distributed.get_world_size() > 1 and is_replicated(parameter):
        raise WeightStorageError(
            "release_gradients steps in the backward, before DDP has summed the "
            "gradients of all processes, so that each would train weights of its own; "
            "leave release_gradients out, or shard the model with castwise.shard"
        )


def is_replicated(parameter: torch.Tensor) -> bool:
    """Whether a model in DDP has this parameter."""
    return any(
        parameter is each
        for found in gc.get_objects()
        # by its class alone: a lazy object would load what it stands for
        if issubclass(type(found), DistributedDataParallel)
        for each in found.parameters()
    )
