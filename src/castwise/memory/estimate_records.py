"""What an estimate says: rows of bytes by kind, module and format, and the peak.

Plain frozen data. `record` gives values for JSON and `from_record` reads them, so that
others can work with an estimate that was made elsewhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from castwise.memory.lifetimes import KINDS, STANDING, Allocation, Lifetimes

_LARGEST = 24  # allocations at the peak that are listed one by one


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryRow:
    """Bytes of one kind, in one module, in one format."""

    kind: str
    """One of `castwise.memory.lifetimes.KINDS`."""

    module: str
    """fqn of the module; empty for what is outside of every module."""

    format: str
    """The format, or PyTorch's name of a dtype that is none."""

    num_bytes: int
    """Held when this kind holds most: what stands there always, gradients when the
    backward has ended, casts and saved activations when it begins, else the peak."""

    at_peak: int
    """Held at the peak of the step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """The instant of a step, or of a part of it, that holds most."""

    stage: str
    """Part of the step: forward, recompute, backward or update."""

    module: str
    """fqn of the module that was running, or whose forward was being undone."""

    op: str
    """The operator whose result filled it up; empty where a part begins fullest."""

    num_bytes: int
    """Everything held at that instant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """The memory of one training step, known before anything ran."""

    policy: str
    """Name of the policy in force, or `as it is` without one."""

    optimizer: str
    """Class of the optimizer, or `none`."""

    device: str
    """The device whose kernels were followed."""

    num_parameters: int
    """Numbers in all weights, tied ones once."""

    recompute: tuple[str, ...]
    """fqns of the modules that are run again in the backward."""

    rows: tuple[MemoryRow, ...]
    """Every kind, module and format that holds anything."""

    peak: Peak
    """The instant that holds most; its `num_bytes` is what must fit."""

    stages: tuple[Peak, ...]
    """The fullest instant of forward, backward and update each."""

    largest: tuple[Allocation, ...]
    """The largest single allocations at the peak."""

    saved_bytes: int
    """What autograd saves for the backward beyond what stands there anyway: unique
    storages, as `saved_tensors_hooks` count them."""

    notes: tuple[str, ...] = ()
    """What is not in the figures."""

    @property
    def peak_bytes(self) -> int:
        """What must fit."""
        return self.peak.num_bytes

    @property
    def standing_bytes(self) -> int:
        """What stands there between two steps, the batch included."""
        return self.num_bytes(*STANDING)

    def num_bytes(self, *kinds: str, module: str | None = None) -> int:
        """Return the bytes of some kinds (default: all), at or below a module."""
        return sum(row.num_bytes for row in self._rows(kinds, module))

    def at_peak(self, *kinds: str, module: str | None = None) -> int:
        """Return the bytes of some kinds (default: all) at the peak."""
        return sum(row.at_peak for row in self._rows(kinds, module))

    def _rows(self, kinds: tuple[str, ...], module: str | None) -> list[MemoryRow]:
        return [
            row
            for row in self.rows
            if (not kinds or row.kind in kinds)
            and (module is None or _is_below(row.module, module))
        ]

    def by_kind(self) -> dict[str, int]:
        """Return the bytes of every kind that holds any."""
        found = _summed(self.rows, lambda row: row.kind)
        return {kind: found[kind] for kind in KINDS if kind in found}

    def by_format(self, *kinds: str) -> dict[str, int]:
        """Return the bytes of some kinds (default: all) by format."""
        return _summed(self._rows(kinds, None), lambda row: row.format)

    def by_module(self, *kinds: str, depth: int | None = None) -> dict[str, int]:
        """Return the bytes of some kinds (default: all) by module.

        Args:
            kinds: Any of `KINDS`.
            depth: Deeper modules count with the one at this depth. Default: no limit.
        """

        def cut(row: MemoryRow) -> str:
            return ".".join(row.module.split(".")[:depth])

        return _summed(self._rows(kinds, None), cut)

    def summary(self) -> str:
        """One line for a log."""
        parts = ", ".join(
            f"{kind} {size / 1e6:,.1f}" for kind, size in self.by_kind().items()
        )
        peak = self.peak
        where = f"{peak.stage}, {peak.op or 'at rest'} of {peak.module or 'the step'}"
        return (
            f"{self.policy}, {self.optimizer}: peak {peak.num_bytes / 1e6:,.1f} MB in "
            f"{where}; MB: {parts}"
        )

    def record(self) -> dict[str, Any]:
        """Plain values for JSON; `from_record` reads them."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Estimate:
        """Build an estimate from what `record` gave."""
        return cls(
            **{
                **record,
                "recompute": tuple(record["recompute"]),
                "rows": tuple(MemoryRow(**each) for each in record["rows"]),
                "peak": Peak(**record["peak"]),
                "stages": tuple(Peak(**each) for each in record["stages"]),
                "largest": tuple(Allocation(**each) for each in record["largest"]),
                "notes": tuple(record["notes"]),
            }
        )


def estimate_of(lifetimes: Lifetimes, **facts: Any) -> Estimate:
    """Return what the lifetimes of a step amount to.

    Args:
        lifetimes: Of one step, marked with `backward` and `update`.
        facts: The fields of `Estimate` that lifetimes do not know.
    """
    at, _ = lifetimes.peak()
    marks = lifetimes.marks
    turn, done = marks["backward"], marks["update"]
    parts = {"forward": (0, turn), "backward": (turn, done), "update": (done, None)}
    peaks = [_peak(lifetimes, *span, stage) for stage, span in parts.items()]
    living = sorted(lifetimes.alive(at), key=lambda each: -each.num_bytes)
    return Estimate(
        rows=_rows(lifetimes, at, turn, done),
        peak=max(peaks, key=lambda peak: peak.num_bytes),
        stages=tuple(peaks),
        largest=tuple(living[:_LARGEST]),
        saved_bytes=lifetimes.saved_bytes(),
        **facts,
    )


def _peak(lifetimes: Lifetimes, first: int, last: int | None, stage: str) -> Peak:
    """Return the fullest instant of a part; its stage, or a recompute within it."""
    instant, size = lifetimes.peak(first, last)
    born = lifetimes.born_at(instant)
    if born is None or instant == first:
        return Peak(stage=stage, module="", op="", num_bytes=size)
    return Peak(stage=born.stage, module=born.module, op=born.op, num_bytes=size)


def _rows(
    lifetimes: Lifetimes, peak: int, turn: int, done: int
) -> tuple[MemoryRow, ...]:
    """Sum up by kind, module and format, at the instants that each kind is told at."""
    instant_of = dict.fromkeys(KINDS, 0) | {
        "saved": turn,
        "casts": turn,
        "gradients": done,
        "working": peak,
    }
    held: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for each in lifetimes.allocations:
        key = each.kind, each.module, each.format
        held[key][0] += each.num_bytes * each.alive(instant_of[each.kind])
        held[key][1] += each.num_bytes * each.alive(peak)
    order = {kind: place for place, kind in enumerate(KINDS)}
    return tuple(
        MemoryRow(kind=key[0], module=key[1], format=key[2], num_bytes=n, at_peak=top)
        for key, (n, top) in sorted(held.items(), key=lambda item: order[item[0][0]])
        if n or top
    )


def _summed(
    rows: Iterable[MemoryRow], key: Callable[[MemoryRow], str]
) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for row in rows:
        found[key(row)] += row.num_bytes
    return dict(found)


def _is_below(fqn: str, module: str) -> bool:
    return not module or fqn == module or fqn.startswith(f"{module}.")
