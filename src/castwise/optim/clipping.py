"""Clipping of gradients: by their global norm, by group, or by the weight they move.

    global      norm = sqrt(sum over all gradients g of |g|^2)
                g *= min(1, max_norm / norm)
    by group    the same, for each group of an optimizer by itself
    adaptive    for each row w of a weight and its gradient g (Brock et al. 2021, arXiv
                2102.06171): g *= min(1, ratio * max(|w|, floor) / |g|)

Each gradient is summed in fp32 (fp64 in fp64), so bf16 gradients lose nothing more, and
fp16 gradients do not overflow; formats and devices may mix. Where the squares overflow
fp32 although every gradient is finite, the sum is taken again in fp64. A norm that is
not finite is not clipped by: dividing by it would turn every gradient into 0 or NaN.
`name_nonfinite` says whose fault it is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from castwise.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class ByGroup:
    """Clips each parameter group of an optimizer to a norm of its own."""

    max_norm: float | None = None
    """Limit of the groups without an entry `max_norm`; None leaves them as they are."""

    def __post_init__(self) -> None:
        """Refuse a limit that freezes the weights."""
        if self.max_norm is not None:
            _check_above_0("clipping by group", "max_norm", self.max_norm)

    def clip(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Clip the gradients of the groups; returns whether any was scaled down."""
        norms = clip_by_group(groups, self.max_norm)
        limits = [group.get("max_norm", self.max_norm) for group in groups]
        pairs = zip(norms, limits, strict=True)
        return any(limit is not None and norm > limit for norm, limit in pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class ByRow:
    """Clips each row of a gradient to a fraction of the weights that it moves."""

    ratio: float = 0.01
    """Largest norm of a row of the gradient over that of the weight."""

    floor: float = 1e-3
    """Norm that a smaller weight counts as, so that zeros can move."""

    def __post_init__(self) -> None:
        """Refuse a limit that freezes the weights."""
        for name in ("ratio", "floor"):
            _check_above_0("adaptive clipping", name, getattr(self, name))

    def clip(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Clip the gradients of the groups; returns whether any was scaled down."""
        weights = [weight for group in groups for weight in group["params"]]
        return clip_adaptively(weights, self.ratio, self.floor) > 0


_LARGE = 1 << 20  # numbers in 16 bits that torch takes half a millisecond for
_ROUNDING_ROOM = 1e-6  # as in torch.nn.utils.clip_grad_norm_, to the last bit


def global_norm(
    gradients: Sequence[torch.Tensor], process_group: ProcessGroup | None = None
) -> float:
    """Return the 2-norm of all gradients together; 0 where there are none.

    Args:
        gradients: Tensors of any real or complex formats, on any devices.
        process_group: Processes that each hold a shard of every gradient; each gets
            the norm of all shards together (default: this process holds them whole).
    """
    values = [_real_values(gradient) for gradient in gradients]
    norm = _norm_of_norms(_norms(values))
    if math.isinf(norm):
        norm = _norm_of_norms([[each.double().norm()] for each in values])
    if process_group is None:
        return norm
    return norm_over_processes(norm, process_group)


def clip_by_global_norm(
    gradients: Sequence[torch.Tensor],
    max_norm: float | None,
    process_group: ProcessGroup | None = None,
) -> float:
    """Scale all gradients down together, in place, to a global norm of `max_norm`.

    Args:
        gradients: As in `global_norm`.
        max_norm: Largest norm that is left as it is; None clips nothing.
        process_group: As in `global_norm`.

    Returns:
        The norm before clipping. With `max_norm=None` nothing is clipped, and a norm
        that is not finite leaves the gradients as they are.

    Raises:
        SettingsError: `max_norm` is not above 0.
    """
    if max_norm is not None and not max_norm > 0:
        raise SettingsError(f"a norm to clip at needs to be above 0; got {max_norm}")
    norm = global_norm(gradients, process_group)
    if max_norm is not None:
        scale_down(gradients, norm, max_norm)
    return norm


def scale_down(gradients: Sequence[torch.Tensor], norm: float, max_norm: float) -> None:
    """Scale gradients whose norm is known to `max_norm`, in place, if it is larger."""
    if not math.isfinite(norm):
        return
    factor = max_norm / (norm + _ROUNDING_ROOM)
    if factor < 1:
        for group in _by_kind([_stored_values(each) for each in gradients]):
            torch._foreach_mul_(group, factor)


def clip_by_group(
    groups: Sequence[Mapping[str, Any]], max_norm: float | None = None
) -> list[float]:
    """Clip each group of an optimizer to a norm of its own, in place.

    Args:
        groups: `optimizer.param_groups`; a group's entry `max_norm` is its limit.
        max_norm: Limit of the groups that have none (default: they are not clipped).

    Returns:
        The norm of each group before clipping.
    """
    return [
        clip_by_global_norm(
            [p.grad for p in group["params"] if p.grad is not None],
            group.get("max_norm", max_norm),
        )
        for group in groups
    ]


@torch.no_grad()
def clip_adaptively(
    parameters: Iterable[torch.Tensor], ratio: float = 0.01, floor: float = 1e-3
) -> int:
    """Clip each row of a gradient to a fraction of the weights that it moves, in place.

    A row belongs to one output of a layer: one index of the first dimension. A vector
    or number is one row.

    Args:
        parameters: Parameters; those without gradient take no part.
        ratio: Largest norm of the gradient over that of the weight (default: 0.01).
        floor: Norm that a smaller weight counts as, so that zeros can move (default:
            1e-3).

    Returns:
        The number of rows that were clipped. Rows that are not finite are left.

    Raises:
        SettingsError: `ratio` or `floor` is not above 0.
    """
    for name, value in (("ratio", ratio), ("floor", floor)):
        _check_above_0("adaptive clipping", name, value)
    clipped = 0
    for parameter in parameters:
        if parameter.grad is None:
            continue
        gradient = parameter.grad
        limit = _row_norms(parameter).clamp(min=floor) * ratio
        norm = _row_norms(gradient)
        over = (norm > limit) & norm.isfinite()
        factor = torch.where(over, limit / norm, 1.0)
        gradient.copy_(gradient * factor)
        clipped += int(over.sum())
    return clipped


def name_nonfinite(named: Iterable[tuple[str, torch.Tensor]]) -> tuple[str, ...]:
    """Return the names of the parameters whose gradients hold an infinity or NaN.

    Args:
        named: Names and parameters, as `model.named_parameters()` gives them.
    """
    return tuple(
        name
        for name, parameter in named
        if parameter.grad is not None
        and not bool(torch.isfinite(_real_values(parameter.grad)).all())
    )


def _check_above_0(what: str, name: str, value: float) -> None:
    if not value > 0:
        raise SettingsError(f"{what} needs {name} above 0; got {value}")


def _row_norms(values: torch.Tensor) -> torch.Tensor:
    """Return the norm of each row in fp32 at least, with the dimensions kept."""
    values = values.detach()
    real = values.real.dtype if values.is_complex() else values.dtype
    wide = torch.promote_types(real, torch.float32)
    dims = list(range(1 if values.dim() > 1 else 0, values.dim()))
    magnitude = values.abs().to(wide)
    norm: torch.Tensor
    norm = torch.linalg.vector_norm(magnitude, dim=dims or None, keepdim=True)
    return norm


def norm_over_processes(norm: float, process_group: ProcessGroup) -> float:
    """Return the norm of the shards of all processes, none of whose squares overflow.

    The largest norm goes round first, and the squares of the ratios to it after it.
    """
    backend = torch.distributed.get_backend(process_group)
    device = "cuda" if backend == "nccl" else "cpu"
    largest = torch.tensor(norm, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(
        largest, torch.distributed.ReduceOp.MAX, group=process_group
    )
    if not 0 < float(largest) < math.inf:
        # NaN where any process has one: a maximum may pass over it, a sum does not.
        total = torch.tensor(norm, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(total, group=process_group)
        return float(total)
    square = (norm / largest) ** 2
    torch.distributed.all_reduce(square, group=process_group)
    return float(largest * square.sqrt())


def _norms(values: Sequence[torch.Tensor]) -> list[Sequence[torch.Tensor]]:
    """The norm of each tensor, at least in fp32; by device and format."""
    found: list[Sequence[torch.Tensor]] = []
    for group in _by_kind(values):
        others = group
        machine = [each for each in group if _is_for_machine_code(each)]
        if sum(each.numel() for each in machine) >= _LARGE:
            from castwise.optim import machine_table  # noqa: PLC0415 -- imports numba

            norms = torch.tensor(machine_table.norms(machine), dtype=torch.float64)
            found.append(norms.unbind())
            others = [each for each in group if not _is_for_machine_code(each)]
        if others:
            wide = torch.promote_types(group[0].dtype, torch.float32)
            found.append(torch._foreach_norm(others, 2, dtype=wide))  # noqa: SLF001 -- the only fused norm
    return found


def _is_for_machine_code(values: torch.Tensor) -> bool:
    """Return whether machine code sums these numbers, and torch is slow at it."""
    if type(values) is not torch.Tensor or values.device.type != "cpu":
        return False  # a fake tensor lies nowhere
    narrow = values.dtype in (torch.bfloat16, torch.float16)
    return narrow and values.is_contiguous()


def _norm_of_norms(norms: Iterable[Sequence[torch.Tensor]]) -> float:
    """Combine norms of one kind each; the host reads one number from each device."""
    by_device: dict[torch.device, list[torch.Tensor]] = defaultdict(list)
    for each in norms:
        by_device[each[0].device].append(torch.stack(tuple(each)))
    totals = []
    for stacks in by_device.values():
        widest = max((s.dtype for s in stacks), key=lambda dtype: dtype.itemsize)
        stacked = torch.cat([s.to(widest) for s in stacks])
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
    return _stored_values(gradient.coalesce() if gradient.is_sparse else gradient)


def _stored_values(gradient: torch.Tensor) -> torch.Tensor:
    """A view of the numbers in memory, to change them in place."""
    if gradient.requires_grad:  # seldom, and a view takes its time
        gradient = gradient.detach()
    if gradient.is_sparse:
        gradient = gradient._values()  # noqa: SLF001 -- the only view of them
    if gradient.is_complex():
        return torch.view_as_real(gradient.conj() if gradient.is_conj() else gradient)
    return gradient
