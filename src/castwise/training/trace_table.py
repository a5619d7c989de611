"""A short table out of a profiler's trace: where time and bytes went, in which format.

    table = read_trace(path, num_steps=3, promise=promise_of(run))
    print(table.text())

A trace names every operator with its inputs, but not its module, and says nothing about
the backward of one. Both are found here. Around each module of the profiled steps stood
a span that bears its name (`span_of`); and an operator of the forward has the sequence
number of the node of autograd that it made, under which that node is run later.

Time is self time: what an operator took without those that it called. Bytes read are
those of its tensor inputs; bytes made are what was allocated while it ran. On a GPU the
time is that of the kernels that the operator launched.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from castwise.errors import DataError

DATA, UPDATE, OUTSIDE = "(data)", "(update)", "(outside)"
"""Names of what is in no module."""

Promise = Callable[[str, str], str | None]
"""(fqn, operator) -> the low format that the policy promises for it, or none."""

_SPAN = "castwise "
_ENGINE = "autograd::engine::evaluate_function"
_FORMATS = {
    "double": ("fp64", 8),
    "float": ("fp32", 4),
    "c10::BFloat16": ("bf16", 2),
    "c10::Half": ("fp16", 2),
    "c10::Float8_e4m3fn": ("fp8_e4m3", 1),
    "c10::Float8_e5m2": ("fp8_e5m2", 1),
    "c10::complex<float>": ("complex64", 8),
    "c10::complex<double>": ("complex128", 16),
}
_WIDE = ("fp32", "fp64")
_NO_FORMAT = "none"
_MANY = 12


def span_of(name: str) -> str:
    """Return the name of the span around a module, or around `DATA` or `UPDATE`."""
    return f"{_SPAN}{name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one module, or one format, took per step."""

    name: str
    """fqn of the module, or the format of the inputs."""

    milliseconds: float
    """Self time of its operators."""

    read_mb: float
    """Of their tensor inputs, in 10^6 bytes."""

    made_mb: float
    """Allocated while they ran, in 10^6 bytes."""

    num_ops: float
    """Operators that did the work themselves, and did not only call others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wide:
    """An operator that ran in fp32 or fp64 although the policy says low."""

    module: str
    """Where it was called."""

    op: str
    """Its ATen name."""

    format: str
    """What it ran in."""

    promised: str
    """What the policy says."""

    num_calls: float
    """Per step."""

    milliseconds: float
    """Per step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceTable:
    """The profile of a window of steps; all figures are per step."""

    num_steps: int
    """Steps of the window."""

    step_ms: float
    """From the first operator to the last one, over the number of steps."""

    data_ms: float
    """Waiting for data: inside of the spans `DATA`."""

    num_casts: float
    """Copies from one floating format to another."""

    cast_mb: float
    """Read and written by casts, in 10^6 bytes."""

    cast_ms: float
    """Their time."""

    modules: tuple[Share, ...]
    """By module, longest first."""

    formats: tuple[Share, ...]
    """By format of the inputs, longest first."""

    wide: tuple[Wide, ...] = field(default=())
    """Operators that ran wider than promised, longest first."""

    def record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def text(self) -> str:
        """A table for a terminal or a log."""
        share = self.data_ms / self.step_ms if self.step_ms else 0.0
        head = (
            f"{self.num_steps} steps, {self.step_ms:.1f} ms each; waiting for data "
            f"{self.data_ms:.2f} ms ({share:.1%}); {self.num_casts:.0f} casts, "
            f"{self.cast_mb:.1f} MB, {self.cast_ms:.2f} ms"
        )
        lines = [
            head,
            *_rows("module", self.modules),
            *_rows("format", self.formats),
        ]
        lines.append(
            f"in fp32 or fp64 although the policy says low: {len(self.wide)} operators"
        )
        lines += [
            f"  {each.op} of {each.module}: {each.format} instead of {each.promised}, "
            f"{each.num_calls:.0f} calls, {each.milliseconds:.2f} ms"
            for each in self.wide[:_MANY]
        ]
        return "\n".join(lines)


def read_trace(
    path: Path, *, num_steps: int, promise: Promise = lambda *_: None
) -> TraceTable:
    """Read the trace that `torch.profiler` exported.

    Args:
        path: The file, `.json` or `.json.gz`.
        num_steps: Steps that it holds.
        promise: What the policy promises. Default: nothing.

    Raises:
        DataError: The file is no trace.
    """
    try:
        raw = path.read_bytes()
        events = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
        found = [each for each in events["traceEvents"] if each.get("ph") in {"X", "i"}]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no trace of torch.profiler: {error}") from error
    return table_of(found, num_steps=num_steps, promise=promise)


