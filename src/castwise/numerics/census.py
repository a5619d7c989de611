"""What really ran: a census of operators by format and stage.

What was asked for is in a policy; what a region, an island or a recompute made of it is
seen only where PyTorch runs its kernels. `observe` stands there, below autocast and
autograd, while a callable runs forward, backward or a whole step:

    census = observe(lambda: step_on(batch))
    census.summary()    matrix products bf16 100.0 % of 3.02 Gflop; softmax fp32; ...

Every call with a floating input is counted under its operator, the format of its
inputs (`bf16+fp32` where they differ; tensors of no dimension do not count) and its
stage. Views compute nothing and are left out. A copy from one format to another is a
`cast`, and its format reads `fp32->bf16`. Products of fp32 tensors that the device's
switches let it round to tf32 are counted as tf32.

Kernels that `torch.compile` generated are no operators and are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

from castwise.dtypes import DTYPES
from castwise.islands.products import products_now
from castwise.policy.ops import OUTER_OPERATORS, operator_name

if TYPE_CHECKING:
    from torch._ops import OpOverload

Stage = Literal["forward", "recompute", "backward", "update"]
"""Where a call belongs; a recompute is a forward that a backward pass asked for."""

STAGES: tuple[Stage, ...] = get_args(Stage)

CAST = "cast"
"""The name under which copies from one format to another are counted."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NOTABLE = ("softmax", "log_softmax", "layer_norm", "group_norm", "native_batch_norm")
_CONVOLUTIONS = frozenset({"convolution", "convolution_backward", "_convolution"})


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatCount:
    """All calls of one operator in one format and stage."""

    op: str
    """ATen name without overload, as the operator table spells it, or `cast`."""

    format: str
    """The format of the inputs; `bf16+fp32` for several, `fp32->bf16` for a cast."""

    stage: Stage
    """Where the calls belong."""

    num_calls: int
    """How often it ran."""

    num_bytes: int
    """Bytes of all tensors read and written."""

    num_flops: int
    """Operations of matrix products and convolutions; 0 for other operators."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatCensus:
    """Which formats operators ran in, most flops and bytes first."""

    counts: tuple[FormatCount, ...]
    """One entry for every operator, format and stage that occurred."""

    def select(
        self, *, op: str | None = None, stage: Stage | None = None
    ) -> tuple[FormatCount, ...]:
        """The counts of one operator, or one stage, or both."""
        return tuple(
            count
            for count in self.counts
            if op in {None, count.op} and stage in {None, count.stage}
        )

    def formats_of(self, op: str, stage: Stage | None = None) -> tuple[str, ...]:
        """The formats in which an operator ran, most bytes first."""
        return tuple(dict.fromkeys(c.format for c in self.select(op=op, stage=stage)))

    def product_shares(self, stage: Stage | None = None) -> dict[str, float]:
        """Format -> its share of the flops of matrix products and convolutions."""
        flops: dict[str, int] = {}
        for count in self.select(stage=stage):
            if count.num_flops:
                flops[count.format] = flops.get(count.format, 0) + count.num_flops
        total = sum(flops.values())
        ordered = sorted(flops.items(), key=lambda item: -item[1])
        return {name: count / total for name, count in ordered}

    @property
    def effective(self) -> str | None:
        """The format of most flops: what the run is really computed in."""
        return next(iter(self.product_shares()), None)

    @property
    def num_casts(self) -> int:
        """Copies from one format to another."""
        return sum(count.num_calls for count in self.select(op=CAST))

    def summary(self) -> str:
        """One line for logs and reports."""
        if not self.counts:
            return "no operator was observed"
        flops = sum(count.num_flops for count in self.counts)
        shares = ", ".join(
            f"{name} {100 * share:.1f} %"
            for name, share in self.product_shares().items()
        )
        parts = [f"matrix products {shares} of {_scaled(flops)}flop" if flops else ""]
        for op in _NOTABLE:
            formats = self.formats_of(op)
            parts.append(f"{op} {', '.join(formats)}" if formats else "")
        cast_bytes = sum(count.num_bytes for count in self.select(op=CAST))
        parts.append(f"{self.num_casts} casts, {_scaled(cast_bytes)}B")
        return "; ".join(part for part in parts if part)

    def record(self) -> dict[str, Any]:
        """Plain values for JSON; `from_record` reads them."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> FormatCensus:
        """Build a census from what `record` gave."""
        return cls(counts=tuple(FormatCount(**count) for count in record["counts"]))


