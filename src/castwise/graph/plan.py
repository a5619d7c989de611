"""A plan: every value's format with its reason, every cast with its bytes.

    plan.summary()              3 graphs, 118 values low; 68 casts, 48.8 MB; ...
    plan.explain("blocks.0")    one line for each operator of a module, or of one node
    plan.compare()              the bill beside autocast: casts and bytes
    plan.save("plan.json")      JSON; the same plan has the same digest on any machine
    plan.diff(other)            what another plan decides otherwise

A plan is a record: what it says was put into the graph when it was made.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from castwise.errors import PolicyError
from castwise.wording import did_you_mean

VERSION = 1
"""The version of the JSON form."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedNode:
    """One node of a captured graph."""

    name: str
    """Its name in the graph."""

    op: str
    """Its operator, as the operator table spells it."""

    module: str
    """fqn of the module that called it; the root is the empty text."""

    role: str
    """What it is to the planner; see `classify`."""

    format: str | None
    """What its values are held in; none where it makes no fp32 value."""

    because: str
    """Why."""

    inputs: tuple[str, ...] = ()
    """The nodes that it takes, weights and other inputs of the graph left out."""

    is_known: bool = True
    """Whether the planner knows the operator, and it takes what was planned."""

    forward: str | None = None
    """What its forward computes in, where a stage rule takes it apart."""

    backward: str | None = None
    """What its backward computes in, where a stage rule takes it apart."""

    def __str__(self) -> str:
        return f"{self.name} ({self.op}): {self.format or 'no value'}, {self.because}"

    @property
    def decided(self) -> tuple[str | None, ...]:
        """What its values are held in, and its stages compute in where they differ."""
        apart = (self.forward, self.backward)
        return (self.format, *(apart if self.backward else ()))


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedCast:
    """One cast."""

    value: str
    """The node that is cast."""

    origin: str
    """The format before."""

    to: str
    """The format after."""

    users: tuple[str, ...]
    """The nodes that take it; empty where all do."""

    is_weight: bool
    """Whether a weight is cast."""

    num_bytes: int
    """Bytes read and written in the forward."""

    num_bytes_backward: int
    """Bytes read and written by the cast of its gradient."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bill:
    """Casts and the bytes they move, forward and backward together."""

    num_casts: int
    """Casts in the forward."""

    num_bytes: int
    """Bytes of all casts, those of gradients included."""

    def __str__(self) -> str:
        return f"{self.num_casts} casts, {self.num_bytes / 1e6:.3g} MB"


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphPlan:
    """The plan of one captured graph."""

    name: str
    """`graph 0`, or `graph 0, wrap_body_0` for a body inside of it."""

    nodes: tuple[PlannedNode, ...]
    """Every node, in the order in which it runs."""

    casts: tuple[PlannedCast, ...]
    """Every cast that was inserted."""

    solver: str
    """Who found the choice that was taken."""

    prices: dict[str, int]
    """What each solver's choice would have cost."""

    autocast: Bill
    """What autocast with the same operator table would cast here."""

    planned: Bill
    """What the plan casts here."""

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> GraphPlan:
        """Build the plan of a graph from plain values."""
        casts = ({**each, "users": tuple(each["users"])} for each in record["casts"])
        nodes = ({**each, "inputs": tuple(each["inputs"])} for each in record["nodes"])
        return cls(
            name=record["name"],
            nodes=tuple(PlannedNode(**each) for each in nodes),
            casts=tuple(PlannedCast(**each) for each in casts),
            solver=record["solver"],
            prices=record["prices"],
            autocast=Bill(**record["autocast"]),
            planned=Bill(**record["planned"]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Uncovered:
    """Operators that no captured graph has, and what was done about it."""

    module: str
    """fqn of the module that ran them."""

    ops: tuple[str, ...]
    """The operators."""

    treatment: str
    """`autocast`, or `fp32` where the module is only partly captured."""

    def __str__(self) -> str:
        place = repr(self.module) if self.module else "the model itself"
        return (
            f"{place} ran {', '.join(self.ops)} outside of graphs, in {self.treatment}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The bill of a plan beside that of autocast with the same operator table."""

    planned: Bill
    """What the plan casts."""

    autocast: Bill
    """What autocast casts."""

    @property
    def saved(self) -> float:
        """The share of bytes that the plan saves; negative where it moves more."""
        if not self.autocast.num_bytes:
            return 0.0
        return 1 - self.planned.num_bytes / self.autocast.num_bytes

    def __str__(self) -> str:
        change = f"{-100 * self.saved:+.1f} % of bytes"
        return f"{self.planned} planned; {self.autocast} by autocast; {change}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A policy resolved on the captured graphs of one model."""

    policy: str
    """Name of the policy."""

    phase: str
    """The phase that was planned."""

    graphs: tuple[GraphPlan, ...]
    """In the order in which they were captured."""

    uncovered: tuple[Uncovered, ...] = ()
    """What ran outside of them."""

    @property
    def num_casts(self) -> int:
        """Casts in the forward."""
        return sum(graph.planned.num_casts for graph in self.graphs)

    @property
    def num_bytes_cast(self) -> int:
        """Bytes moved by casts, forward and backward."""
        return sum(graph.planned.num_bytes for graph in self.graphs)

    @property
    def unknown_ops(self) -> tuple[str, ...]:
        """Operators left as captured: unknown ones, and those that refuse a plan."""
        nodes = (node for graph in self.graphs for node in graph.nodes)
        return tuple(sorted({node.op for node in nodes if not node.is_known}))

    def compare(self) -> Comparison:
        """The bill of casts beside that of autocast with the same operator table.

        `castwise.graph.measure` runs both, and adds saved bytes and errors.
        """
        return Comparison(
            planned=_total(graph.planned for graph in self.graphs),
            autocast=_total(graph.autocast for graph in self.graphs),
        )

    def summary(self) -> str:
        """One line for logs and reports."""
        formats: Counter[str] = Counter()
        for graph in self.graphs:
            formats.update(node.format for node in graph.nodes if node.format)
        values = ", ".join(f"{num} {fmt}" for fmt, num in formats.most_common())
        parts = [f"{len(self.graphs)} graphs; values {values}", str(self.compare())]
        if self.unknown_ops:
            parts.append(f"as captured: {', '.join(self.unknown_ops)}")
        parts += map(str, self.uncovered)
        return "; ".join(parts)

    def explain(self, name: str) -> str:
        """Say what format a node, or every operator of a module, has, and why.

        Raises:
            PolicyError: No node and no module of the plan has that name.
        """
        found = [node for g in self.graphs for node in g.nodes if node.name == name]
        found = found or [
            node
            for graph in self.graphs
            for node in graph.nodes
            if node.module == name or node.module.startswith(f"{name}.")
        ]
        lines = [str(node) for node in found]
        lines += [str(each) for each in self.uncovered if each.module == name]
        if lines:
            return "\n".join(lines)
        nodes = [node for graph in self.graphs for node in graph.nodes]
        known = {node.name for node in nodes} | {node.module for node in nodes}
        raise PolicyError(
            f"need a node or module of the plan, got {name!r}"
            f"{did_you_mean(name, sorted(known))}"
        )

    def diff(self, other: Plan) -> tuple[str, ...]:
        """Say what another plan decides otherwise: formats of nodes, and casts."""
        mine, theirs = _formats(self), _formats(other)
        lines = [
            f"{graph}, {name}: {mine.get((graph, name), 'absent')} -> "
            f"{theirs.get((graph, name), 'absent')}"
            for graph, name in dict.fromkeys((*mine, *theirs))
            if mine.get((graph, name), "absent") != theirs.get((graph, name), "absent")
        ]
        if self.num_casts != other.num_casts:
            lines.append(f"{self.num_casts} -> {other.num_casts} casts")
        return tuple(lines)

    def digest(self) -> str:
        """A short hash of what the plan does: formats and casts, not reasons."""
        text = json.dumps(
            {
                "graphs": [
                    {
                        "nodes": [(n.name, n.op, *n.decided) for n in graph.nodes],
                        "casts": [(c.value, c.to, *c.users) for c in graph.casts],
                    }
                    for graph in self.graphs
                ],
                "uncovered": [str(each) for each in self.uncovered],
            },
            sort_keys=True,
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def record(self) -> dict[str, Any]:
        """Plain values for JSON; `from_record` reads them."""
        return {"castwise_plan": VERSION, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.record(), indent=1) + "\n")

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Plan:
        """Build a plan from what `record` gave.

        Raises:
            PolicyError: The record is of another version, or no plan.
        """
        if record.get("castwise_plan") != VERSION:
            raise PolicyError(
                f"need a plan of version {VERSION}, got "
                f"{record.get('castwise_plan', 'no plan')}; make it again"
            )
        uncovered = (
            Uncovered(**{**each, "ops": tuple(each["ops"])})
            for each in record["uncovered"]
        )
        return cls(
            policy=record["policy"],
            phase=record["phase"],
            graphs=tuple(map(GraphPlan.from_record, record["graphs"])),
            uncovered=tuple(uncovered),
        )

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote."""
        return cls.from_record(json.loads(Path(path).read_text()))


def _total(bills: Any) -> Bill:
    found = list(bills)
    return Bill(
        num_casts=sum(bill.num_casts for bill in found),
        num_bytes=sum(bill.num_bytes for bill in found),
    )


def _formats(plan: Plan) -> dict[tuple[str, str], str]:
    return {
        (graph.name, node.name): " ".join(map(str, node.decided))
        for graph in plan.graphs
        for node in graph.nodes
    }
