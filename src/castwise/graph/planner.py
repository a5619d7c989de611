"""Plan one captured graph: classify, find aliases, choose, try, insert.

What the trial refuses is left as captured, and the choice is made again. Bodies of
checkpoints, conditionals and custom autograd functions are planned by themselves; at
their borders, values keep the formats they were captured in. The backward of a custom
function is planned as the backward of the module that calls it. A function whose author
set its formats by `custom_fwd` keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import fx

from castwise.dtypes import format_of
from castwise.errors import PolicyError
from castwise.graph.aliases import find_aliases
from castwise.graph.classify import classify
from castwise.graph.demands import Needs, needs_of
from castwise.graph.plan import Bill, GraphPlan, PlannedCast, PlannedNode
from castwise.graph.problem import Problem
from castwise.graph.rewrite import insert_casts
from castwise.graph.solve import Solution, solve
from castwise.graph.stages import is_view
from castwise.graph.values import num_elements, requires_grad
from castwise.graph.verify import find_faults

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from castwise.graph.aliases import Aliases
    from castwise.graph.classify import Call
    from castwise.graph.problem import Label
    from castwise.graph.settings import Stage, Surroundings

_PLANNED_BODIES = frozenset({"tag_activation_checkpoint", "cond", "invoke_subgraph"})
_FUNCTION = "autograd_function_apply"
_STAGES: tuple[Stage, Stage] = ("forward", "backward")
_MOST_TRIALS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A choice that was tried and holds."""

    problem: Problem
    """What there was to choose."""

    solution: Solution
    """What was chosen."""


def plan_graph(
    module: fx.GraphModule, surroundings: Surroundings, name: str
) -> list[GraphPlan]:
    """Plan a captured graph and its bodies, and put the plans into them.

    Returns:
        The plan of the graph, and those of the bodies inside of it.
    """
    inner, left = [], {}
    for node in module.graph.nodes:
        reason = _why_left(module, node)
        if reason is not None:
            left[node.name] = reason
            continue
        for body_name, body, around in _bodies(module, node, surroundings):
            inner += plan_graph(body, around, f"{name}, {body_name}")
    planned = choose(module.graph, surroundings, left)
    problem, solution = planned.problem, planned.solution
    found = _record(problem, solution, name)
    insert_casts(module.graph, problem, solution.needs, surroundings.table)
    module.recompile()
    return [found, *inner]


def choose(
    graph: fx.Graph,
    surroundings: Surroundings,
    left: Mapping[str, str] = MappingProxyType({}),
) -> Planned:
    """Make a choice that every operator of the graph takes.

    Args:
        graph: As Dynamo captured it.
        surroundings: The policy, by module.
        left: Names of nodes whose bodies are left as captured, and why.
    """
    opaque = dict(left)
    for _ in range(_MOST_TRIALS):
        calls = classify(graph, surroundings, opaque)
        for node, call in calls.items():
            call.is_known = call.is_known and node.name not in opaque
        aliases = find_aliases(calls)
        _leave_shared_views(calls, aliases)
        problem = Problem(calls, aliases)
        solution = solve(problem)
        faults = find_faults(problem, solution.labels, solution.needs)
        if not faults:
            return Planned(problem=problem, solution=solution)
        opaque |= faults
    raise PolicyError(
        f"after {_MOST_TRIALS} trials operators still refuse the planned formats: "
        f"{', '.join(f'{node} {because}' for node, because in faults.items())}; give "
        "their module precision fp32 by a rule"
    )


def _leave_shared_views(calls: Mapping[fx.Node, Call], aliases: Aliases) -> None:
    """In fp64 islands, a view of what is written must not become a view of a cast."""
    for node, call in calls.items():
        shared = aliases.of[node] & (aliases.written | aliases.handed_out)
        if call.role == "wide" and shared and is_view(node):
            call.role, call.because = "opaque", "sees memory that stays as captured"


def _bodies(
    module: fx.GraphModule, node: fx.Node, surroundings: Surroundings
) -> Iterator[tuple[str, fx.GraphModule, Surroundings]]:
    """The graphs that a call runs, each with what surrounds it."""
    kind = _kind(node)
    if kind not in _PLANNED_BODIES and kind != _FUNCTION:
        return
    home = surroundings.module_of(node)
    for at, (name, body) in enumerate(_graphs_of(module, node)):
        stage = _STAGES[at] if kind == _FUNCTION else None
        yield name, body, surroundings.within(home, stage)


