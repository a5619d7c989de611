"""Gradients as two thin factors while DDP sends them round (PowerSGD).

Vogels, Karimireddy and Jaggi, PowerSGD, arXiv 1905.13727, algorithms 1 and 2. Of each
gradient matrix, with the basis Q that the step before left and the error E that this
rank has not been able to send so far:

    M = G + E                       # R x C, on each rank its own
    P = orthonormal(mean(M Q))      # R x k goes round, while the backward goes on
    Q = mean(M^T P)                 # C x k goes round, when the backward is over
    G = P Q^T                       # the same on all ranks; what the optimizer steps by
    E = M - G                       # sent later: no part of a gradient is ever lost

The basis is kept orthonormal, which spans the same and keeps P as large as M, so that
neither a loss scale nor 16 bits can make it overflow by a square.

`torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook` is the same algorithm. Mixed
precision and checkpoints need four things that it does not have:

    loss scale     E is kept without it, so that it stays true when the scale changes
    skipped steps  an inf in any gradient leaves every E and Q as they were
    checkpoints    E and Q are kept by name of weight, not by bucket; DDP deals buckets
                   anew after the first step of every process
    islands        a weight that is delicate is sent whole, in its own format

All messages are started by one thread, in the order of the buckets, so that none can
overtake another, whatever the backend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch
from torch import distributed

from castwise.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch._C._distributed_c10d import GradBucket

    from castwise.distributed.compression import Compression
    from castwise.loss_scale import LossScale


@dataclass(frozen=True, kw_only=True, slots=True)
class Travel:
    """How the gradient of one weight goes round."""

    name: str
    """The weight."""

    format: torch.dtype
    """The format that it is summed in."""

    may_shrink: bool
    """Whether it may be sent as factors."""


@final
class LowRank:
    """The communication hook, and what it must remember from step to step.

    Args:
        travels: Weight -> how its gradient goes round.
        settings: Rank of the factors, and when to begin.
        group: The processes.
        loss_scale: What gradients are multiplied by.
    """

    def __init__(
        self,
        travels: Mapping[torch.Tensor, Travel],
        settings: Compression,
        group: Any,
        loss_scale: LossScale | None,
    ) -> None:
        self.settings = settings
        self.num_steps = 0
        """Steps whose gradients went round and were finite."""
        self.num_bytes = 0
        """Bytes that this rank gave to be summed in the latest step."""
        self._group, self._loss_scale = group, loss_scale
        self._travels = dict(travels)
        self._shapes = {
            each.name: _matrix(weight)
            for weight, each in travels.items()
            if each.may_shrink and _is_worth(_matrix(weight), settings)
        }
        self._errors: dict[str, torch.Tensor] = {}
        self._bases: dict[str, torch.Tensor] = {}
        for weight, each in travels.items():
            if each.name in self._shapes:
                self._remember(each.name, weight)
        self._buckets: list[_Bucket] = []

    @property
    def shrunk(self) -> tuple[str, ...]:
        """Names of the weights whose gradients are sent as factors."""
        return tuple(self._shapes)

    def hook(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Begin to send a bucket round; with the last one, finish all of them."""
        if bucket.index() == 0:
            self._buckets, self.num_bytes = [], 0  # a backward that died left some
        buffer = bucket.buffer()
        on: list[Any] | None = [buffer.device] if buffer.is_cuda else None
        waiting = _Bucket(buffer=buffer, done=torch.futures.Future(devices=on))
        for weight, gradient in zip(
            bucket.parameters(), bucket.gradients(), strict=True
        ):
            travel = self._travels[weight]
            if self._shrinks(travel.name):
                waiting.matrices.append(self._projected(travel, gradient))
            else:
                waiting.whole.append((travel.format, gradient))
        waiting.sent = self._send(waiting.first_round())
        self._buckets.append(waiting)
        if bucket.is_last():
            self._finish()
        return waiting.done

    def _shrinks(self, name: str) -> bool:
        return self.num_steps >= self.settings.start and name in self._shapes

    def _projected(self, travel: Travel, gradient: torch.Tensor) -> _Matrix:
        """M and M Q of one gradient; in fp32, M stands where the gradient stood."""
        shape, error = self._shapes[travel.name], self._errors[travel.name]
        wide = gradient.reshape(shape).float()
        wide.add_(error, alpha=self._scale)
        return _Matrix(
            travel=travel,
            gradient=gradient,
            wide=wide,
            factor=wide @ self._bases[travel.name],
        )

    def _finish(self) -> None:
        """Take the first factors, send the second ones, and write gradients back."""
        matrices = [each for bucket in self._buckets for each in bucket.matrices]
        fine = _all_arrived(each.sent for each in self._buckets)
        if fine:
            for each in matrices:
                each.factor = torch.linalg.qr(each.factor).Q
                each.other = each.wide.T @ each.factor
            second = self._send([(each.travel.format, each.other) for each in matrices])
            fine = _all_arrived([second])
        if fine:
            for each in matrices:
                self._settle(each)
        else:
            self._give_up(matrices)
        for bucket in self._buckets:
            bucket.done.set_result(bucket.buffer)
        self._buckets = []
        self.num_steps += fine

    def _settle(self, each: _Matrix) -> None:
        """Write a gradient, and remember what it lacks."""
        name = each.travel.name
        summed = each.factor @ each.other.T
        shown = summed.to(each.gradient.dtype)  # what 16 bits round off is not sent
        # In fp32 the gradient is `wide` itself, so the error is taken first.
        torch.sub(each.wide, shown, out=self._errors[name])
        self._errors[name].div_(self._scale)
        each.gradient.copy_(shown.view_as(each.gradient))
        self._bases[name].copy_(torch.linalg.qr(each.other).Q)

    def _give_up(self, matrices: Sequence[_Matrix]) -> None:
        """Let all ranks find the same matrix not finite, and remember nothing.

        A sum over a row of M says that it is not finite, but not whether it was NaN.
        """
        found = [_fault_of(each.wide) for each in matrices]
        faults = torch.tensor([0, *found], device=self._buckets[0].buffer.device)
        distributed.all_reduce(faults, distributed.ReduceOp.MAX, group=self._group)
        for each, fault in zip(matrices, faults[1:].tolist(), strict=True):
            each.gradient.fill_((0.0, math.inf, math.nan)[fault])
        if not int(faults.max()) and matrices:  # a factor overflowed in 16 bits
            matrices[0].gradient.fill_(math.inf)

    def _send(self, parts: Iterable[tuple[torch.dtype, torch.Tensor]]) -> _Messages:
        """Start one message for each format."""
        by_format: dict[torch.dtype, list[torch.Tensor]] = {}
        for dtype, part in parts:
            by_format.setdefault(dtype, []).append(part)
        size = distributed.get_world_size(self._group)
        sent = _Messages()
        for dtype, members in by_format.items():
            flat = torch.cat([each.reshape(-1).to(dtype) for each in members])
            flat.div_(size)  # before the sum, which might overflow
            self.num_bytes += flat.nbytes
            work = distributed.all_reduce(flat, group=self._group, async_op=True)
            sent.under_way.append((work, flat, members))
        return sent

    @property
    def _scale(self) -> float:
        return 1.0 if self._loss_scale is None else self._loss_scale.scale

    def _remember(self, name: str, weight: torch.Tensor) -> None:
        """Begin with no error, and with a basis that all ranks draw alike."""
        shape, device = self._shapes[name], weight.device
        draws = torch.Generator().manual_seed(self.settings.seed + len(self._bases))
        rank = min(self.settings.rank, *shape)
        basis = torch.randn(shape[1], rank, generator=draws)
        self._bases[name] = basis.to(device)
        self._errors[name] = torch.zeros(shape, device=device)

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank must find again to go on with the same bits.

        Errors differ from rank to rank, so each saves its own; `whole_state_dict` is
        for a checkpoint that one rank writes.
        """
        return {
            "settings": str(self.settings),
            "num_steps": self.num_steps,
            "num_ranks": distributed.get_world_size(self._group),
            "rank": distributed.get_rank(self._group),
            "bases": dict(self._bases),
            "errors": dict(self._errors),
        }

    def whole_state_dict(self) -> dict[str, Any]:
        """Return the state of all ranks, on the first one; every rank must call it.

        Its errors are stacked by rank, and take that many times the model. Other ranks
        get it without errors.
        """
        size = distributed.get_world_size(self._group)
        is_first = distributed.get_rank(self._group) == 0
        first = distributed.get_global_rank(self._group, 0)
        stacked: dict[str, torch.Tensor] = {}
        for name, error in self._errors.items():
            parts = [torch.empty_like(error) for _ in range(size)] if is_first else None
            distributed.gather(error, parts, dst=first, group=self._group)
            if parts is not None:
                stacked[name] = torch.stack(parts)
        return {**self.state_dict(), "rank": None, "errors": stacked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a state was taken, on as many ranks or another number.

        On as many, every bit is what it was. On another number each rank takes the mean
        of all errors, so that what all ranks together have not sent stays the same.

        Raises:
            CheckpointError: It is the state of other weights, other settings or another
                rank.
        """
        self._refuse(state)
        size = distributed.get_world_size(self._group)
        rank = distributed.get_rank(self._group)
        for name, basis in state["bases"].items():
            self._bases[name].copy_(basis)
        for name, error in state["errors"].items():
            if state["rank"] is None:
                same = state["num_ranks"] == size
                error = error[rank] if same else error.mean(0)  # noqa: PLW2901 -- one of them
            self._errors[name].copy_(error)
        self.num_steps = int(state["num_steps"])

    def _refuse(self, state: Mapping[str, Any]) -> None:
        if state["settings"] != str(self.settings):
            raise CheckpointError(
                f"the checkpoint compressed gradients by {state['settings']} and this "
                f"run does by {self.settings}; give compress={state['settings']!r}"
            )
        unlike = {
            name
            for name in {*state["bases"], *self._bases}
            if _shape_of(state["bases"], name) != _shape_of(self._bases, name)
        }
        if unlike:
            raise CheckpointError(
                "the checkpoint holds factors of another model: "
                f"{min(unlike)!r} is missing or has another shape"
            )
        here = (
            distributed.get_world_size(self._group),
            distributed.get_rank(self._group),
        )
        there = (state["num_ranks"], state["rank"])
        if state["rank"] is not None and here != there:
            raise CheckpointError(
                f"this is what rank {there[1]} of {there[0]} had not sent, and here is "
                f"rank {here[1]} of {here[0]}; save with whole_state_dict() to go on "
                "with another number of ranks"
            )


