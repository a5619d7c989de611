"""Put a plan into a graph: insert its casts, and nothing else.

A cast is a call of `.to(dtype)`. Shared casts stand right behind what they cast, casts
from written memory right before their use, casts at the maker take its place for all.
Makers of tensors after the shape of another get the captured dtype by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten

from castwise.dtypes import format_of
from castwise.graph.apart import apart
from castwise.graph.regions import in_format_of_inputs, in_region
from castwise.graph.values import is_floating, is_planned, tensors_of, value_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from castwise.graph.aliases import Aliases
    from castwise.graph.classify import Call
    from castwise.graph.demands import Cast, Needs
    from castwise.graph.problem import Problem
    from castwise.policy.ops import OperatorTable

_KEPT_META = ("nn_module_stack", "source_fn_stack")


def insert_casts(
    graph: fx.Graph, problem: Problem, needs: Needs, table: OperatorTable
) -> None:
    """Insert the casts of a plan into its graph, in place."""
    for node, call in problem.calls.items():
        if call.role == "like":
            _name_dtype(node)
        elif call.apart is not None:
            _take_apart(node, call, problem.aliases, table)
        elif call.in_region:
            _put_in_region(node, call, table)
    last_input = _last_input(graph)
    stand_ins: dict[fx.Node, fx.Node] = {}
    for cast in needs.casts:
        if not cast.users:
            stand_ins[cast.source] = _insert_at_maker(graph, cast)
    for cast in needs.casts:
        if cast.users:
            source = stand_ins.get(cast.source, cast.source)
            _insert_at_use(graph, cast, source, last_input)
    graph.lint()


def _insert_at_maker(graph: fx.Graph, cast: Cast) -> fx.Node:
    with graph.inserting_after(cast.source):
        made = _cast_node(graph, cast.source, cast)
    cast.source.replace_all_uses_with(
        made, delete_user_cb=lambda user: user is not made
    )
    return made


def _insert_at_use(
    graph: fx.Graph, cast: Cast, source: fx.Node, last_input: fx.Node | None
) -> None:
    if cast.at_use:
        place = graph.inserting_before(cast.users[0])
    elif cast.source.op == "placeholder" and last_input is not None:
        place = graph.inserting_after(last_input)
    else:
        place = graph.inserting_after(source)
    with place:
        made = _cast_node(graph, source, cast)
    for user in cast.users:
        user.replace_input_with(source, made)


def _cast_node(graph: fx.Graph, source: fx.Node, cast: Cast) -> fx.Node:
    made = graph.call_method("to", (source, cast.to))
    made.meta["castwise_cast"] = True
    teller = cast.users[0] if cast.users else cast.source
    for key in _KEPT_META:
        if key in teller.meta:
            made.meta[key] = teller.meta[key]
    value = value_of(cast.source)
    if isinstance(value, torch.Tensor):
        with torch.no_grad():
            made.meta["example_value"] = value.to(cast.to)
    return made


def _last_input(graph: fx.Graph) -> fx.Node | None:
    last = None
    for node in graph.nodes:
        if node.op == "placeholder":
            last = node
    return last


def _put_in_region(node: fx.Node, call: Call, table: OperatorTable) -> None:
    device = next(t.device.type for t in tensors_of(value_of(node)))
    assert callable(node.target)
    assert call.low is not None
    node.target = in_region(node.target, device, format_of(call.low), table)


def _take_apart(
    node: fx.Node, call: Call, aliases: Aliases, table: OperatorTable
) -> None:
    """Give a call the function whose stages have formats of their own."""
    assert call.apart is not None
    function = node.target
    if node.op == "call_method":
        function, node.op = _called(str(function)), "call_function"
    assert callable(function)
    if call.in_region:
        device = next(t.device.type for t in tensors_of(value_of(node)))
        function = in_format_of_inputs(function, device, table)
    leaves, _ = tree_flatten((node.args, node.kwargs))
    nodes = {at: leaf for at, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)}
    kept = frozenset(at for at, leaf in nodes.items() if leaf in call.kept)
    written = frozenset(at for at, leaf in nodes.items() if aliases.casts_at_use(leaf))
    node.target = apart(function, call.apart, kept=kept, written=written)


def _called(name: str) -> Callable[..., Any]:
    """A method as a function."""

    def call(first: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(first, name)(*args, **kwargs)

    call.__name__ = name
    return call


def _name_dtype(node: fx.Node) -> None:
    """Give a maker after the shape of another the dtype that it was captured with."""
    given = (*node.args[1:], *node.kwargs.values())
    if not is_planned(node) or any(isinstance(each, torch.dtype) for each in given):
        return
    dtypes = [t.dtype for t in tensors_of(value_of(node)) if is_floating(t)]
    node.kwargs = {**node.kwargs, "dtype": dtypes[0]}
