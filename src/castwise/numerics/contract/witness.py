"""The witness of a run: every operator beside what it was promised.

It stands where the census stands, and asks each call where it came from. A backward
operator has no source line of its own. It runs for a node of autograd, which carries
the number it got in the forward, and under that number the forward's site and promise
were kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import FunctionCtx
from torch.utils._python_dispatch import TorchDispatchMode

from castwise.dtypes import dtype_of
from castwise.fp8_products import CARRIER, GRADIENT, is_rounded, multiplied
from castwise.islands.passage import is_second, number_around, number_now
from castwise.numerics.call_site import CallSite, CallSites
from castwise.numerics.contract.promise import Promise, Promises
from castwise.numerics.contract.transport import is_transport
from castwise.numerics.operator_call import (
    CAST,
    OperatorCall,
    Stage,
    address,
    describe,
    stage_now,
)

if TYPE_CHECKING:
    from torch._ops import OpOverload

_SUM = "add"  # how the engine of autograd adds up gradients

# A recompute that keeps the random state calls an operator through one of these; it
# stands among their arguments, the other arguments follow.
_OPERATOR_AT = {"run_and_save_rng_state": 0, "run_with_rng_state": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorRun:
    """All calls of one operator from one line, in one stage and format."""

    op: str
    """ATen name without overload, as the operator table spells it, or `cast`."""

    module: str | None
    """fqn of the module that called it; none outside of the model, as in the loss."""

    stage: Stage
    """Where the calls belong."""

    promised: str
    """A format, or `widest` (one for all inputs), `as_is` or `undecided`."""

    actual: str
    """What it ran in: `bf16`, `bf16+fp32`, or `fp32->bf16` for a cast."""

    where: str
    """`file:line` of the source; in a backward, that of the forward operator."""

    fault: str | None
    """In which way the promise was broken; none where it was kept."""

    in_graph: bool
    """Whether it was part of a graph that `torch.compile` captured."""

    num_calls: int
    """How often it ran."""

    num_flops: int
    """Operations of matrix products and convolutions; 0 for other operators."""

    num_bytes: int
    """Bytes of all floating tensors read and written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Origin:
    """What is kept of a forward call for the backward that belongs to it."""

    site: CallSite
    derivative: Promise
    is_copy: bool
    """Whether it was a cast or a view, whose backward adds nothing up."""