@dataclass(kw_only=True, slots=True)
class _Matrix:
    """One gradient on its way as factors."""

    travel: Travel
    gradient: torch.Tensor
    wide: torch.Tensor
    factor: torch.Tensor
    other: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(kw_only=True, slots=True)
class _Messages:
    """Messages under way, one for each format."""

    under_way: list[tuple[Any, torch.Tensor, list[torch.Tensor]]] = field(
        default_factory=list
    )

    def arrived(self) -> bool:
        """Wait, write the means where the parts stood, and say if all are finite."""
        fine = True
        for work, flat, members in self.under_way:
            work.wait()
            fine = fine and bool(torch.isfinite(flat).all())
            sizes = [each.numel() for each in members]
            for each, part in zip(members, torch.split(flat, sizes), strict=True):
                each.copy_(part.view_as(each))
        return fine


@dataclass(kw_only=True, slots=True)
class _Bucket:
    """A bucket of gradients that waits for the last one."""

    buffer: torch.Tensor
    done: torch.futures.Future[torch.Tensor]
    whole: list[tuple[torch.dtype, torch.Tensor]] = field(default_factory=list)
    matrices: list[_Matrix] = field(default_factory=list)
    sent: _Messages = field(default_factory=_Messages)

    def first_round(self) -> Iterator[tuple[torch.dtype, torch.Tensor]]:
        """Whole gradients, and the first factors of the others."""
        yield from self.whole
        yield from ((each.travel.format, each.factor) for each in self.matrices)


def _all_arrived(sent: Iterable[_Messages]) -> bool:
    """Wait for all messages, in order; say whether everything in them is finite."""
    return min([each.arrived() for each in sent], default=True)


def _fault_of(gradient: torch.Tensor) -> int:
    """0 if all is finite, 2 if there is a NaN, else 1."""
    return 2 if gradient.isnan().any() else int(not gradient.isfinite().all())


def _matrix(weight: torch.Tensor) -> tuple[int, int]:
    """The shape of a weight as a matrix: outputs by everything else."""
    rows = weight.shape[0] if weight.dim() else 1
    return rows, weight.numel() // max(1, rows)


def _is_worth(shape: tuple[int, int], settings: Compression) -> bool:
    rows, columns = shape
    factors = min(settings.rank, rows, columns) * (rows + columns)
    return rows * columns >= settings.saves * factors > 0


def _shape_of(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None
