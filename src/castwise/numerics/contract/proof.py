"""The contract: every operator ran in the format that the policy promises, proved.

    proof = contract(model, batches, loss_fn, policy)
    proof.summary()    contract of bf16-mixed holds: 119 operators in 21 modules, ...
    proof.check()      raises ContractError and names every breach

The policy is put on the model as it is, forward and backward run under a dispatch mode,
below autocast and autograd, and the policy comes off again. Every operator is listed
with its module, stage, promised and actual formats and source line. What can be wrong
is told in `breaches`.

Of compiled code it sees the graphs that were captured, where they run as operators
(`backend="aot_eager"`). Kernels that Inductor generates are no operators; a model that
runs them has no coverage, and the contract says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from castwise.dtypes import dtype_of
from castwise.errors import ContractError
from castwise.fp8_products import CARRIER, FP8
from castwise.islands import AppliedPolicy, apply_policy, module_facts
from castwise.numerics.call_site import is_below
from castwise.numerics.census import scaled
from castwise.numerics.contract.breaches import (
    Breach,
    breach_of,
    compiled_modules,
    coverage,
    held_otherwise,
    watch_outputs,
)
from castwise.numerics.contract.promise import Promises
from castwise.numerics.contract.witness import OperatorRun, Witness
from castwise.numerics.operator_call import CAST, floating, format_name
from castwise.numerics.target import checked_batches, checked_loss
from castwise.numerics.untouched import untouched
from castwise.region import Region

if TYPE_CHECKING:
    from castwise.policy.rules import Policy

_LOW_BITS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleShare:
    """How much of a module ran low, in 16 bits or fewer, and how much high."""

    module: str | None
    """fqn of the module; none for what ran outside of the model."""

    compute: str
    """The format that the policy gives it."""

    num_low: int
    """Calls of operators that ran low."""

    num_high: int
    """Calls of operators that ran in more than 16 bits."""

    num_casts: int
    """Copies from one format to another; they are neither low nor high."""

    flops_low: int
    """Operations of products that ran low."""

    flops_high: int
    """Operations of products that ran high."""

    bytes_low: int
    """Bytes moved by operators that ran low."""

    bytes_high: int
    """Bytes moved by operators that ran high."""

    bytes_cast: int
    """Bytes moved by casts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contract:
    """What a policy promised, what ran, and whether that is the same."""

    policy: str
    """Name of the policy."""

    phase: str
    """The phase that was proved."""

    device: str
    """Where it ran."""

    operators: tuple[OperatorRun, ...]
    """Everything that was seen, in order of first appearance."""

    breaches: tuple[Breach, ...]
    """Everything that was not as promised."""

    computes: tuple[tuple[str | None, str], ...]
    """Module -> the format that the policy gives it, for those that ran operators."""

    @property
    def holds(self) -> bool:
        """Whether everything was seen, and all of it was as promised."""
        return not self.breaches

    def check(self) -> Contract:
        """Return the contract itself if it holds.

        Raises:
            ContractError: It does not; every breach is named.
        """
        if self.breaches:
            listed = "".join(f"\n  {breach}" for breach in self.breaches)
            raise ContractError(f"{self.summary()}{listed}")
        return self

    def summary(self) -> str:
        """One line for logs and reports."""
        count = sum(run.num_calls for run in self.operators)
        modules = {run.module for run in self.operators} - {None}
        seen = f"{count} operators in {len(modules)} modules"
        parts = [f"{seen}, {', '.join(_by_stage(self.operators))}" if count else seen]
        flops: Counter[str] = Counter()
        for run in self.operators:
            flops[run.actual] += run.num_flops
        total = flops.total()
        if total:
            shares = ", ".join(
                f"{fmt} {100 * amount / total:.1f} %"
                for fmt, amount in flops.most_common()
                if amount
            )
            parts.append(f"products {shares} of {scaled(total)}flop")
        emulated = [fmt for fmt in FP8 if flops[fmt]]
        if emulated:
            parts.append(f"{' and '.join(emulated)} emulated in {CARRIER}")
        in_graph = sum(run.num_calls for run in self.operators if run.in_graph)
        if in_graph:
            parts.append(f"{in_graph} of them in captured graphs")
        if self.holds:
            return f"contract of {self.policy} holds: {'; '.join(parts)}"
        kinds = Counter(breach.kind for breach in self.breaches)
        named = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
        return f"contract of {self.policy} broken: {named}; {'; '.join(parts)}"

    def select(
        self, *, module: str | None = None, stage: str | None = None
    ) -> tuple[OperatorRun, ...]:
        """The operators of a module and those below it, or of a stage, or both."""
        return tuple(
            run
            for run in self.operators
            if (module is None or is_below(run.module, module))
            and stage in {None, run.stage}
        )

    def shares(self) -> tuple[ModuleShare, ...]:
        """How much of each module's own operators ran low and high."""
        return tuple(
            _share(module, compute, [r for r in self.operators if r.module == module])
            for module, compute in self.computes
        )

    def share_of(self, module: str) -> ModuleShare:
        """How much of a module, with all below it, ran low and high."""
        compute = dict(self.computes).get(module, "")
        return _share(module, compute, list(self.select(module=module)))

    def record(self) -> dict[str, Any]:
        """Plain values for JSON; `from_record` reads them."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Contract:
        """Build a contract from what `record` gave."""
        return cls(
            policy=record["policy"],
            phase=record["phase"],
            device=record["device"],
            operators=tuple(OperatorRun(**each) for each in record["operators"]),
            breaches=tuple(Breach(**each) for each in record["breaches"]),
            computes=tuple((module, fmt) for module, fmt in record["computes"]),
        )


def contract(
    model: nn.Module,
    batches: Iterable[Sequence[Any]],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    policy: Policy,
    *,
    phase: str = "full",
) -> Contract:
    """Run forward and backward under a policy, and prove operator by operator.

    The model is unedited, and afterwards what it was: weights, buffers, gradients,
    random states. It runs in the mode, train or eval, that it is in.

    Args:
        model: Any module tree, without a policy on it; may be compiled.
        batches: Tuples of the model's inputs and, last, the target.
        loss_fn: From the model's output and the target to a scalar.
        policy: What was promised.
        phase: The phase to prove.

    Raises:
        PolicyError: The policy cannot be put on this model.
        TargetError: A batch is no tuple, or the loss no scalar with a gradient.
    """
    inner = getattr(model, "_orig_mod", model)
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    checked = checked_batches(batches, what="a contract")
    with untouched(inner, device):
        applied = apply_policy(
            inner, policy.bind(module_facts(inner)), device.type, phase=phase
        )
        try:
            region = Region.of(policy, phase, (applied,))

            def run() -> None:
                for batch in checked:
                    with region.entered(device.type):
                        loss = loss_fn(model(*batch[:-1]), batch[-1])
                        loss = checked_loss(loss, what="a contract")
                        with torch.autocast(device.type, enabled=False):
                            loss.backward()  # type: ignore[no-untyped-call]

            brought = {format_name(t.dtype) for t in floating(checked)}
            return prove(run, model, applied, brought=brought)
        finally:
            applied.remove()


def prove(
    run: Callable[[], object],
    model: nn.Module,
    applied: AppliedPolicy,
    *,
    brought: Iterable[str] = (),
) -> Contract:
    """Prove what a callable runs on a model that already has its policy.

    This is `contract` for loops and wrappers of one's own: call it on each rank, around
    a forward and backward through the wrapped model. The caller puts the region into
    force, as `run.step()` does.

    Args:
        run: Runs forward and backward, once or several times.
        model: The model that the policy is on, compiled or not.
        applied: The policy on it.
        brought: Formats of floating inputs that come from outside.
    """
    inner = getattr(model, "_orig_mod", model)
    bound, phase = applied.bound, applied.phase
    held = {format_name(t.dtype) for t in (*inner.parameters(), *inner.buffers())}
    promises = Promises(bound, phase, frozenset(brought) | held)
    witness = Witness(model, promises)
    outputs: list[Breach] = []
    compiled = [*compiled_modules(model)]
    hooks = [] if compiled else watch_outputs(applied, outputs)
    try:
        with witness:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    runs = witness.runs()
    modules = dict.fromkeys(each.module for each in runs)
    return Contract(
        policy=bound.policy.name,
        phase=phase,
        device=str(next((w.device for w in inner.parameters()), "cpu")),
        operators=runs,
        breaches=(
            *coverage(inner, runs, compiled, witness),
            *map(breach_of, (each for each in runs if each.fault)),
            *held_otherwise(inner, bound),
            *dict.fromkeys(outputs),
        ),
        computes=tuple((module, promises.compute_of(module)) for module in modules),
    )


def _share(
    module: str | None, compute: str, runs: Sequence[OperatorRun]
) -> ModuleShare:
    amounts = dict.fromkeys((each.name for each in fields(ModuleShare)[2:]), 0)
    for run in runs:
        if run.op == CAST:
            amounts["num_casts"] += run.num_calls
            amounts["bytes_cast"] += run.num_bytes
            continue
        side = "low" if _is_low(run.actual) else "high"
        amounts[f"num_{side}"] += run.num_calls
        amounts[f"flops_{side}"] += run.num_flops
        amounts[f"bytes_{side}"] += run.num_bytes
    return ModuleShare(module=module, compute=compute, **amounts)


def _is_low(actual: str) -> bool:
    """Whether the widest format among the inputs has 16 bits or fewer."""
    return all(fmt != "tf32" and _bits(fmt) <= _LOW_BITS for fmt in actual.split("+"))


def _bits(fmt: str) -> int:
    dtype = getattr(torch, fmt, None) or dtype_of(fmt)
    return int(torch.finfo(dtype).bits)


def _by_stage(runs: Sequence[OperatorRun]) -> list[str]:
    stages: Counter[str] = Counter()
    for run in runs:
        stages[run.stage] += run.num_calls
    return [f"{stage} {number}" for stage, number in stages.items()]
