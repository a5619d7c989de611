"""Sum gradients in the formats of a policy while DDP sends them round.

    run = prepare(model, optimizer, policy)     # formats of weights come first
    ddp = replicate(model, policy)
    with run.step() as step:
        step.backward(loss_fn(ddp(x), y))

DDP sums gradients in the format that they have, which is that of their weights. Where
the policy's `reduce` says another one, a hook casts them before they travel and back
when they arrive: halved traffic for `r=bf16`, and a fp32 sum for weights in bf16. A
bucket in which formats mix, because an island is in it, goes round in one message for
each format. Formats are those of `formats.reduced_in`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from castwise.distributed.formats import reduced_in
from castwise.dtypes import dtype_of
from castwise.errors import SettingsError
from castwise.islands import module_facts
from castwise.islands.layout import governing_fqn
from castwise.policy.bound import BoundPolicy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from torch._C._distributed_c10d import GradBucket

    from castwise.policy.rules import Policy


def replicate(
    model: nn.Module, policy: Policy | BoundPolicy, **settings: Any
) -> DistributedDataParallel:
    """Wrap a model in DDP that sums gradients in the formats of a policy.

    Args:
        model: Any module tree whose weights have their formats already: after
            `prepare`, or in fp32 under a policy that holds fp32.
        policy: What gradients are summed in.
        settings: For `DistributedDataParallel`.

    Raises:
        SettingsError: No process group is there, or a weight will change its format.
        UnmatchedRuleError: A rule matches nothing in the model.
    """
    if not distributed.is_initialized():
        raise SettingsError(
            "replicate needs the processes that share the model; call "
            "torch.distributed.init_process_group first"
        )
    bound = (
        policy if isinstance(policy, BoundPolicy) else policy.bind(module_facts(model))
    )
    formats = _formats(model, bound)
    ddp = DistributedDataParallel(model, **settings)
    if any(weight.dtype is not each for weight, each in formats.items()):
        state = _Reduction(formats=formats, group=ddp.process_group)
        ddp.register_comm_hook(state, lambda state, bucket: _reduce(state, bucket))  # noqa: PLW0108 -- DDP reads annotations, and refuses postponed ones
    return ddp


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reduction:
    """What the hook has to know."""

    formats: Mapping[torch.Tensor, torch.dtype]
    """Weight -> what its gradient travels in."""

    group: Any
    """The processes."""


def _formats(model: nn.Module, bound: BoundPolicy) -> dict[torch.Tensor, torch.dtype]:
    found: dict[torch.Tensor, torch.dtype] = {}
    for name, weight in model.named_parameters():
        owner = governing_fqn(name.rpartition(".")[0])
        stored = bound.precision_of(owner).param
        assert stored is not None
        if not weight.is_floating_point():
            found[weight] = weight.dtype
            continue
        if weight.dtype is not dtype_of(stored):
            raise SettingsError(
                f"{name!r} is held in {weight.dtype} and {bound.policy.name} will hold "
                f"it in {stored}, which DDP cannot follow; call prepare before that"
            )
        found[weight] = dtype_of(reduced_in(owner, bound))
    return found


def _reduce(
    state: _Reduction, bucket: GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Send the gradients of a bucket round, each in its format, and take the mean."""
    parts: dict[torch.dtype, list[torch.Tensor]] = {}
    for weight, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
        parts.setdefault(state.formats[weight], []).append(gradient)
    size = distributed.get_world_size(state.group)
    sent, futures = [], []
    for dtype, gradients in parts.items():
        flat = torch.cat([each.reshape(-1).to(dtype) for each in gradients])
        flat.div_(size)  # before the sum, which might overflow
        work = distributed.all_reduce(flat, group=state.group, async_op=True)
        sent.append((flat, gradients))
        futures.append(work.get_future())
    return torch.futures.collect_all(futures).then(
        partial(_arrive, bucket.buffer(), sent)
    )


def _arrive(
    buffer: torch.Tensor,
    sent: list[tuple[torch.Tensor, list[torch.Tensor]]],
    _: torch.futures.Future[Any],
) -> torch.Tensor:
    """Write the sums back to where the gradients stood."""
    for flat, gradients in sent:
        sizes = [each.numel() for each in gradients]
        for gradient, part in zip(gradients, torch.split(flat, sizes), strict=True):
            gradient.copy_(part.view_as(gradient))
    return buffer