def table_of(
    events: Sequence[Mapping[str, Any]], *, num_steps: int, promise: Promise
) -> TraceTable:
    """Return the table of the events of a trace."""
    ops = _placed(events)
    kernels = _kernel_times(events)
    by_module, by_format = _Sums(num_steps), _Sums(num_steps)
    casts, wide = _Sums(num_steps), _Sums(num_steps)
    for op in ops:
        if op.is_span:
            continue
        if kernels:
            op.self_time = kernels.get(op.external, 0.0)
        by_module.add(op.module, op)
        by_format.add(op.format if op.works else _NO_FORMAT, op)
        if op.is_cast:
            casts.add("", op)
    for op, promised in _innermost_promised(ops, promise):
        if op.format in _WIDE:
            wide.add((op.module, op.aten, op.format, promised), op)
    data = sum(op.duration for op in ops if op.name == span_of(DATA))
    cast = casts.shares(lambda _: "")
    return TraceTable(
        num_steps=num_steps,
        step_ms=_length(ops) / num_steps / 1e3,
        data_ms=data / num_steps / 1e3,
        num_casts=cast[0].num_ops if cast else 0.0,
        cast_mb=cast[0].read_mb if cast else 0.0,
        cast_ms=cast[0].milliseconds if cast else 0.0,
        modules=by_module.shares(str),
        formats=by_format.shares(str),
        wide=tuple(_wide(wide)),
    )


def _innermost_promised(
    ops: Sequence[_Op], promise: Promise
) -> Iterator[tuple[_Op, str]]:
    """Yield operators that are promised low and call none that is, with the format.

    `linear` calls `addmm`, and what it was given is cast between the two.
    """
    found = [
        (op, promised)
        for op in ops
        if not op.is_span and (promised := promise(op.module, op.aten)) is not None
    ]
    around = set()
    for op, _ in found:
        above = op.parent
        while above is not None:
            around.add(id(above))
            above = above.parent
    return ((op, promised) for op, promised in found if id(op) not in around)


class _Op:
    """One operator or span of the trace, with its place."""

    def __init__(self, event: Mapping[str, Any]) -> None:
        self.name: str = event["name"]
        self.start = float(event["ts"])
        self.duration = float(event["dur"])
        self.end = self.start + self.duration
        self.thread = event["pid"], event["tid"]
        self.is_span = event["cat"] == "user_annotation"
        args = event.get("args", {})
        self.sequence: int | None = args.get("Sequence number")
        self.external = args.get("External id")
        self._types: Sequence[str] = args.get("Input type", ())
        self._dims: Sequence[Any] = args.get("Input Dims", ())
        self.module = OUTSIDE
        self.self_time = self.duration
        self.made = 0
        self.parent: _Op | None = None
        self._own = self.duration

    def hand_over(self, duration: float) -> None:
        """Take the time of an operator that this one called off its own."""
        self.self_time -= duration
        self._own -= duration

    @property
    def works(self) -> bool:
        """Whether it does most of its work itself."""
        return self._own >= self.duration / 2

    @property
    def aten(self) -> str:
        return self.name.removeprefix("aten::")

    @property
    def is_engine(self) -> bool:
        return self.name.startswith(_ENGINE)

    @property
    def is_cast(self) -> bool:
        formats = [_FORMATS[t][0] for t in self._types[:2] if t in _FORMATS]
        return self.name == "aten::copy_" and len(set(formats)) > 1

    @property
    def format(self) -> str:
        if self.is_cast:
            to, came = (_FORMATS[t][0] for t in self._types[:2])
            return f"{came}->{to}"
        found = {_FORMATS[t][0] for t in self._types if t in _FORMATS}
        return "+".join(sorted(found)) or _NO_FORMAT

    @property
    def read(self) -> int:
        return sum(
            prod(dims) * _FORMATS[kind][1]
            for kind, dims in zip(self._types, self._dims, strict=False)
            if kind in _FORMATS and all(isinstance(dim, int) for dim in dims)
        )


def _placed(events: Sequence[Mapping[str, Any]]) -> list[_Op]:
    """Return operators and spans with their modules, self times and allocations."""
    kept = ("cpu_op", "user_annotation")
    ops = [_Op(e) for e in events if e.get("cat") in kept and "dur" in e]
    ops.sort(key=lambda op: (op.thread, op.start, -op.end))
    made = defaultdict[tuple[Any, Any], list[tuple[float, int]]](list)
    for event in events:
        if event.get("name") == "[memory]":
            size = int(event.get("args", {}).get("Bytes", 0))
            if size > 0:
                made[event["pid"], event["tid"]].append((float(event["ts"]), size))
    module_of: dict[int, str] = {}
    for again in (False, True):  # the second time with what the first one found
        for op, stack in _nested(ops):
            _place(op, stack, module_of, count=not again)
    _give_allocations(ops, made)
    return ops