def observe(call: Callable[[], object]) -> FormatCensus:
    """Run a callable and count what its operators ran in.

    The callable runs as it would without: its results are the same bits.
    """
    observer = _Observer()
    before = register_optimizer_step_pre_hook(observer.enter_update)
    after = register_optimizer_step_post_hook(observer.leave_update)
    try:
        with observer:
            call()
    finally:
        before.remove()
        after.remove()
    return observer.census()


class _Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every call below autocast and autograd, on the threads that inherit it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found: dict[tuple[str, str, Stage], list[int]] = {}
        self._num_updates = 0

    def enter_update(self, *_: object) -> None:
        """An optimizer's step begins."""
        self._num_updates += 1

    def leave_update(self, *_: object) -> None:
        """An optimizer's step ends."""
        self._num_updates -= 1

    def census(self) -> FormatCensus:
        """What was counted so far."""
        counts = [
            FormatCount(
                op=op,
                format=fmt,
                stage=stage,
                num_calls=calls,
                num_bytes=num_bytes,
                num_flops=flops,
            )
            for (op, fmt, stage), (calls, num_bytes, flops) in self._found.items()
        ]
        counts.sort(key=lambda c: (-c.num_flops, -c.num_bytes, c.op, c.format, c.stage))
        return FormatCensus(counts=tuple(counts))

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not _is_view(func):
            self._count(func, args, kwargs, result)
        return result

    def _count(
        self, func: OpOverload, args: Any, kwargs: dict[str, Any], result: Any
    ) -> None:
        given = list(_floating((args, kwargs)))
        if not given:
            return
        op, fmt = _op_and_format(func, given, result)
        flops = _flops(func, args, kwargs, result) if op != CAST else 0
        if flops and fmt == "fp32":
            fmt = _product_format(op, given[0].device.type)
        made = _floating(result)
        num_bytes = sum(tensor.numel() * tensor.itemsize for tensor in (*given, *made))
        count = self._found.setdefault((op, fmt, self._stage()), [0, 0, 0])
        for index, amount in enumerate((1, num_bytes, flops)):
            count[index] += amount

    def _stage(self) -> Stage:
        if self._num_updates:
            return "update"
        if torch._C._current_graph_task_id() < 0:  # noqa: SLF001 -- no public way to ask
            return "forward"
        return "recompute" if torch.is_grad_enabled() else "backward"


def _is_view(func: OpOverload) -> bool:
    """Whether the result is an input seen otherwise, and nothing is computed."""
    returns = func._schema.returns  # noqa: SLF001 -- the schema has no public name
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _floating(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _floating(item)
    elif isinstance(value, dict):
        yield from _floating(list(value.values()))


def _op_and_format(
    func: OpOverload, given: list[torch.Tensor], result: Any
) -> tuple[str, str]:
    name = operator_name(str(func))
    if name in {"_to_copy", "copy_"}:
        source, made = given[-1].dtype, next(_floating(result), None)
        if made is not None and made.dtype != source:
            return CAST, f"{_format(source)}->{_format(made.dtype)}"
    sized = [tensor for tensor in given if tensor.dim()] or given
    formats = {tensor.dtype for tensor in sized}
    ordered = sorted(formats, key=lambda dtype: (dtype.itemsize, str(dtype)))
    return OUTER_OPERATORS.get(name, name), "+".join(map(_format, ordered))


def _format(dtype: torch.dtype) -> str:
    """The name of the format; dtypes that are none of them keep PyTorch's name."""
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


def _product_format(op: str, device_type: str) -> str:
    """What a product of fp32 tensors is rounded to first."""
    switches = products_now(device_type)
    switch = switches[op in _CONVOLUTIONS] if switches else "ieee"
    return switch if switch in {"bf16", "tf32"} else "fp32"


def _flops(func: OpOverload, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    """Operations of a matrix product; 0 for what is none."""
    packet = func.overloadpacket
    if packet in flop_counter.flop_registry:
        count = flop_counter.flop_registry[packet](*args, **kwargs, out_val=result)
        return int(count)
    name = operator_name(str(func))
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        shapes = [tensor.shape for tensor in args[:3]]
        return int(flop_counter.sdpa_flop_count(*shapes))  # type: ignore[no-untyped-call]
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        shapes = [tensor.shape for tensor in args[:4]]
        return int(flop_counter.sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]
    if name in {"mv", "dot", "vdot"}:
        return 2 * int(args[0].numel())
    if name == "addmv":
        return 2 * int(args[1].numel())
    return 0


def _scaled(amount: int) -> str:
    """Three digits and a prefix: 3_020_000_000 is `3.02 G`."""
    value, prefixes = float(amount), iter(("", "k", "M", "G", "T", "P"))
    prefix = next(prefixes)
    while value >= 1000 and prefix != "P":
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g} {prefix}"
