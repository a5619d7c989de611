"""What captured graphs keep for their backward, stored in 16 or 8 bits.

Ahead of time a training step is cut in two: a forward graph that hands out what the
backward graph takes in. Here the cut is made first, by whatever makes it, and then each
value that crosses it is narrowed on the one side and widened on the other:

    forward    h -> h, low, powers          backward    low, powers -> h

Both are plain operators of the graphs, so a compiler fuses them with what makes the
value and with what reads it, and no pass over memory is added. What is computed in is
not touched: this is the format of storage alone.

Values that share memory by way of views are stored once, and viewed again in the
backward. Left alone are weights, inputs and casts of them, which somebody holds anyway;
what the model returns; few numbers on which many depend, as those of a norm; and what
the backward takes the exponential of, which turns relative errors into absolute ones.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from castwise.memory import row_formats
from castwise.memory.row_formats import row_format
from castwise.memory.saves import SavesBill

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

Graphs = tuple[fx.GraphModule, fx.GraphModule]
"""The forward graph and the backward graph of a training step."""

_SMALL = 4096  # bytes below which nothing is worth a kernel
_MUCH_SMALLER = 32  # a statistic of a value that is that much larger
_TAKES = {
    "fp16": frozenset({torch.float32}),
    "bf16": frozenset({torch.float32}),
    "int8": frozenset({torch.float32, torch.bfloat16, torch.float16}),
}
_CASTS = {
    torch.ops.prims.convert_element_type.default,
    torch.ops.aten._to_copy.default,  # noqa: SLF001 -- its name
}
_EXPONENTIALS = {
    torch.ops.aten.exp.default,
    torch.ops.aten._log_softmax_backward_data.default,  # noqa: SLF001 -- its name
}
_SUMS = {torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor}
_SOURCES = (str(__file__), str(row_formats.__file__))
_VIEWS_WITHOUT_MARK = {torch.ops.aten._unsafe_view.default}  # noqa: SLF001 -- its name


class StoringPartition(CustomPartitionerFn):
    """Cuts a joint graph in two, and stores what crosses the cut.

    Args:
        fmt: fp16, bf16 or int8.
        cut: What cuts the graph.
        decompositions: Of operators that the compiler behind does not take.
    """

    def __init__(
        self,
        fmt: str,
        cut: Callable[..., Graphs],
        decompositions: Mapping[Any, Callable[..., Any]] | None = None,
    ) -> None:
        self._fmt = fmt
        self._cut = cut
        self._decompositions = decompositions
        self.bills: list[SavesBill] = []
        """What the graphs that were cut so far keep."""

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> Graphs:
        """Cut a joint graph, and store what crosses the cut."""
        graphs = self._cut(gm, joint_inputs, **kwargs)
        first = kwargs["num_fwd_outputs"]
        self.bills.append(store(graphs, first, self._fmt, self._decompositions))
        return graphs

    def uuid(self) -> str:
        """What a cache of compiled code tells editions apart by."""
        return get_hash_for_files(_SOURCES, self._fmt).hex()


@dataclass(kw_only=True)
class _Group:
    """Saved values that share memory by way of views."""

    base: fx.Node
    """The value in the forward graph that all of them view."""

    members: list[fx.Node] = field(default_factory=list)
    """The saved values."""


def store(
    graphs: Graphs,
    num_outputs: int,
    fmt: str,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> SavesBill:
    """Store what a forward graph keeps for its backward graph, in place.

    Args:
        graphs: Forward and backward.
        num_outputs: Of the forward; what it hands out beyond is saved.
        fmt: fp16, bf16 or int8.
        decompositions: As of `StoringPartition`.
    """
    forward, backward = graphs
    outputs = list(forward.graph.output_node().args[0])  # type: ignore[arg-type]
    taken = {node.name: node for node in backward.graph.find_nodes(op="placeholder")}
    groups, left = _groups(outputs, num_outputs, taken, fmt)
    before = after = 0
    replaced: dict[fx.Node, list[fx.Node]] = {}
    for group in groups:
        narrow, widen = row_format(fmt, _value(group.base))
        with forward.graph.inserting_after(_first_reader(group.base)):
            kept = _inlined(forward.graph, narrow, [group.base], decompositions)
        first, *others = group.members
        replaced |= {first: kept, **{node: [] for node in others}}
        holes = _placeholders(backward.graph, taken[first.name], kept)
        _give_back(backward.graph, group, taken, holes, widen, decompositions)
        before += _num_bytes(group.base)
        after += sum(map(_num_bytes, kept))
    _hand_out(forward.graph, num_outputs, replaced)
    for module in graphs:
        module.graph.lint()
        module.recompile()
    return SavesBill(
        before_bytes=before,
        after_bytes=after,
        num_packed=len(groups),
        num_whole=0,
        left_alone=left,
    )


def _groups(
    outputs: Sequence[Any], num_outputs: int, taken: Mapping[str, fx.Node], fmt: str
) -> tuple[list[_Group], Counter[str]]:
    """Find what to store, and count what is left alone, and why."""
    returned = {
        _base(node) for node in outputs[:num_outputs] if isinstance(node, fx.Node)
    }
    saved = [
        node
        for node in outputs[num_outputs:]
        if isinstance(node, fx.Node) and isinstance(_value(node), torch.Tensor)
    ]
    largest = max((_num_bytes(_base(node)) for node in saved), default=0)
    groups: dict[fx.Node, _Group] = {}
    left = Counter[str]()
    for node in saved:
        base = _base(node)
        reason = _reason_to_leave(base, returned, largest, fmt)
        if node.name not in taken or node.meta.get("saved_tensor_with_no_vc_check"):
            reason = reason or "saved by a kernel of its own"
        elif _is_exponent(taken[node.name]):
            reason = reason or "an exponent"
        if reason is not None:
            left[reason] += 1
        else:
            groups.setdefault(base, _Group(base=base)).members.append(node)
    return list(groups.values()), left


def _reason_to_leave(
    base: fx.Node, returned: set[fx.Node], largest: int, fmt: str
) -> str | None:
    value, num_bytes = _value(base), _num_bytes(base)
    if base.op != "call_function" or type(value) is not torch._subclasses.FakeTensor:  # noqa: SLF001 -- no public name
        return "a weight, buffer or input"
    if value.dtype not in _TAKES[fmt]:
        return str(value.dtype).removeprefix("torch.")
    if base in returned:
        return "an output"
    if num_bytes < _SMALL:
        return "small"
    if num_bytes < largest // _MUCH_SMALLER:
        return "a statistic"
    return "a cast of a weight or input" if _is_cast_of_input(base) else None


def _is_exponent(node: fx.Node) -> bool:
    """Whether a backward takes the exponential of a value, or of a sum with it."""
    return any(
        user.target in _EXPONENTIALS
        or ((user.target in _SUMS or _is_view(user)) and _is_exponent(user))
        for user in node.users
    )


def _is_cast_of_input(node: fx.Node) -> bool:
    while node.target in _CASTS or _is_view(node):
        node = cast("fx.Node", node.args[0])
    return node.op == "placeholder"


def _base(node: fx.Node) -> fx.Node:
    """Return what a value views."""
    while _is_view(node):
        node = cast("fx.Node", node.args[0])
    return node


def _is_view(node: fx.Node) -> bool:
    """Whether a value is a view of its first argument, and of nothing else's making."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):  # noqa: SLF001 -- no public name
        return False
    if list(node.all_input_nodes) != [node.args[0]] or node.kwargs:
        return False
    if target in _VIEWS_WITHOUT_MARK:
        return True
    returns = target._schema.returns  # noqa: SLF001 -- no public name
    if len(returns) != 1 or str(returns[0].type) != "Tensor":
        return False
    alias = returns[0].alias_info
    strided = target is torch.ops.aten.as_strided.default  # of an offset, not a value
    return alias is not None and not alias.is_write and not strided