def _why_left(module: fx.GraphModule, node: fx.Node) -> str | None:
    """Why the graphs that a call runs stay as they were captured; none if planned."""
    kind, graphs = _kind(node), _graphs_of(module, node)
    if not graphs or kind in _PLANNED_BODIES:
        return None
    if kind != _FUNCTION:
        return "runs graphs of its own, which stay as they were captured"
    traces = (n.meta.get("stack_trace") or "" for n in graphs[0][1].graph.nodes)
    if any("in decorate_fwd" in trace for trace in traces):
        return "its author set its formats by custom_fwd"
    return None


def _kind(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _graphs_of(
    module: fx.GraphModule, node: fx.Node
) -> list[tuple[str, fx.GraphModule]]:
    """The graphs among the arguments of a call, in order."""
    if node.op != "call_function":
        return []
    named = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    found = [(name, getattr(module, name, None)) for name in named]
    return [(name, body) for name, body in found if isinstance(body, fx.GraphModule)]


def _record(problem: Problem, solution: Solution, name: str) -> GraphPlan:
    labels = solution.labels
    return GraphPlan(
        name=name,
        nodes=tuple(_record_nodes(problem, labels)),
        casts=tuple(_record_casts(problem, solution.needs)),
        solver=solution.solver,
        prices=solution.prices,
        autocast=_bill_of_autocast(problem),
        planned=Bill(
            num_casts=len(solution.needs.casts), num_bytes=solution.needs.num_bytes
        ),
    )


def _record_nodes(problem: Problem, labels: list[Label]) -> Iterator[PlannedNode]:
    for node, call in problem.calls.items():
        fmt = None
        because = call.because
        if node in problem.var:
            fmt = format_of(problem.dtype(node, labels))
            because = _reason(problem, node, fmt)
        yield PlannedNode(
            name=node.name,
            op=call.name,
            module=call.module,
            role=call.role,
            format=fmt,
            because=because,
            inputs=tuple(
                source.name
                for source in node.all_input_nodes
                if problem.calls[source].role != "input"
            ),
            is_known=call.is_known,
            forward=format_of(call.apart.forward) if call.apart else None,
            backward=format_of(call.apart.backward) if call.apart else None,
        )


def _reason(problem: Problem, node: fx.Node, fmt: str) -> str:
    call, pin = problem.calls[node], problem.pins[problem.var[node]]
    if call.role not in {"follows", "part"}:
        moved = "" if pin is None or pin.because == call.because else f"; {pin.because}"
        return f"{call.because}{moved}"
    if pin is not None:
        return f"{call.because}; {pin.because}"
    usual = "as under autocast"
    if (problem.autocast[node] == "low") != (fmt not in {"fp32", "fp64"}):
        usual = "otherwise than under autocast, to save casts"
    return f"{call.because}; chosen {usual}"


def _record_casts(problem: Problem, needs: Needs) -> Iterator[PlannedCast]:
    for cast in needs.casts:
        yield PlannedCast(
            value=cast.source.name,
            origin=format_of(cast.origin),
            to=format_of(cast.to),
            users=tuple(user.name for user in cast.users),
            is_weight=problem.calls[cast.source].is_parameter,
            num_bytes=cast.num_bytes,
            num_bytes_backward=cast.num_bytes_backward,
        )


def _bill_of_autocast(problem: Problem) -> Bill:
    """What autocast casts: weights once, everything else at each use."""
    labels: list[Label] = [
        pin.label if pin is not None else _first_label(problem, members)
        for members, pin in zip(problem.members, problem.pins, strict=True)
    ]
    needs = needs_of(problem, labels)
    num_casts = num_bytes = 0
    for cast in needs.casts:
        once = problem.calls[cast.source].is_parameter or not cast.users
        times = 1 if once else len(cast.users)
        num_casts += times
        num_bytes += times * (cast.num_bytes + cast.num_bytes_backward)
    for value, _ in needs.promoted:
        num_bytes += 6 * num_elements(value) * requires_grad(value)
    return Bill(num_casts=num_casts, num_bytes=num_bytes)


def _first_label(problem: Problem, members: list[fx.Node]) -> Label:
    return problem.autocast[members[0]] if members else "high"
