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

`compress` makes gradients smaller than the policy asks for (`compression`). What that
has to remember from step to step belongs into checkpoints:

    feedback = feedback_of(ddp)
    saved = feedback.state_dict() if feedback else None
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from castwise.distributed.compression import Compression
from castwise.distributed.formats import bits_of, reduced_in
from castwise.distributed.gradients import share_step
from castwise.distributed.low_rank import LowRank, Travel
from castwise.dtypes import dtype_of
from castwise.errors import SettingsError, WeightStorageError
from castwise.islands import module_facts
from castwise.islands.layout import governing_fqn
from castwise.optim.holding import HeldWeights
from castwise.policy.bound import BoundPolicy
from castwise.policy.precision import Precision

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from torch._C._distributed_c10d import GradBucket

    from castwise.loss_scale import LossScale
    from castwise.policy.rules import Policy


def replicate(
    model: nn.Module,
    policy: Policy | BoundPolicy,
    *,
    compress: str | Compression = "reduce",
    loss_scale: LossScale | None = None,
    **settings: Any,
) -> DistributedDataParallel:
    """Wrap a model in DDP that sums gradients in the formats of a policy.

    Args:
        model: Any module tree whose weights have their formats already: after
            `prepare`, or in fp32 under a policy that holds fp32.
        policy: What gradients are summed in.
        compress: How gradients are made smaller: `reduce` (as the policy says), `bf16`,
            `fp16`, or `powersgd:rank=4`.
        loss_scale: What the loss is multiplied by, `run.loss_scale`; powersgd needs it
            where there is one.
        settings: For `DistributedDataParallel`.

    Raises:
        SettingsError: No process group is there, a weight will change its format, or
            gradients cannot be compressed so.
        WeightStorageError: Gradients are stepped by before DDP has summed them, or in a
            format that it cannot sum.
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
    compression = (
        compress if isinstance(compress, Compression) else Compression.parse(compress)
    )
    if compression.method in ("bf16", "fp16"):
        narrow = Precision(reduce=compression.method).over(bound.policy.default)
        bound = bound.policy.with_default(narrow).bind(module_facts(model))
    _refuse_own_ways(model)
    formats = _formats(model, bound)
    if compression.method == "powersgd":
        _refuse_unknown_scale(bound, loss_scale)
    ddp = DistributedDataParallel(model, **settings)
    share_step(model)
    if compression.method == "powersgd":
        feedback = LowRank(
            _travels(model, bound, formats), compression, ddp.process_group, loss_scale
        )
        ddp.register_comm_hook(feedback, lambda state, bucket: state.hook(bucket))
        _FEEDBACK[ddp] = _FEEDBACK[model] = feedback
    elif any(weight.dtype is not each for weight, each in formats.items()):
        state = _Reduction(formats=formats, group=ddp.process_group)
        ddp.register_comm_hook(state, lambda state, bucket: _reduce(state, bucket))  # noqa: PLW0108 -- DDP reads annotations, and refuses postponed ones
    return ddp


def feedback_of(model: nn.Module) -> LowRank | None:
    """Return what compression remembers, for checkpoints; often nothing.

    Args:
        model: What `replicate` was given, or what it returned.
    """
    return _FEEDBACK.get(model)


_FEEDBACK: WeakKeyDictionary[nn.Module, LowRank] = WeakKeyDictionary()


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


def _travels(
    model: nn.Module, bound: BoundPolicy, formats: Mapping[torch.Tensor, torch.dtype]
) -> dict[torch.Tensor, Travel]:
    """How each gradient goes round; whole, where the policy computes in more digits."""
    usual = str(bound.policy.base_precision().compute)
    found: dict[torch.Tensor, Travel] = {}
    for name, weight in model.named_parameters():
        own = str(bound.precision_of(governing_fqn(name.rpartition(".")[0])).compute)
        found[weight] = Travel(
            name=name,
            format=formats[weight],
            may_shrink=weight.is_floating_point() and bits_of(own) <= bits_of(usual),
        )
    return found


def _refuse_own_ways(model: nn.Module) -> None:
    """Refuse what would step by the gradients of one process, or stop in the middle."""
    for name, weight in model.named_parameters():
        hooks = getattr(weight, "_post_accumulate_grad_hooks", None) or {}
        owners = (getattr(hook, "__self__", None) for hook in hooks.values())
        if any(isinstance(each, HeldWeights) for each in owners):
            raise WeightStorageError(
                f"{name!r} is updated in the backward, before DDP has summed its "
                "gradient, and the buckets of DDP would keep the gradients anyway; "
                "leave release_gradients out, or use castwise.shard"
            )
        if getattr(weight, "grad_dtype", weight.dtype) not in {None, weight.dtype}:
            raise WeightStorageError(
                f"{name!r} gets gradients in {weight.grad_dtype}, and the buckets of "
                f"DDP hold {weight.dtype}; leave grad_format out, and let a rule with "
                "r=fp32 sum them in fp32"
            )


def _refuse_unknown_scale(bound: BoundPolicy, loss_scale: LossScale | None) -> None:
    if loss_scale is None and bound.policy.decide_loss_scale().value != "none":
        raise SettingsError(
            f"{bound.policy.name} multiplies the loss by a scale, and powersgd keeps "
            "what it has not sent without it; give loss_scale=run.loss_scale"
        )


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
