"""What really ran: a census of operators by format and stage.

What was asked for is in a policy; what a region, an island or a recompute made of it is
seen only where PyTorch runs its kernels. `observe` stands there, below autocast and
autograd, while a callable runs forward, backward or a whole step:

    census = observe(lambda: step_on(batch))
    census.summary()    matrix products bf16 100.0 % of 3.02 Gflop; softmax fp32; ...

Every call with a floating input is counted under its operator, the format of its
inputs (`bf16+fp32` where they differ, `fp32->bf16` for a cast) and its stage.

Kernels that `torch.compile` generated are no operators and are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from castwise.numerics.operator_call import CAST, Stage, describe, stage_now

if TYPE_CHECKING:
    from torch._ops import OpOverload

_NOTABLE = ("softmax", "log_softmax", "layer_norm", "group_norm", "native_batch_norm")


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
        parts = [f"matrix products {shares} of {scaled(flops)}flop" if flops else ""]
        for op in _NOTABLE:
            formats = self.formats_of(op)
            parts.append(f"{op} {', '.join(formats)}" if formats else "")
        cast_bytes = sum(count.num_bytes for count in self.select(op=CAST))
        parts.append(f"{self.num_casts} casts, {scaled(cast_bytes)}B")
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

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run as compiled code; otherwise Dynamo would step aside."""
        return True

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
        call = describe(func, args, kwargs, result)
        if call is not None:
            stage = stage_now(updating=self._num_updates > 0)
            count = self._found.setdefault((call.op, call.format, stage), [0, 0, 0])
            for index, amount in enumerate((1, call.num_bytes, call.num_flops)):
                count[index] += amount
        return result


def scaled(amount: int) -> str:
    """Three digits and a prefix: 3_020_000_000 is `3.02 G`."""
    value, prefixes = float(amount), iter(("", "k", "M", "G", "T", "P"))
    prefix = next(prefixes)
    while value >= 1000 and prefix != "P":
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g} {prefix}"
