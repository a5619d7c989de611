"""What each node of a captured graph is to the planner: its role, and why.

    low      runs in the low format of its module, by the operator table
    fp32     runs in fp32, by the operator table
    follows  has the format of its inputs: here the planner chooses
    wide     runs in fp64, in an island of fp64
    decides  answers by comparing: sees what autocast would have given it
    like     takes a shape, and the captured dtype by name
    reads    takes a shape only
    part     takes one tensor out of several that one call made
    apart    runs in one format forward and in another one backward, by a stage rule
    opaque   runs in the formats it was captured in: unknown operators, casts by hand,
             autocast regions of the user, modules in fp32
    input, output

Nothing is guessed. Whatever does not fit a role for certain is opaque, and says why.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx

from castwise.dtypes import dtype_of
from castwise.graph import operators
from castwise.graph.stages import check_repeatable, formats_apart, held_in, is_view
from castwise.graph.values import (
    has_dimensions,
    is_floating,
    is_foreign,
    is_planned,
    tensors_of,
    value_of,
)
from castwise.islands.border import LOW

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from castwise.graph.settings import Surroundings
    from castwise.graph.stages import Apart

PARAMETER = "castwise_parameter"
"""The mark that `capture` leaves on inputs that are weights of the model."""

Role = Literal[
    "input",
    "output",
    "low",
    "fp32",
    "follows",
    "wide",
    "decides",
    "like",
    "reads",
    "part",
    "apart",
    "opaque",
]
"""See the opening docstring."""


@dataclass(slots=True)
class Call:
    """One node, classified."""

    node: fx.Node
    """The node itself."""

    name: str
    """Its operator, as the table spells it; the name of an input or output."""

    role: Role
    """What it is to the planner."""

    because: str
    """Why it has this role, in words for people."""

    module: str = ""
    """fqn of the module that called it; the root is the empty text."""

    low: torch.dtype | None = None
    """The low dtype of its module, if that computes low."""

    promotes: bool = False
    """Whether inputs of several formats may meet here."""

    moves: bool = False
    """Whether it commutes with rounding."""

    writes: bool = False
    """Whether it writes to its first argument."""

    mode: int = 0
    """Which grad mode it runs in; casts are shared within one only."""

    kept: set[fx.Node] = field(default_factory=set)
    """Inputs that stay in fp32."""

    in_region: bool = False
    """Whether it runs in a region of autocast, as it calls several operators."""

    apart: Apart | None = None
    """What its stages run in, where they differ."""

    is_parameter: bool = False
    """Whether it is a weight that comes in."""

    is_known: bool = True
    """Whether the planner knows the operator, or leaves it alone unknown."""


@dataclass(slots=True)
class _Regions:
    """Where in the graph a node stands: what was entered before it."""

    mode: int = 0
    num_autocast: int = 0
    num_transforms: int = 0

    def pass_by(self, name: str, node: fx.Node) -> bool:
        """Note what a node enters or leaves; returns whether it does either."""
        if name == "_enter_autocast":
            self.num_autocast += 1
        elif name == "_exit_autocast":
            self.num_autocast -= 1
        elif name in _GRAD_MODES:
            self.mode = _GRAD_MODES[name] + int(node.args[:1] == (True,))
        elif name in _TRANSFORMS:
            self.num_transforms += 1 if "increment" in name else -1
        else:
            return False
        return True


# Setting a mode by value gives 2 or 3; entering or leaving inference mode 4 to 7.
_GRAD_MODES = {
    "_set_grad_enabled": 2,
    "set_grad_enabled": 2,
    "_enter_inference_mode": 4,
    "_exit_inference_mode": 6,
}
_TRANSFORMS = frozenset(
    f"_{kind}_{change}_nesting"
    for kind in ("vmap", "grad", "jvp", "func")
    for change in ("increment", "decrement")
)


def classify(
    graph: fx.Graph,
    surroundings: Surroundings,
    opaque: Mapping[str, str] | None = None,
) -> dict[fx.Node, Call]:
    """Classify every node of a graph.

    Args:
        graph: As Dynamo captured it.
        surroundings: The policy, by module.
        opaque: Names of nodes that were found not to run otherwise, and why.
    """
    regions, found = _Regions(mode=2 + int(torch.is_grad_enabled())), {}
    for node in graph.nodes:
        call = _call_of(node, surroundings)
        if call.role not in {"input", "output"}:
            marks = regions.pass_by(call.name, node)
            reason = None if marks else _why_opaque(call, regions, opaque or {})
            if reason is None and not marks:
                _assign(call, surroundings)
            else:
                call.because = reason or "changes the mode of what follows"
        call.mode = regions.mode
        found[node] = call
    return found


def _call_of(node: fx.Node, surroundings: Surroundings) -> Call:
    if node.op in {"placeholder", "get_attr"}:
        module = surroundings.module_of(node)
        call = Call(node, node.name, "input", "comes in as it is held", module)
        call.is_parameter = bool(node.meta.get(PARAMETER))
        return call
    if node.op == "output":
        return Call(node, "output", "output", "goes out as it was captured")
    name = operators.name_of(node)
    call = Call(node, name, "opaque", "", surroundings.module_of(node))
    call.writes = operators.writes_first(node)
    compute = surroundings.compute(call.module)
    call.low = dtype_of(compute) if compute in LOW else None
    return call


def _why_opaque(call: Call, regions: _Regions, opaque: Mapping[str, str]) -> str | None:
    """The first reason to leave a node as it was captured, if there is one."""
    node = call.node
    is_like = call.name in operators.LIKE
    tests: tuple[tuple[Callable[[], bool], str], ...] = (
        (lambda: node.op == "call_module", "is a module that was not captured"),
        (lambda: operators.is_higher_order(node), "runs graphs of its own"),
        (lambda: regions.num_autocast > 0, "is in an autocast region of the model"),
        (lambda: regions.num_transforms > 0, "is in a transform of torch.func"),
        (lambda: "out" in node.kwargs, "writes to out="),
        (lambda: call.name in operators.CASTS, "is a cast of the model's own"),
        (lambda: _names_dtype(node) and not is_like, "names its dtype"),
        (lambda: is_foreign(node) and not is_like, "makes values that are not fp32"),
        (lambda: _takes_foreign(node), "takes values that are not fp32"),
        (lambda: _is_taken_whole(node), "makes several values that are taken together"),
    )
    if node.name in opaque:
        return opaque[node.name]
    return next((because for test, because in tests if test()), None)


def _takes_foreign(node: fx.Node) -> bool:
    return any(map(is_foreign, node.all_input_nodes))


def _is_taken_whole(node: fx.Node) -> bool:
    """Whether a tuple of values goes anywhere but to pieces; no cast could follow."""
    if isinstance(value_of(node), torch.Tensor) or not is_planned(node):
        return False
    return any(operators.name_of(user) != "getitem" for user in node.users)


def _names_dtype(node: fx.Node) -> bool:
    given = (*node.args, *node.kwargs.values())
    return any(
        isinstance(each, torch.dtype) and each.is_floating_point for each in given
    )


def _assign(call: Call, surroundings: Surroundings) -> None:
    """Give a node that is not opaque for its place or its formats its role."""
    node, name = call.node, call.name
    if name == "getitem" and not isinstance(value_of(_first(node)), torch.Tensor):
        call.role, call.because = "part", "is one of what its maker made"
    elif name in operators.LIKE:
        call.role, call.because = "like", "has the captured dtype by name"
    elif not is_planned(node) and not call.writes:
        _assign_without_result(call)
    elif surroundings.compute(call.module) != surroundings.backward(call.module):
        _assign_apart(call, surroundings)
    elif surroundings.compute(call.module) == "fp64":
        _assign_wide(call, surroundings)
    elif call.low is None:
        call.because = surroundings.reason(call.module)
    else:
        _assign_by_table(call, surroundings)


def _assign_without_result(call: Call) -> None:
    """A node that makes no planned value: a decision, a shape, or neither."""
    takes = any(map(is_planned, call.node.all_input_nodes))
    if call.name in operators.DECIDES:
        call.role, call.because = "decides", "a rounded input may turn its answer"
    elif call.name in operators.READS | operators.AFTER_SHAPE or not takes:
        call.role, call.because = "reads", "reads no number"
    else:
        call.because, call.is_known = _UNKNOWN, False


def _assign_wide(call: Call, surroundings: Surroundings) -> None:
    known = surroundings.table.entry(call.name) or call.name in operators.FOLLOWS
    if call.writes or call.name in operators.STATISTICS or not known:
        call.because = "stays in fp32 in an island of fp64: it keeps what it is given"
        return
    call.role, call.because = "wide", surroundings.reason(call.module)


def _assign_apart(call: Call, surroundings: Surroundings) -> None:
    """A node of a module whose backward computes in another format."""
    backward = surroundings.backward(call.module)
    if held_in(backward) == "fp64":
        _assign_wide(call, surroundings)
    else:
        call.because = surroundings.reason(call.module)
    if call.writes or is_view(call.node) or call.name in operators.STATISTICS:
        return
    category = surroundings.table.category(call.name)
    if call.name in operators.COMPOSITES:
        category, call.in_region = "low", True
    formats = formats_apart(category, surroundings.compute(call.module), backward)
    if formats is None or (call.role == "opaque" and category == "as_is"):
        return
    check_repeatable(call.node, call.name, call.module)
    call.apart, call.kept = formats, operators.kept_inputs(call.node, call.name)
    call.role = "apart" if call.role == "opaque" else call.role
    call.because = (
        f"runs in {formats}: {surroundings.reason(call.module)}; "
        f"backward {surroundings.reason_backward(call.module)}"
    )


def _assign_by_table(call: Call, surroundings: Surroundings) -> None:
    name, table = call.name, surroundings.table
    category = table.category(name)
    if call.writes:
        _assign_written(call)
        return
    call.kept = operators.kept_inputs(call.node, name)
    if name in operators.COMPOSITES:
        call.in_region, call.because = True, "calls several operators, under autocast"
        return
    if category in {"low", "fp32"}:
        call.role = "low" if category == "low" else "fp32"
        call.because = table.explain(name)
    elif name in operators.FOLLOWS and not _is_special(call):
        call.role = "follows"
        call.promotes = name in operators.PROMOTES and has_dimensions(call.node)
        call.moves = name in operators.MOVES and not _gathers(call.node)
        call.because = "has the format of its inputs"
        if _has_wild_number(call.node, call.low):
            call.role = "opaque"
            call.because = "a number in it does not exist in the low format"
    else:
        call.because, call.is_known = _UNKNOWN, False


def _assign_written(call: Call) -> None:
    first = call.node.args[0] if call.node.args else None
    if not isinstance(first, fx.Node) or not is_planned(first):
        call.because = "writes to what is not fp32"
    elif call.name in operators.IN_PLACE and not _has_wild_number(call.node, call.low):
        call.role, call.because = "follows", "writes in the format of what it writes to"
    else:
        call.because = "writes, and is not known to do so in a low format"
        call.is_known = call.name in operators.IN_PLACE


_UNKNOWN = "is unknown to the planner, and runs as it was captured"


def _is_special(call: Call) -> bool:
    """Forms of known operators that are not what their name says."""
    if call.name == "pad":
        mode = call.node.kwargs.get("mode", _at(call.node, 2))
        return mode not in {None, "constant"}
    return False


def _gathers(node: fx.Node) -> bool:
    """Whether a getitem picks by numbers in a tensor, whose backward adds up."""
    return (
        node.target is not None
        and any(
            isinstance(value_of(each), torch.Tensor)
            for each in node.all_input_nodes[1:]
        )
        and operators.name_of(node) == "getitem"
    )


def _has_wild_number(node: fx.Node, low: torch.dtype | None) -> bool:
    """Whether a plain number in a call overflows or vanishes in the low format."""
    info = torch.finfo(low or torch.bfloat16)
    if operators.name_of(node) in operators.MOVES:
        return False  # its numbers are sizes and places
    return any(
        abs(number) != float("inf")
        and (abs(number) > info.max or 0 < abs(number) < info.smallest_normal)
        for number in _numbers((node.args, node.kwargs))
    )


def _numbers(value: Any) -> Iterable[float]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, dict):
        yield from _numbers(list(value.values()))


def _first(node: fx.Node) -> fx.Node:
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def _at(node: fx.Node, position: int) -> Any:
    return node.args[position] if position < len(node.args) else None


def takes_floats(node: fx.Node) -> bool:
    """Whether a value has any floating tensor in it."""
    return any(map(is_floating, tensors_of(value_of(node))))