def _nested(ops: Sequence[_Op]) -> Iterator[tuple[_Op, list[_Op]]]:
    """Yield each with those that it runs in, outermost first."""
    stack: list[_Op] = []
    for op in ops:
        while stack and (stack[-1].thread != op.thread or stack[-1].end <= op.start):
            stack.pop()
        yield op, stack
        stack.append(op)


def _place(
    op: _Op, stack: Sequence[_Op], module_of: dict[int, str], *, count: bool
) -> None:
    parent = stack[-1] if stack else None
    op.module = parent.module if parent is not None else OUTSIDE
    if op.is_span and op.name.startswith(_SPAN):
        op.module = op.name.removeprefix(_SPAN)
    elif op.is_engine:
        op.module = module_of.get(op.sequence or -1, OUTSIDE)
    elif op.sequence is not None and not any(each.is_engine for each in stack):
        module_of.setdefault(op.sequence, op.module)
    if count and parent is not None:
        op.parent = parent
        parent.hand_over(op.duration)


def _give_allocations(
    ops: Sequence[_Op], made: Mapping[tuple[Any, Any], list[tuple[float, int]]]
) -> None:
    """Count each allocation for the innermost operator that ran at its time."""
    by_thread = defaultdict[tuple[Any, Any], list[_Op]](list)
    for op in ops:
        if not op.is_span:
            by_thread[op.thread].append(op)
    for thread, sizes in made.items():
        running: list[_Op] = []
        waiting = iter(by_thread[thread])
        coming = next(waiting, None)
        for time, size in sorted(sizes):
            while coming is not None and coming.start <= time:
                running.append(coming)
                coming = next(waiting, None)
            while running and running[-1].end < time:
                running.pop()
            if running:
                running[-1].made += size


def _kernel_times(events: Sequence[Mapping[str, Any]]) -> dict[Any, float]:
    """External id of an operator -> time of its kernels on a GPU, in microseconds."""
    times = defaultdict[Any, float](float)
    for event in events:
        if event.get("cat") in {"kernel", "gpu_memcpy", "gpu_memset"}:
            times[event.get("args", {}).get("External id")] += float(event["dur"])
    return dict(times)


def _length(ops: Sequence[_Op]) -> float:
    if not ops:
        return 0.0
    return max(op.end for op in ops) - min(op.start for op in ops)


class _Sums:
    """Sums over operators by key, told per step."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self.by_key: dict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])

    def add(self, key: Any, op: _Op) -> None:
        sums = self.by_key[key]
        sums[0] += op.self_time
        sums[1] += op.read if op.works else 0
        sums[2] += op.made
        sums[3] += op.works

    def shares(self, name: Callable[[Any], str]) -> tuple[Share, ...]:
        """One share for each key, longest first."""
        steps = self._num_steps
        found = [
            Share(
                name=name(key),
                milliseconds=time / steps / 1e3,
                read_mb=read / steps / 1e6,
                made_mb=made / steps / 1e6,
                num_ops=num / steps,
            )
            for key, (time, read, made, num) in self.by_key.items()
        ]
        return tuple(sorted(found, key=lambda share: -share.milliseconds))


def _wide(sums: _Sums) -> list[Wide]:
    shares = zip(sums.by_key, sums.by_key.values(), strict=True)
    steps = sums._num_steps  # noqa: SLF001 -- of this room
    found = [
        Wide(
            module=module,
            op=op,
            format=fmt,
            promised=promised,
            num_calls=num / steps,
            milliseconds=time / steps / 1e3,
        )
        for (module, op, fmt, promised), (time, _, _, num) in shares
    ]
    return sorted(found, key=lambda each: -each.milliseconds)


def _rows(title: str, shares: Sequence[Share]) -> list[str]:
    total = sum(each.milliseconds for each in shares) or 1.0
    width = max([len(title), *(len(each.name or "(model)") for each in shares[:_MANY])])
    head = f"{title:<{width}}  {'ms':>8}  {'share':>6}  {'read MB':>8}  {'made MB':>8}"
    rows = [
        f"{each.name or '(model)':<{width}}  {each.milliseconds:8.2f}  "
        f"{each.milliseconds / total:6.1%}  {each.read_mb:8.1f}  {each.made_mb:8.1f}"
        for each in shares[:_MANY]
    ]
    more = len(shares) - _MANY
    return ["", head, *rows, *([f"and {more} more"] if more > 0 else [])]
