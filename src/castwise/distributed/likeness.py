"""Are all ranks still alike? Weights, buffers, formats and policy, at an interval.

    watching = watch_ranks(run, every=100)
    ...                              # RanksError: rank 3 holds another 'head.bias' ...
    watching.remove()

Under DDP every rank must hold the same bits for ever, and nobody looks: a kernel that
adds in any order, a rank that took another branch, a buffer that one of them wrote, or
memory that forgot a bit lets ranks drift apart, and the mean of their gradients is then
that of different models. Each look takes a fingerprint of what the rank holds, and one
message of 32 bytes goes round; only where those differ do names follow, so that rank
and tensor can be named. What most ranks hold is taken to be right.

What is sharded has no twin to compare with; its formats and the policy have. A buffer
that training writes, such as a running mean, may differ between two forwards: it is
left out once all ranks have changed it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Protocol, Self, final
from zlib import crc32

import torch
from torch import distributed

from castwise.distributed.fingerprint import fingerprints, together
from castwise.errors import RanksError, SettingsError
from castwise.fitting import is_sharded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from castwise.loss_scale import LossScale


class ComparedRun(Protocol):
    """What is compared: what `castwise.prepare` returned."""

    model: nn.Module
    loss_scale: LossScale
    watchers: list[Any]

    @property
    def applied(self) -> Any:
        """The policy on the model."""

    @property
    def phase(self) -> str:
        """The phase in force."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Look:
    """What one rank holds: name -> a number, by kind."""

    policy: dict[str, int]
    """Of the policy, the phase and the loss scale."""

    formats: dict[str, int]
    """Of name, shape and format of every weight and buffer."""

    weights: dict[str, int]
    """Of the bits of whole weights."""

    buffers: dict[str, int]
    """Of the bits of buffers that have not changed so far."""

    def numbers(self) -> list[int]:
        """One number for each kind."""
        kinds = (self.policy, self.formats, self.weights, self.buffers)
        return [together([*_names_of(each), *each.values()]) for each in kinds]


@final
class RankWatch:
    """Compares the ranks of a run; made by `watch_ranks`."""

    def __init__(self, run: ComparedRun, *, every: int, but: Sequence[str]) -> None:
        if every < 1:
            raise SettingsError(f"ranks are compared every n >= 1 steps; got {every}")
        self._run, self._every, self._but = run, every, tuple(but)
        self._num_steps = 0
        self._buffers = _bits_of(dict(run.model.named_buffers()), self._but)
        self.num_looks = 0
        """How often the ranks were compared."""

    def begins(self) -> None:
        """The step is open and nothing ran in it."""

    def gradients_ready(self, scale: float) -> None:
        """Gradients are complete, and still hold the loss scale."""

    def ends(self, *, stepped: bool) -> None:
        """Compare, if it is time."""
        del stepped
        self._num_steps += 1
        if self._num_steps % self._every == 0:
            self.compare()

    def compare(self) -> None:
        """Compare now; every rank must call it.

        Raises:
            RanksError: One of them differs; on all ranks.
        """
        self.num_looks += 1
        look = self._look()
        size = distributed.get_world_size()
        if size == 1:
            return
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        own = torch.tensor(look.numbers(), device=device)
        told = [torch.empty_like(own) for _ in range(size)]
        distributed.all_gather(told, own)
        if all(torch.equal(each, own) for each in told):
            return  # all or none, since equality is
        looks: list[Any] = [None] * size
        distributed.all_gather_object(looks, look)
        difference = _difference(looks)
        if distributed.get_rank() != 0:
            raise RanksError(
                "rank 0 says in what the ranks differ; this rank stops too"
            )
        raise RanksError(f"after {self._num_steps} watched steps {difference}")

    def remove(self) -> None:
        """Compare no more."""
        if self in self._run.watchers:
            self._run.watchers.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _look(self) -> _Look:
        run = self._run
        weights = dict(run.model.named_parameters())
        buffers = dict(run.model.named_buffers())
        whole = {n: w for n, w in weights.items() if not is_sharded(w)}
        found = _bits_of({n: buffers[n] for n in self._buffers if n in buffers}, ())
        kept = {n: bits for n, bits in found.items() if bits == self._buffers[n]}
        self._buffers = kept
        policy = run.applied.bound.policy.to_yaml()
        return _Look(
            policy={
                f"policy {crc32(policy.encode()):08x}": 0,
                f"phase {run.phase}": 0,
                f"loss scale {run.loss_scale.scale!r}": 0,
            },
            formats={_line(*each): 0 for each in [*weights.items(), *buffers.items()]},
            weights=_bits_of(whole, self._but),
            buffers=kept,
        )


def watch_ranks(
    run: ComparedRun, *, every: int = 100, but: Sequence[str] = ()
) -> RankWatch:
    """Compare what all ranks hold, every so many steps; every rank must call it.

    Args:
        run: What `castwise.prepare` returned, under DDP or FSDP2.
        every: After how many steps, skipped ones included.
        but: Globs for weights and buffers that may differ, such as `*.num_seen`.

    Raises:
        SettingsError: There are no ranks, or `every` is not above 0.
    """
    if not distributed.is_initialized():
        raise SettingsError(
            "watch_ranks needs processes to compare; call "
            "torch.distributed.init_process_group first"
        )
    watching = RankWatch(run, every=every, but=but)
    run.watchers.append(watching)
    return watching


def _difference(looks: Sequence[_Look]) -> str:
    """Name the first rank that differs from most, and in what."""
    for kind in ("policy", "formats", "weights", "buffers"):
        held = [tuple(getattr(each, kind).items()) for each in looks]
        if len(set(held)) == 1:
            continue
        usual = Counter(held).most_common(1)[0][0]  # of equals, the first rank's
        rank = next(at for at, each in enumerate(held) if each != usual)
        return _told(kind, rank, held.index(usual), dict(held[rank]), dict(usual))
    raise AssertionError("fingerprints differ, and what they were taken of does not")


def _told(
    kind: str,
    rank: int,
    other: int,
    mine: Mapping[str, int],
    usual: Mapping[str, int],
) -> str:
    if kind in ("policy", "formats"):
        here = next((name for name in mine if name not in usual), "nothing")
        there = next((name for name in usual if name not in mine), "nothing")
        return (
            f"rank {rank} and rank {other} differ: {here!r} against {there!r}; change "
            "phase, policy and formats on all ranks in the same step"
        )
    names = list(dict.fromkeys([*usual, *mine]))
    unlike = [name for name in names if mine.get(name) != usual.get(name)]
    return (
        f"rank {rank} holds another {unlike[0]!r} than rank {other} ({len(unlike)} of "
        f"{len(names)} {kind} differ); resume from the last checkpoint, and look for "
        "what only one rank does"
    )


def _bits_of(tensors: Mapping[str, torch.Tensor], but: Sequence[str]) -> dict[str, int]:
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not any(fnmatchcase(name, glob) for glob in but)
    }
    return dict(zip(kept, fingerprints([*kept.values()]), strict=True))


def _names_of(named: Mapping[str, int]) -> list[int]:
    return [crc32(name.encode()) for name in named]


def _line(name: str, tensor: torch.Tensor) -> str:
    return f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
