"""A plan is tried on fakes before anything is rewritten: does each operator take it?

The graph is walked with fake tensors in the planned formats. An operator that refuses
them, or makes another format than planned, is reported, and the planner leaves it as it
was captured. What is opaque is not tried: it gets what it was captured with.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from castwise.graph.demands import native_dtype
from castwise.graph.values import is_floating, tensors_of, value_of

if TYPE_CHECKING:
    from castwise.graph.classify import Call
    from castwise.graph.demands import Needs
    from castwise.graph.problem import Label, Problem

_TRIED = frozenset({"low", "fp32", "follows", "wide", "part"})


def find_faults(problem: Problem, labels: list[Label], needs: Needs) -> dict[str, str]:
    """Try a plan on fakes; return the names of nodes that do not take it, and why."""
    trial = _Trial(problem, labels, needs)
    mode = _fake_mode(problem)
    with torch.no_grad(), mode or contextlib.nullcontext(), _without_guards(mode):
        for node, call in problem.calls.items():
            trial.run(node, call)
    return trial.faults


def _fake_mode(problem: Problem) -> FakeTensorMode | None:
    """The mode that made the fakes of this graph."""
    values = (tensors_of(value_of(node)) for node in problem.calls)
    fakes = (t for each in values for t in each if isinstance(t, FakeTensor))
    return next((fake.fake_mode for fake in fakes), None)


def _without_guards(
    mode: FakeTensorMode | None,
) -> contextlib.AbstractContextManager[None]:
    """A question about a size that only the trial asks must not fix it in the graph."""
    sizes = None if mode is None else mode.shape_env
    return contextlib.nullcontext() if sizes is None else sizes.suppress_guards()


class _Trial:
    """Fakes of a graph in planned formats."""

    def __init__(self, problem: Problem, labels: list[Label], needs: Needs) -> None:
        self._problem = problem
        self._labels = labels
        self._wanted = {
            (user, cast.source): cast.to for cast in needs.casts for user in cast.users
        }
        self._made: dict[fx.Node, Any] = {}
        self._cast: dict[tuple[fx.Node, torch.dtype], torch.Tensor] = {}
        self.faults: dict[str, str] = {}

    def run(self, node: fx.Node, call: Call) -> None:
        """Run one node on fakes, or take the fake that it was captured with."""
        self._made[node] = value_of(node)
        if call.role not in _TRIED:
            return
        try:
            made = self._call(node)
        except Exception as error:  # noqa: BLE001 -- whatever an operator raises, it refuses
            text = str(error).strip().partition("\n")[0]
            self.faults[node.name] = f"refuses the planned formats: {text}"
            self._made[node] = self._as_planned(node)
            return
        if node in self._problem.var:
            self._made[node] = self._checked(node, made)

    def _call(self, node: fx.Node) -> Any:
        args = fx.map_arg(node.args, lambda source: self._given(node, source))
        kwargs = fx.map_arg(node.kwargs, lambda source: self._given(node, source))
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _given(self, node: fx.Node, source: fx.Node) -> Any:
        wanted = self._wanted.get((node, source))
        if wanted is None:
            return self._made[source]
        key = source, wanted
        if key not in self._cast:
            self._cast[key] = self._made[source].to(wanted)
        return self._cast[key]

    def _checked(self, node: fx.Node, made: Any) -> Any:
        """The fake in the format that the value is held in."""
        planned = native_dtype(self._problem, node, self._labels)
        for tensor in tensors_of(made):
            if is_floating(tensor) and tensor.dtype != planned:
                self.faults[node.name] = (
                    f"makes {tensor.dtype}, where {planned} was planned"
                )
                return self._as_planned(node)
        held = self._problem.dtype(node, self._labels)
        if held != planned and isinstance(made, torch.Tensor):
            return made.to(held)
        return made

    def _as_planned(self, node: fx.Node) -> Any:
        """What a node that fails was to make: its users are tried as if it had."""
        value = value_of(node)
        if node not in self._problem.var:
            return value
        held = self._problem.dtype(node, self._labels)
        return tree_map(
            lambda each: (
                each.to(held)
                if isinstance(each, torch.Tensor) and is_floating(each)
                else each
            ),
            value,
        )
