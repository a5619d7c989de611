"""What breaks a contract, and how it is found.

    format      an operator ran in another format than promised
    cast        the model changes a format by hand and no rule decided that
    undecided   neither a rule nor the operator table covers an operator
    weight      a weight is held in another format than promised
    output      an island hands out another format than promised
    coverage    something ran unseen: no operator at all, a weight with a gradient from
                nowhere, a compiled module that ran no captured graph

The first three are faults of single operators; `promise` judges them while they run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from castwise.dtypes import dtype_of
from castwise.fp8_products import CARRIER, FP8, is_rounded
from castwise.islands import AppliedPolicy
from castwise.islands.crossing import tensors_in
from castwise.islands.facts import join
from castwise.islands.passage import is_second
from castwise.islands.swap import island_of
from castwise.numerics.call_site import is_below, without_wrapper
from castwise.numerics.contract.witness import OperatorRun, Witness
from castwise.numerics.operator_call import CAST, address, format_name

if TYPE_CHECKING:
    from castwise.policy.bound import BoundPolicy

BreachKind = Literal["format", "cast", "undecided", "weight", "output", "coverage"]
"""In which way a contract can be broken; see the opening docstring."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Breach:
    """One way in which the contract was broken."""

    kind: BreachKind
    """What kind of breach it is."""

    module: str | None
    """fqn of the module; none outside of the model."""

    what: str
    """Operator, weight or output, with its stage."""

    because: str
    """What was promised, by whom, and what happened."""

    where: str
    """`file:line`, or empty where no line is to blame."""

    num_calls: int = 1
    """How often it happened."""

    def __str__(self) -> str:
        line = f" at {self.where}" if self.where else ""
        times = f" ({self.num_calls} times)" if self.num_calls > 1 else ""
        return f"{_shown(self.module)}: {self.what}{line}: {self.because}{times}"


def breach_of(run: OperatorRun) -> Breach:
    """Make a breach of an operator's fault."""
    assert run.fault is not None
    kind: BreachKind = "cast" if run.op == CAST else "format"
    if run.promised == "undecided":
        kind = "undecided"
    shown = f"cast {run.actual}" if run.op == CAST else run.op
    return Breach(
        kind=kind,
        module=run.module,
        what=f"{shown} in {run.stage}",
        because=run.fault,
        where=run.where,
        num_calls=run.num_calls,
    )


def coverage(
    model: nn.Module,
    runs: Sequence[OperatorRun],
    compiled: Sequence[str],
    witness: Witness,
) -> Iterator[Breach]:
    """Find what ran unseen.

    Args:
        model: The model that the policy is on.
        runs: What was seen.
        compiled: The fqns of compiled modules.
        witness: Who saw it.
    """
    forward = [
        run for run in runs if run.stage != "backward" and run.module is not None
    ]
    if not forward:
        yield _unseen("", "no operator of the model was seen: it never ran", "forward")
    if not any(run.stage == "backward" for run in runs):
        yield _unseen(
            "", "no backward operator was seen: nothing was proved", "backward"
        )
    for fqn in compiled:
        inside = [run for run in forward if is_below(run.module, fqn)]
        if not any(run.in_graph for run in inside):
            yield _unseen(
                fqn,
                "it is compiled, but none of its operators ran in a captured graph: "
                "Dynamo skipped it, or its backend generates kernels, which cannot be "
                'seen; compile it with backend="aot_eager", fullgraph=True to prove it',
                "the compiled module",
            )
    for op, site in witness.hidden.items():
        because = "what it runs inside of itself could not be seen"
        yield replace(_unseen(site.module or "", because, op), where=site.where)
    for name, weight in model.named_parameters():
        where = address(weight)
        if weight.grad is not None and where and where not in witness.storages_read:
            yield _unseen(
                name.rpartition(".")[0],
                "it has a gradient, but no operator was seen that read it; the code "
                "that used it was compiled or hidden",
                f"weight {name!r}",
            )


def _unseen(module: str, because: str, what: str) -> Breach:
    return Breach(
        kind="coverage",
        module=without_wrapper(module),
        what=what,
        because=because,
        where="",
    )


def compiled_modules(model: nn.Module) -> Iterator[str]:
    """Yield the fqn of every module that `torch.compile` stands in front of."""
    for fqn, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:  # noqa: SLF001 -- no public way to ask
            yield without_wrapper(fqn)


def held_otherwise(model: nn.Module, bound: BoundPolicy) -> Iterator[Breach]:
    """Find weights that are held in another format than their module's `param`."""
    for fqn, module in model.named_modules():
        if "parametrizations" in fqn.split("."):
            continue
        param = bound.precision_of(fqn).param
        assert param is not None
        for name, weight in module.named_parameters(recurse=False):
            if weight.is_floating_point() and weight.dtype is not dtype_of(param):
                yield Breach(
                    kind="weight",
                    module=fqn,
                    what=f"weight {join(fqn, name)!r}",
                    because=f"promised to be held in {param}, but is held in "
                    f"{format_name(weight.dtype)}",
                    where="",
                )


def watch_outputs(applied: AppliedPolicy, found: list[Breach]) -> list[Any]:
    """Look at what islands hand out; return the hooks to take away again."""
    return [
        module.register_forward_hook(_OutputWatch(applied, fqn, found))
        for fqn, module in applied.islands.items()
        if (island := island_of(module)) is not None
        and (border := island.borders[applied.phase]) is not None
        and not border.is_inner
    ]


class _OutputWatch:
    """A forward hook that compares the outputs of one island with the policy."""

    def __init__(self, applied: AppliedPolicy, fqn: str, found: list[Breach]) -> None:
        output = applied.bound.precision_of(fqn, phase=applied.phase).output
        assert output is not None
        self._fqn, self._found, self._output = fqn, found, output
        # A low region multiplies no fp64, so there it is handed over in fp32.
        narrowed = {"fp64": ("fp64", "fp32"), "tf32": ("fp32",)}
        self._allowed = narrowed.get(output, (output,))
        self._is_emulated = output in FP8

    def __call__(self, _module: nn.Module, _args: Any, outputs: Any) -> None:
        if is_second():  # what it hands out then, its surroundings differentiate
            return
        for tensor in tensors_in(outputs):
            fmt = format_name(tensor.dtype)
            if self._is_emulated and fmt == CARRIER:
                fmt = self._output if is_rounded(tensor, self._output) else fmt
            if tensor.is_floating_point() and fmt not in self._allowed:
                self._found.append(
                    Breach(
                        kind="output",
                        module=self._fqn,
                        what="output",
                        because=f"promised in {self._output}, but handed out in {fmt}",
                        where="",
                    )
                )


def _shown(module: str | None) -> str:
    if module is None:
        return "outside of the model"
    return module or "the model itself"
