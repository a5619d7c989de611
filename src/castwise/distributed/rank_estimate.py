"""What one of many processes holds and sends, foretold on a machine without any.

    told = estimate_ranks(model, batch, loss_fn, policy, num_ranks=64, strategy="fsdp")
    told.rank.peak_bytes                # of each rank
    told.bytes_sent                     # by each rank, in each step

The step of one process is walked through as by `castwise.estimate`, and what processes
share is then laid over the lifetimes of its allocations. With N ranks, a group of n
numbers of which each rank has m (n / N, rounded up to whole rows of each weight), and b
bytes for a number stored, gathered or reduced:

    fsdp  always        weights, what stands beside them, and states: m instead of n
          forward       a group that runs: n b of gathered weights, and N m b of the
                        message until the next group runs; the outermost group stays
          backward      a group that runs: n b gathered, n b of its gradients, the
                        message N m b of the group that is gathered next; behind it
                        N m b of gradients on their way until the next group is done,
                        and m b of summed gradients to the end of the step
          sent          (N - 1) m b for every gathering and every summation
    ddp   always        everything, and n b of buckets that gradients are summed in
          sent          2 (N - 1) / N n b, as in a ring

The groups are those of `castwise.distributed.shard`, and messages overlap with
computation as FSDP2 lets them. On a CPU gloo copies a message once more while it sums;
what NCCL keeps for itself is not counted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from castwise.distributed.formats import Gather, bits_of, reduced_in
from castwise.distributed.groups import WeightGroup, plan_groups
from castwise.errors import SettingsError
from castwise.islands import module_facts
from castwise.islands.layout import governing_fqn
from castwise.memory.estimate import LossFn, foretell
from castwise.memory.estimate_records import Estimate, estimate_of
from castwise.memory.lifetimes import Allocation, Lifetimes

if TYPE_CHECKING:
    from torch import nn

    from castwise.policy.rules import Policy

Strategy = Literal["ddp", "fsdp"]
STRATEGIES = ("ddp", "fsdp")

_BUCKET = 25 << 20  # bytes of a bucket of DDP
_ROOM = 4  # instants made out of one: what FSDP2 does stands between two operators


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """Messages of one kind in a step."""

    kind: str
    """all_gather, reduce_scatter or all_reduce."""

    num_messages: int
    """How many of them a step sends."""

    bytes_sent: int
    """Bytes that each rank sends in them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEstimate:
    """One training step on several processes, known before anything ran."""

    strategy: str
    """ddp or fsdp."""

    num_ranks: int
    """How many processes there are."""

    rank: Estimate
    """The memory of each of them; the fullest, where they differ."""

    exchanges: tuple[Exchange, ...]
    """What travels in a step."""

    @property
    def bytes_sent(self) -> int:
        """Bytes that each rank sends in a step."""
        return sum(each.bytes_sent for each in self.exchanges)

    def record(self) -> dict[str, Any]:
        """Plain values for JSON; `from_record` reads them."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> RankEstimate:
        """Build an estimate from what `record` gave."""
        exchanges = tuple(Exchange(**each) for each in record["exchanges"])
        rank = Estimate.from_record(record["rank"])
        return cls(**{**record, "rank": rank, "exchanges": exchanges})


def estimate_ranks(
    model: nn.Module,
    batch: Sequence[Any],
    loss_fn: LossFn,
    policy: Policy,
    *,
    num_ranks: int,
    strategy: Strategy = "fsdp",
    units: Sequence[str] | None = None,
    gather: Gather = "low",
    **settings: Any,
) -> RankEstimate:
    """Tell what each of several processes will hold and send in a training step.

    Args:
        model: The whole model; it may stand on the meta device.
        batch: What one rank gets.
        loss_fn: From the model's output and the target to a scalar.
        policy: What runs in which format.
        num_ranks: How many processes there are.
        strategy: ddp (`replicate`) or fsdp (`shard`).
        units: As in `shard`.
        gather: As in `shard`.
        settings: More for `castwise.estimate`, such as `optimizer`.

    Raises:
        SettingsError: There is no such strategy or number of ranks.
        CastwiseError: As `estimate` and `shard` raise.
    """
    if strategy not in STRATEGIES:
        raise SettingsError(
            f"a strategy is one of {', '.join(STRATEGIES)}; got {strategy!r}"
        )
    if num_ranks < 1:
        raise SettingsError(f"an estimate needs num_ranks >= 1, got {num_ranks}")
    lifetimes, facts = foretell(model, batch, loss_fn, policy, **settings)
    bound = policy.bind(module_facts(model))
    groups = plan_groups(model, bound, units, gather)
    shares = [_Share.of(model, group, groups, num_ranks) for group in groups]
    if strategy == "fsdp":
        gloo = facts["device"] == "cpu"
        laid = _Sharded(lifetimes, shares, num_ranks, copies=gloo)
        lifetimes, exchanges = laid.lifetimes(), laid.exchanges()
    else:
        reduced = {
            name: bits_of(reduced_in(governing_fqn(name.rpartition(".")[0]), bound)) / 8
            for name, _ in model.named_parameters()
        }
        lifetimes, exchanges = _replicated(lifetimes, model, reduced, num_ranks)
    return RankEstimate(
        strategy=strategy,
        num_ranks=num_ranks,
        rank=estimate_of(lifetimes, **facts),
        exchanges=exchanges,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Share:
    """One group of weights, whole and as one rank has it."""

    fqn: str
    whole: int
    """Numbers of the group."""

    part: int
    """Numbers that a rank holds, filled up to whole rows."""

    parts: dict[str, float]
    """fqn of a module -> its share of a rank."""

    gathered: float
    """Bytes of a number as it travels before a forward."""

    reduced: float
    """Bytes of a number as its gradient travels."""

    formats: tuple[str, str, str]
    """Stored, gathered, reduced."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        group: WeightGroup,
        groups: Sequence[WeightGroup],
        num_ranks: int,
    ) -> _Share:
        fqns = {each.fqn for each in groups}
        whole: dict[str, int] = defaultdict(int)
        part: dict[str, int] = defaultdict(int)
        for name, weight in model.named_parameters():
            owner = name.rpartition(".")[0]
            if _group_of(owner, fqns) != group.fqn:
                continue
            rows = weight.shape[0] if weight.dim() else 1
            whole[owner] += weight.numel()
            part[owner] += -(-rows // num_ranks) * (weight.numel() // max(1, rows))
        held = group.formats
        return cls(
            fqn=group.fqn,
            whole=sum(whole.values()),
            part=sum(part.values()),
            parts={fqn: part[fqn] / whole[fqn] for fqn in whole if whole[fqn]},
            gathered=bits_of(held.gathered) / 8,
            reduced=bits_of(held.reduced) / 8,
            formats=(held.stored, held.gathered, held.reduced),
        )


@dataclass(frozen=True, slots=True)
class _Passage:
    """One run of a group: from the birth of its first result to that of its last."""

    share: _Share
    first: int
    last: int


class _Sharded:
    """FSDP2 laid over the lifetimes of one process."""

    def __init__(
        self,
        lifetimes: Lifetimes,
        shares: Sequence[_Share],
        num_ranks: int,
        *,
        copies: bool,
    ) -> None:
        self._before = lifetimes
        self._num_ranks = num_ranks
        self._copies = copies
        self._shares = {share.fqn: share for share in shares}
        self._turn = lifetimes.marks["backward"]
        self._done = lifetimes.marks["update"]
        self._forward = list(self._passages({"forward"}))
        self._backward = list(self._passages({"backward", "recompute"}))
        self._ends = {each.share.fqn: each.last for each in self._backward}
        self._ends[""] = self._done - 1  # the backward ends with it

    def lifetimes(self) -> Lifetimes:
        """Return the lifetimes of the fullest rank."""
        marks = {name: at * _ROOM for name, at in self._before.marks.items()}
        laid = (
            *self._scaled(),
            *self._gathered(self._forward, backward=False),
            *self._gathered(self._backward, backward=True),
            *self._reduced(),
        )
        end = max((each.died or 0 for each in laid), default=0)
        marks["end"] = max(marks["end"], end)
        return Lifetimes(allocations=laid, marks=marks)

    def exchanges(self) -> tuple[Exchange, ...]:
        """Return what a step sends."""
        others = self._num_ranks - 1
        gathered = [each.share for each in (*self._forward, *self._backward)]
        if "" in self._shares and self._shares[""].whole:
            gathered.append(self._shares[""])
        reduced = [share for share in self._shares.values() if share.whole]
        return (
            Exchange(
                kind="all_gather",
                num_messages=len(gathered),
                bytes_sent=round(sum(others * g.part * g.gathered for g in gathered)),
            ),
            Exchange(
                kind="reduce_scatter",
                num_messages=len(reduced),
                bytes_sent=round(sum(others * g.part * g.reduced for g in reduced)),
            ),
        )

    def _passages(self, stages: set[str]) -> Iterator[_Passage]:
        """Yield the runs of every group but the outermost, in order of their ends."""
        running: dict[str, _Passage] = {}
        for each in self._before.allocations:
            if each.stage not in stages:
                continue
            inside = {fqn for fqn in self._shares if fqn and _is_in(each.module, fqn)}
            for fqn in [fqn for fqn in running if fqn not in inside]:
                yield running.pop(fqn)
            for fqn in inside:
                if not self._shares[fqn].whole:
                    continue
                passage = running.get(fqn)
                first = each.born if passage is None else passage.first
                running[fqn] = _Passage(self._shares[fqn], first, each.born)
        yield from running.values()

    def _scaled(self) -> Iterator[Allocation]:
        """Yield what one process has, cut down to the part of a rank."""
        total = sum(share.whole for share in self._shares.values())
        part = sum(share.part for share in self._shares.values())
        for each in self._before.allocations:
            own = replace(
                each,
                born=each.born * _ROOM,
                died=None if each.died is None else each.died * _ROOM,
            )
            share = self._share_of(each.module)
            ratio = share.parts.get(each.module, part / total)
            if each.kind in {"weights", "storage", "states"}:
                yield replace(own, num_bytes=round(each.num_bytes * ratio))
            elif each.kind == "gradients":
                yield from self._gradient(own, share, ratio)
            elif each.stage == "update" and each.kind == "working":
                yield replace(own, num_bytes=round(each.num_bytes * part / total))
            elif each.kind != "casts" or each.format != share.formats[1]:
                yield own

    def _gradient(
        self, own: Allocation, share: _Share, ratio: float
    ) -> Iterator[Allocation]:
        """Yield a gradient: whole until its group is done, a part from then on."""
        done = max(self._ends.get(share.fqn, self._done - 1) * _ROOM, own.born) + 2
        as_gathered = share.gathered / _bytes_of(own.format)
        yield replace(
            own,
            kind="exchange",
            format=share.formats[1],
            num_bytes=round(own.num_bytes * as_gathered),
            died=done,
        )
        yield replace(own, born=done, num_bytes=round(own.num_bytes * ratio))

    def _gathered(
        self, passages: Sequence[_Passage], *, backward: bool
    ) -> Iterator[Allocation]:
        """Yield gathered weights, and messages as they come in."""
        root = self._shares.get("")
        if root is not None and not backward:
            yield self._held(root, root.whole * root.gathered, 1, self._done * _ROOM)
        starts = sorted(passage.first for passage in passages)
        for each in passages:
            size = each.share.whole * each.share.gathered
            message = self._num_ranks * each.share.part * each.share.gathered
            first, last = each.first * _ROOM, each.last * _ROOM
            yield self._held(each.share, size, first, last + 1)
            place = bisect_right(starts, each.first)
            if backward:  # it was asked for when the group before it began
                before = starts[place - 2] if place > 1 else each.first
                first, last = before * _ROOM, each.first * _ROOM
            elif place < len(starts):
                last = starts[place] * _ROOM
            if first < last:
                yield self._held(each.share, message, first, last)

    def _reduced(self) -> Iterator[Allocation]:
        """Yield gradients on their way, until those of the next group follow."""
        ends = sorted(self._ends.items(), key=lambda item: item[1])
        for place, (fqn, end) in enumerate(ends):
            share = self._shares.get(fqn)
            if share is None or not share.whole:
                continue
            following = ends[place + 1][1] if place + 1 < len(ends) else end + 1
            size = self._num_ranks * share.part * share.reduced
            died = min(max(following * _ROOM + 1, end * _ROOM + 3), self._done * _ROOM)
            message = replace(
                self._held(share, size, end * _ROOM + 1, died),
                format=share.formats[2],
                op="reduce_scatter",
                stage="backward",
            )
            yield message
            if self._copies:
                yield replace(message, born=end * _ROOM + 2, died=end * _ROOM + 3)

    def _held(self, share: _Share, size: float, born: int, died: int) -> Allocation:
        return Allocation(
            num_bytes=round(size),
            kind="exchange",
            module=share.fqn,
            format=share.formats[1],
            op="all_gather",
            stage="forward" if born <= self._turn * _ROOM else "backward",
            born=born,
            died=died,
        )

    def _share_of(self, module: str) -> _Share:
        fqn = _group_of(module, self._shares)
        return self._shares[fqn]


def _replicated(
    lifetimes: Lifetimes, model: nn.Module, reduced: dict[str, float], num_ranks: int
) -> tuple[Lifetimes, tuple[Exchange, ...]]:
    """Lay DDP over the lifetimes of one process."""
    trained = [each for each in model.named_parameters() if each[1].requires_grad]
    gradients = [each for each in lifetimes.allocations if each.kind == "gradients"]
    buckets = [
        replace(each, kind="exchange", op="", stage="before", born=0, died=None)
        for each in gradients
    ]
    sent = sum(reduced[name] * weight.numel() for name, weight in trained)
    stored = sum(each.num_bytes for each in gradients)
    cast = []
    if trained and round(sent) != stored:  # a hook casts one bucket at a time
        done = lifetimes.marks["update"]
        cast = [
            Allocation(
                num_bytes=round(min(1.0, _BUCKET / max(1, stored)) * sent),
                kind="exchange",
                module="",
                format="",
                op="cat",
                stage="backward",
                born=max(0, done - 1),
                died=done,
            )
        ]
    exchange = Exchange(
        kind="all_reduce",
        num_messages=max(1, -(-stored // _BUCKET)),
        bytes_sent=round(2 * (num_ranks - 1) / num_ranks * sent),
    )
    laid = (*lifetimes.allocations, *buckets, *cast)
    return Lifetimes(allocations=laid, marks=lifetimes.marks), (exchange,)


def _group_of(fqn: str, groups: Any) -> str:
    """Return the innermost group around a module."""
    while fqn and fqn not in groups:
        fqn = fqn.rpartition(".")[0]
    return fqn


def _is_in(fqn: str, group: str) -> bool:
    return fqn == group or fqn.startswith(f"{group}.")


def _bytes_of(fmt: str) -> float:
    return bits_of(fmt) / 8