def _first_reader(node: fx.Node) -> fx.Node:
    """Return the first operator that reads a value or a view of it, or else itself.

    What a product reads stands in memory by then, and is not computed once more.
    """
    readers, values = set[fx.Node](), [node]
    while values:
        for user in values.pop().users:
            if _is_view(user):
                values.append(user)
            elif user.op != "output":
                readers.add(user)
    return next((each for each in node.graph.nodes if each in readers), node)


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


def _num_bytes(node: fx.Node) -> int:
    """Bytes of a value, by hint where sizes are symbols."""
    value = _value(node)
    size = value.numel()
    return int(size if isinstance(size, int) else size.node.hint or 0) * int(
        value.itemsize
    )


def _inlined(
    graph: fx.Graph,
    function: Callable[..., Any],
    inputs: Sequence[fx.Node],
    decompositions: Mapping[Any, Callable[..., Any]] | None,
) -> list[fx.Node]:
    """Write a function on tensors into a graph, and return its results."""
    fakes = [_value(node) for node in inputs]
    with fakes[0].fake_mode:
        traced = make_fx(function, decomposition_table=decompositions)(*fakes)
    nodes = list(traced.graph.nodes)
    copies = dict(zip((n for n in nodes if n.op == "placeholder"), inputs, strict=True))
    where = None
    for node in nodes:
        if node.op == "output":
            results = pytree.tree_leaves(node.args[0])
            return [copies[each] for each in results]
        if node.op == "placeholder":
            continue
        if where is None:
            copies[node] = where = graph.node_copy(node, copies.__getitem__)
        else:
            with graph.inserting_after(where):
                copies[node] = where = graph.node_copy(node, copies.__getitem__)
    raise AssertionError("a traced graph has an output")


