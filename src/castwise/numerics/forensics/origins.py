"""Where infinities and NaNs come from: each is followed back to its operator.

A dispatch mode looks at what every operator read and wrote. An operator that is fed
finite values and writes an infinity or NaN is an origin; one that is fed the result of
an origin hands it on. An infinity that was written as a constant (`masked_fill` with
-inf) is meant. Should an operator turn a meant infinity into NaN, as softmax does with
a row that is masked altogether, that operator is the origin.

In formats of 16 bits and fewer a product of numbers above 0 may be 0. Results to which
that happened are marked, so that a later division by them is told from one by a 0 that
stood there all along.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, Literal

import torch
from torch import nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from castwise.numerics.call_site import CallSite, CallSites, is_of_user, shown_file
from castwise.numerics.forensics.watched_call import (
    WatchedCall,
    has_nan,
    has_zero,
    is_fake,
    is_finite,
)
from castwise.numerics.operator_call import (
    CAST,
    Stage,
    address,
    format_name,
    is_view,
    stage_now,
)

Kind = Literal["overflow", "underflow", "nan"]

_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """One operator that wrote a value that is not finite."""

    order: int
    """Its place among the origins."""

    op: str
    """ATen name without overload, or `cast`."""

    site: CallSite
    """Where it, or in a backward its forward operator, was called from."""

    stage: Stage
    """Where the call belongs."""

    node: str | None
    """In a backward, what it is the backward of."""

    kind: Kind
    """Whether a wider exponent would hold it."""

    made: Literal["inf", "NaN"]
    """What stands in the result."""

    format: str
    """Format of the result."""

    inputs_finite: bool
    """Whether it was fed finite values only."""

    largest_input: float
    """Largest finite magnitude among its operands."""

    values: tuple[float, ...]
    """The operands at the first place that is not finite."""

    source: str | None
    """What held the infinity or NaN that it was fed."""

    underflow: str | None
    """Where an operand became 0."""

    meant: bool
    """Whether it is an infinity that the code wrote as a constant, or was given."""


class Origins(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches what runs, and remembers where each infinity and NaN began."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sites = CallSites(model)
        self._names = {
            address(value): f"the {kind} {name}"
            for kind, named in (
                ("buffer", model.named_buffers()),
                ("weight", model.named_parameters()),
            )
            for name, value in named
        }
        self._forward: dict[int, CallSite] = {}
        self._origins: list[Origin] = []
        self._of: dict[int, Origin] = {}
        self._flushed: dict[int, str] = {}
        self._unwritten: set[int] = set()
        self._line: str | None = None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run as compiled code; otherwise Dynamo would step aside."""
        return True

    def call(self, where: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function for a line of the user's code that called it before.

        Args:
            where: `file:line`, named for operators that no line below it called.
            func: What is called.
            args: Its arguments.
            kwargs: Its keywords.
        """
        self._line = shown_file(where)
        try:
            return func(*args, **kwargs)
        finally:
            self._line = None

    def blamed(self, results: Iterable[torch.Tensor]) -> Origin | None:
        """The first origin of what is not finite among results; none if all are."""
        bad = [each for each in results if not is_finite(each)]
        found = [
            self._of[address(each)] for each in bad if address(each) in self._of
        ] or [each for each in self._origins if bad and not each.meant]
        guilty = [each for each in found if not each.meant] or found
        first = min(guilty, key=lambda each: each.order, default=None)
        # A recompute makes again what the forward has made before.
        return next(
            (each for each in self._origins if first and _is_same(each, first)), first
        )

    def __torch_dispatch__(
        self,
        func: OpOverload | HigherOrderOperator,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator) or is_fake((args, kwargs)):
            return func(*args, **kwargs)
        call = WatchedCall.opened(func, args, kwargs, self._unwritten)
        result = func(*args, **kwargs)
        site = self._note_site()
        if not is_view(func):
            call.close(result)
            self._see(call, site)
        return result

    def _note_site(self) -> CallSite | None:
        """Find where a forward operator was called from; none in a backward."""
        if stage_now() == "backward":
            return None
        number = torch._C._autograd._get_sequence_nr() - 1  # noqa: SLF001 -- no public way to ask
        site = self._here()
        self._forward.setdefault(number, site)
        return site

    def _here(self) -> CallSite:
        site = self._sites.here()
        if self._line is None or _called_by_user():
            return site
        return replace(site, where=self._line)

    def _see(self, call: WatchedCall, site: CallSite | None) -> None:
        if call.is_unwritten:
            self._unwritten.update(map(address, call.written))
            return
        self._unwritten.difference_update(map(address, call.written))
        bad = [each for each in call.written if not is_finite(each)]
        self._mark_flushed(call, site)
        if not bad:
            return
        origin = self._inherited(call, bad) or self._new(call, bad, site)
        for each in bad:
            self._of[address(each)] = origin

    def _inherited(self, call: WatchedCall, bad: list[torch.Tensor]) -> Origin | None:
        """The origin of what the operator was fed, unless it made something worse."""
        known = [
            self._of[address(each)]
            for each in call.bad_read
            if address(each) in self._of
        ]
        guilty = [each for each in known if not each.meant]
        if guilty:
            return min(guilty, key=lambda each: each.order)
        made_nan = has_nan(bad) and not has_nan(call.bad_read)
        return known[0] if known and not made_nan else None

    def _new(
        self, call: WatchedCall, bad: list[torch.Tensor], site: CallSite | None
    ) -> Origin:
        node = None
        stage = stage_now()
        if site is None:
            node, site = self._of_backward()
        made_nan = has_nan(bad)
        kind, underflow = self._kind(call, bad)
        origin = Origin(
            order=len(self._origins),
            op=call.name,
            site=site,
            stage=stage,
            node=node,
            kind=kind,
            made="NaN" if made_nan else "inf",
            format=format_name(bad[0].dtype),
            inputs_finite=not call.bad_read,
            largest_input=call.largest_input(),
            values=call.values_at(bad[0]),
            source=self._source(call),
            underflow=underflow,
            meant=not made_nan and (bool(call.bad_read) or call.is_told_inf()),
        )
        self._origins.append(origin)
        return origin

    def _of_backward(self) -> tuple[str | None, CallSite]:
        """The node of autograd that runs, and the site of its forward operator."""
        node: Any = torch._C._current_autograd_node()  # noqa: SLF001 -- no public way to ask
        if node is None:
            return None, self._here()
        number = node._sequence_nr()  # noqa: SLF001 -- as above
        name = node.name().rstrip("0123456789").removesuffix("Backward")
        name = _HUMP.sub("_", name).lower()
        op = CAST if name == "to_copy" else name
        return op, self._forward.get(number) or self._here()

    def _source(self, call: WatchedCall) -> str | None:
        """What the first operand that is not finite is; none for another's result."""
        named = (self._names.get(address(each)) for each in call.bad_read)
        unknown = any(address(each) not in self._of for each in call.bad_read)
        return next(filter(None, named), "an input" if unknown else None)

    def _kind(
        self, call: WatchedCall, bad: list[torch.Tensor]
    ) -> tuple[Kind, str | None]:
        """Tell range from arithmetic, by another run of the operator in fp64."""
        if call.bad_read:
            return "nan", None
        wide = call.in_fp64()
        if wide is not None and all(map(is_finite, wide)):
            return "overflow", None
        flushed = (
            self._flushed.get(address(each)) for each in call.read if has_zero(each)
        )
        at = next(filter(None, flushed), None)
        if at is not None:
            return "underflow", at
        grown = not has_nan(bad) and call.grows
        undecided = wide is None and not has_nan(bad)
        return ("overflow" if grown or undecided else "nan"), None

    def _mark_flushed(self, call: WatchedCall, site: CallSite | None) -> None:
        """Mark results in which numbers above 0 became 0, or were 0 by that before."""
        for each in call.written:
            place = address(each)
            at = self._flushed.pop(place, None)
            if not has_zero(each):
                continue
            if call.flushes(each):
                site = site or self._of_backward()[1]
                at = f"{call.name} ({format_name(each.dtype)}, {site.where})"
            else:
                fed = (self._flushed.get(address(r)) for r in call.read if has_zero(r))
                at = next(filter(None, fed), at if call.read else None)
            if at is not None:
                self._flushed[place] = at


def _called_by_user() -> bool:
    """Whether a line of a user stands between an operator and `Origins.call`."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 -- the only fast way
    while frame is not None and frame.f_code is not Origins.call.__code__:
        if is_of_user(frame.f_code.co_filename):
            return True
        frame = frame.f_back
    return False


def _is_same(one: Origin, other: Origin) -> bool:
    return (one.op, one.site, one.node) == (other.op, other.site, other.node)
