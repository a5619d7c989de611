"""The capture: one reference step, with everything that each module saw and did.

For each call of a module its inputs, the gradient of its outputs and the random state
are kept, so that it can be replayed alone. A dispatch mode counts the work of each
module's own operators, without those of the modules in it; what computes nothing itself
is no unit of the search. It also finds *decisions*: operators such as `topk` that jump
from one result to another. A decision that turns over when the weights move by no more
than rounding noise is unstable, and no error that was measured on one batch can be
trusted to hold on the next.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from castwise.numerics.operator_call import CAST, describe, floating, stage_now
from castwise.numerics.search.bench import Bench, Result
from castwise.numerics.search.structure import copied, floating_in
from castwise.numerics.search.visits import Visitor, Visits
from castwise.policy.ops import DEFAULT_TABLE

DECISIONS = frozenset(
    {
        "argmax",
        "argmin",
        "argsort",
        "bucketize",
        "ceil",
        "floor",
        "kthvalue",
        "mode",
        "multinomial",
        "round",
        "searchsorted",
        "sort",
        "topk",
        "trunc",
    }
)
"""Operators whose result jumps; comparisons are left out, since `where` may join."""


@dataclass(kw_only=True, slots=True)
class Call:
    """One call of a module: what a replay needs."""

    inputs: tuple[Any, ...]
    """Arguments and keyword arguments, copied."""

    wants: tuple[bool, ...]
    """For each floating input, whether a gradient flows back to it."""

    random_state: torch.Tensor
    """What the module drew from."""

    gradients: list[torch.Tensor | None] = field(default_factory=list)
    """For each floating output, its gradient; none where nothing arrived."""


@dataclass(kw_only=True, slots=True)
class Work:
    """What the own operators of a module do in one forward."""

    num_flops: int = 0
    """Operations of matrix products."""

    num_elements: int = 0
    """Elements of floating tensors read and written."""

    in_fp32: Counter[str] = field(default_factory=Counter)
    """Of these, those of operators that the operator table holds in fp32."""


@dataclass(kw_only=True, slots=True)
class Decision:
    """One call of an operator whose result jumps."""

    op: str
    """Its ATen name."""

    modules: tuple[str, ...]
    """The module that called it, and the one whose output it decided on."""

    result: torch.Tensor
    """What was decided."""


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts work by module and collects decisions."""

    def __init__(self, visits: Visits) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._visits = visits
        self._makers: dict[int, str] = {}
        self.work: defaultdict[str, Work] = defaultdict(Work)
        self.decisions: list[Decision] = []
        self.last = ""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        self.last = str(func)
        result = func(*args, **kwargs)
        if stage_now() == "forward" and self._visits.stack:
            self._see(func, args, kwargs, result)
        return result

    def _see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        module = self._visits.stack[-1]
        given = [*floating((args, kwargs))]
        maker = self._maker(given, module)
        for tensor in floating(result):
            self._makers[tensor.untyped_storage().data_ptr()] = maker
        call = describe(func, args, kwargs, result)
        if call is None or call.op == CAST:
            return
        if call.op in DECISIONS:
            tensors = [result] if isinstance(result, torch.Tensor) else list(result)
            whole = [each for each in tensors if not each.is_floating_point()]
            decided = (whole or tensors)[-1].detach().clone()
            modules = tuple(dict.fromkeys((module, maker)))
            self.decisions.append(Decision(op=call.op, modules=modules, result=decided))
        if not call.op.startswith(
            ("empty", "zeros", "ones", "full", "clone", "detach")
        ):
            work = self.work[module]
            work.num_flops += call.num_flops
            count = sum(tensor.numel() for tensor in (*given, *floating(result)))
            work.num_elements += count
            if DEFAULT_TABLE.category(call.op) == "fp32":
                work.in_fp32[call.op] += count

    def _maker(self, given: list[torch.Tensor], module: str) -> str:
        """The innermost module that made the numbers; own operators hand them on."""
        for tensor in given:
            maker = self._makers.get(tensor.untyped_storage().data_ptr())
            if maker is not None and maker.startswith(f"{module}." if module else ""):
                return maker
        return module


class _Recorder(Visitor):
    def __init__(self) -> None:
        self.calls: defaultdict[str, list[Call]] = defaultdict(list)
        self.inputs: dict[str, tuple[int, ...]] = {}
        self._alive: list[torch.Tensor] = []  # so that no identity is given twice

    def enters(self, fqn: str, at: int, inputs: tuple[Any, ...]) -> None:
        assert at == len(self.calls[fqn])
        tensors = floating_in(*inputs)
        if at == 0:
            self._alive += tensors
            self.inputs[fqn] = tuple(map(id, tensors))
        self.calls[fqn].append(
            Call(
                inputs=copied(*inputs),
                wants=tuple(each.requires_grad for each in tensors),
                random_state=torch.get_rng_state(),
            )
        )

    def leaves(self, fqn: str, at: int, outputs: list[torch.Tensor]) -> None:
        self.calls[fqn][at].gradients = [None] * len(outputs)

    def gradient(self, fqn: str, at: int, place: int, value: torch.Tensor) -> None:
        self.calls[fqn][at].gradients[place] = value.detach().clone()


@dataclass(frozen=True, kw_only=True, slots=True)
class Captured:
    """What one reference step was."""

    calls: dict[str, list[Call]]
    """Module -> its calls, in order."""

    work: dict[str, Work]
    """Module -> what its own operators do."""

    decisions: tuple[Decision, ...]
    """Decisions, in order."""

    result: Result
    """Output, loss and gradients."""

    inputs: dict[str, tuple[int, ...]]
    """Module -> the identities of what its first call was given."""


def capture(bench: Bench, at: int) -> Captured:
    """Run one batch in the reference format and keep what each module saw.

    Raises:
        TargetError: The model does not run in the reference format.
    """
    recorder = _Recorder()
    visits = Visits(bench.model, recorder)
    watch = Watch(visits)
    batch = bench.in_reference(bench.batches[at])
    with (
        bench.under(bench.reference) as region,
        visits.watched(),
        bench.told_where(lambda: f"{watch.last} in {visits.innermost}"),
        watch,
    ):
        result = bench.step(region, batch)
    bench.keep_reference(at, result)
    return Captured(
        calls=dict(recorder.calls),
        work=dict(watch.work),
        decisions=tuple(watch.decisions),
        result=result,
        inputs=recorder.inputs,
    )
