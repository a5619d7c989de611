"""Which values share memory, and which memory is written: what no cast may separate.

A cast is a copy, taken at one moment. Where the memory it was taken from is written
later, the copy is stale, and nothing tells:

    h16 = h.to(bf16)         # taken here
    h += x                   # not seen by h16
    y = linear(h16, w16)     # silently wrong

So memory that is written has one format for all values that live in it, and each cast
from it is taken right before its use. Memory that comes from outside, or goes outside
in more than one value, keeps the format that it was captured in, because who holds it
there may write to it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from castwise.graph.operators import STATISTICS, kept_inputs
from castwise.graph.values import requires_grad, storages, was_written

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import fx

    from castwise.graph.classify import Call


@dataclass(frozen=True, kw_only=True, slots=True)
class Aliases:
    """The memory of one graph."""

    written: frozenset[int]
    """Storages that are written in the graph."""

    held_outside: frozenset[int]
    """Storages that come in, or go out in more than one value."""

    of: Mapping[fx.Node, frozenset[int]]
    """The storages of each node."""

    handed_out: frozenset[int]
    """Storages that go out in more than one value."""

    input_is_written: bool
    """Whether memory from outside is written, so that other inputs may change too."""

    inputs: frozenset[fx.Node]
    """What comes in from outside and is no parameter."""

    def is_written(self, node: fx.Node) -> bool:
        """Whether a node lives in memory that is written."""
        return not self.written.isdisjoint(self.of[node])

    def is_outside(self, node: fx.Node) -> bool:
        """Whether a node lives in memory that is held outside."""
        return not self.held_outside.isdisjoint(self.of[node])

    def casts_at_use(self, node: fx.Node) -> bool:
        """Whether a cast of a node must be taken right before its use."""
        if self.is_written(node):
            return True
        return self.input_is_written and node in self.inputs


def find_aliases(calls: Mapping[fx.Node, Call]) -> Aliases:
    """Work out which values share memory, and which memory is written."""
    of = {node: frozenset(storages(node)) for node in calls}
    written: set[int] = set()
    incoming: set[int] = set()
    outgoing: dict[int, set[fx.Node]] = {}
    for node, call in calls.items():
        if was_written(node):
            written |= of[node]
        if call.writes:
            written |= _written_by(call, of)
        if call.name in STATISTICS:  # no version tells
            for source in kept_inputs(node, call.name):
                written |= of[source] if not requires_grad(source) else set()
        if call.role == "input":
            incoming |= of[node]
        if call.role == "output":
            for source in node.all_input_nodes:
                for storage in of[source]:
                    outgoing.setdefault(storage, set()).add(source)
    twice = {storage for storage, nodes in outgoing.items() if len(nodes) > 1}
    return Aliases(
        written=frozenset(written),
        held_outside=frozenset(incoming | twice),
        handed_out=frozenset(twice),
        of=of,
        input_is_written=not written.isdisjoint(incoming),
        inputs=frozenset(
            node
            for node, call in calls.items()
            if call.role == "input" and not call.is_parameter
        ),
    )


def _written_by(
    call: Call, of: Mapping[fx.Node, frozenset[int]]
) -> frozenset[int] | set[int]:
    """What a call that writes to its first argument writes to."""
    inputs = call.node.all_input_nodes
    if not inputs:
        return set()
    first = call.node.args[0] if call.node.args else inputs[0]
    return of[first] if first in of else of[inputs[0]]  # type: ignore[index]