class Witness(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every call below autocast and autograd, and judges it."""

    def __init__(self, model: nn.Module, promises: Promises) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sites = CallSites(model)
        self._promises = promises
        # by the passage and the node's number, which begins anew in each thread
        self._origins: dict[tuple[int, int], _Origin] = {}
        self._found: dict[tuple[Any, ...], list[int]] = {}
        self._operands: list[Any] = []  # of the call that is being seen
        self.storages_read: set[int] = set()
        """Addresses of what forward operators read."""
        self.hidden: dict[str, CallSite] = {}
        """Operators that run others inside of themselves, unseen, and from where."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run as compiled code; otherwise Dynamo would step aside."""
        return True

    def runs(self) -> tuple[OperatorRun, ...]:
        """What was seen so far, in order of first appearance."""
        return tuple(
            OperatorRun(
                op=op,
                module=module,
                stage=stage,
                promised=promised,
                actual=actual,
                where=where,
                fault=fault,
                in_graph=in_graph,
                num_calls=amounts[0],
                num_flops=amounts[1],
                num_bytes=amounts[2],
            )
            for (
                (op, module, stage, promised, actual, where, fault, in_graph),
                amounts,
            ) in self._found.items()
        )

    def __torch_dispatch__(
        self,
        func: OpOverload | HigherOrderOperator,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not is_transport():
            self._see(func, args, kwargs, result)
        return result

    def _see(
        self,
        func: OpOverload | HigherOrderOperator,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        if isinstance(func, HigherOrderOperator):
            at = _OPERATOR_AT.get(func._name)  # noqa: SLF001 -- no public name
            if at is None:
                self.hidden[func._name] = self._sites.here()  # noqa: SLF001 -- as above
                return
            result = result[-1] if at == 0 else result
            called, args = args[at], args[at + 1 :]
        else:
            called = func
        tensors = list(_tensors((args, kwargs)))
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return  # a graph is being captured, nothing runs
        call = describe(called, args, kwargs, result)
        self._operands = [
            args[at] for at in multiplied(called).values() if at < len(args)
        ]
        stage = stage_now()
        if stage == "backward":
            if call is not None:
                self._see_backward(call)
        else:
            self._see_forward(called, call, stage, tensors)

    def _see_forward(
        self,
        func: OpOverload,
        call: OperatorCall | None,
        stage: Stage,
        tensors: list[torch.Tensor],
    ) -> None:
        self.storages_read.update(filter(None, map(address, tensors)))
        number = (number_now(), torch._C._autograd._get_sequence_nr() - 1)  # noqa: SLF001 -- no public way to ask
        if call is None and number in self._origins:
            return
        site = self._sites.here()
        if site.module is None and is_second():
            site = self._of_one_operator(site)
        # A view is nobody's product; its backward is judged like one that stays as is.
        seen = call or OperatorCall(op=CAST, formats=(), num_bytes=0, num_flops=0)
        if site.traced_in == "backward":
            if call is not None:
                promise = self._promises.graph_backward(call, site)
                self._record(call, site, promise, "backward")
            return
        in_place = func._schema.is_mutable and call is not None  # noqa: SLF001 -- the schema has no public name
        promise = self._promises.forward(
            seen,
            site,
            in_place=in_place,
            stage="backward" if is_second() else "forward",
        )
        derivative = self._promises.of_derivative(seen, site, in_place=in_place)
        self._origins.setdefault(
            number,
            _Origin(site=site, derivative=derivative, is_copy=seen.op == CAST),
        )
        if call is not None:
            self._record(call, site, promise, stage)

    def _of_one_operator(self, site: CallSite) -> CallSite:
        """The forward's site, where a plan runs one operator again for its backward."""
        node = torch._C._current_autograd_node()  # noqa: SLF001 -- no public way to ask
        if not isinstance(node, FunctionCtx):
            return site
        origin = self._origins.get((number_around(), node._sequence_nr()))  # noqa: SLF001 -- as above
        return site if origin is None else origin.site

    def _see_backward(self, call: OperatorCall) -> None:
        node = torch._C._current_autograd_node()  # noqa: SLF001 -- no public way to ask
        origin = None
        if node is not None:
            origin = self._origins.get((number_now(), node._sequence_nr()))  # noqa: SLF001 -- as above
        if isinstance(node, FunctionCtx):
            outer = None if origin is None else origin.site.graph_of
            site = self._sites.here(graph_of=outer)
            if site.module is None and origin is not None:
                site = replace(site, module=origin.site.module)
            self._record_in_function(call, site)
        elif origin is not None and origin.is_copy and call.op == _SUM:
            # The engine adds up gradients while the node of one of them is current.
            self._record(call, origin.site, self._promises.engine(), "backward")
        elif origin is not None:
            self._record(call, origin.site, origin.derivative, "backward")
        else:
            site = self._sites.here()
            self._record(call, site, self._promises.engine(), "backward")

    def _record_in_function(self, call: OperatorCall, site: CallSite) -> None:
        """Judge a call in the backward of a custom function, or of a captured graph."""
        if site.graph_of is None:
            promise = self._promises.custom_backward(call, site)
        elif site.traced_in == "forward":
            promise = self._promises.forward(call, site, in_place=False)
            self._record(call, site, promise, "recompute")
            return
        else:
            promise = self._promises.graph_backward(call, site)
        self._record(call, site, promise, "backward")

    def _record(
        self, call: OperatorCall, site: CallSite, promise: Promise, stage: Stage
    ) -> None:
        if promise.kind == "fp8" and call.num_flops:
            meant = (promise.format, *((GRADIENT,) if stage == "backward" else ()))
            call = _by_numbers(call, self._operands, meant[::-1])
        # The casts of a backward are those of the forward turned round.
        fault = None
        if stage != "backward" or call.op != CAST:
            fault = self._promises.fault(call, site, promise)
        key = (
            call.op,
            site.module,
            stage,
            promise.format,
            call.format,
            site.where,
            fault,
            site.graph_of is not None,
        )
        amounts = self._found.setdefault(key, [0, 0, 0])
        for index, amount in enumerate((1, call.num_flops, call.num_bytes)):
            amounts[index] += amount


def _by_numbers(
    call: OperatorCall, operands: list[Any], formats: tuple[str, ...]
) -> OperatorCall:
    """A product of numbers in fp8, if it is one: emulated, so held in bf16."""
    found: dict[str, None] = {}
    for tensor in _tensors(operands):
        kind = next((fmt for fmt in formats if is_rounded(tensor, fmt)), None)
        if kind is None or tensor.dtype is not dtype_of(CARRIER):
            return call
        found[kind] = None
    return replace(call, formats=tuple(found))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