def _placeholders(
    graph: fx.Graph, place: fx.Node, kept: Sequence[fx.Node]
) -> list[fx.Node]:
    """Let a backward graph take in what is kept, where it took in the value."""
    found = []
    for node in kept:
        with graph.inserting_before(place):
            found.append(graph.placeholder(f"stored_{node.name}"))
        found[-1].meta = {"val": _value(node)}
    return found


def _give_back(
    graph: fx.Graph,
    group: _Group,
    taken: Mapping[str, fx.Node],
    holes: Sequence[fx.Node],
    widen: Callable[..., Any],
    decompositions: Mapping[Any, Callable[..., Any]] | None,
) -> None:
    """Widen right before the first reader, and view again as the forward did."""
    members = {node: taken[node.name] for node in group.members}
    readers = {user for old in members.values() for user in old.users}
    first = next(node for node in graph.nodes if node in readers)
    with graph.inserting_before(first):
        (wide,) = _inlined(graph, widen, holes, decompositions)
    where = wide
    for node, old in members.items():
        value = wide
        for view in _views(group.base, node):
            with graph.inserting_after(where):
                same = dict.fromkeys(view.all_input_nodes, value)
                value = where = graph.node_copy(view, same.__getitem__)
        old.replace_all_uses_with(value)
        graph.erase_node(old)


def _views(base: fx.Node, node: fx.Node) -> Iterator[fx.Node]:
    """Yield the views from a base to a value, in order."""
    found = []
    while node is not base:
        found.append(node)
        node = cast("fx.Node", node.args[0])
    return reversed(found)


def _hand_out(
    graph: fx.Graph, num_outputs: int, replaced: Mapping[fx.Node, list[fx.Node]]
) -> None:
    """Let a forward graph hand out what is kept in the place of what it was."""
    output = graph.output_node()
    outputs = list(output.args[0])  # type: ignore[arg-type]
    told = output.meta.get("desc") or [None] * len(outputs)  # one for each output
    handed, described = outputs[:num_outputs], list(told[:num_outputs])
    for old, text in zip(outputs[num_outputs:], told[num_outputs:], strict=True):
        new = replaced.get(old, [old])
        handed += new
        described += [text] * len(new)
    output.args = (tuple(handed),)
    if "desc" in output.meta:
        output.meta["desc"] = described
