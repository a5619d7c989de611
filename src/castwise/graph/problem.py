"""The choice that a plan makes: which values are low, which are not, and what it costs.

Each value that follows its inputs may be low or high; values that must share a format
share one variable. Three things limit the choice:

pins        low operators make low values, fp32 operators and inputs high ones; memory
            that is written or held outside has one format for all that live in it
grade       a value is of *low grade* when low numbers went into it that nothing has
            outweighed: q * cos is, as q came out of a low product; h + f(x) is not, as
            the residual stream h is exact. Only values that autocast would leave low,
            and values of low grade, may be rounded.
moves       a view, a cat or a relu commutes with rounding, so a cast may move through
            it, as long as nobody behind wants the exact value

So the planner never rounds what autocast would have kept, except where it was rounded
already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from castwise.graph.values import has_dimensions, is_planned, value_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import fx

    from castwise.graph.aliases import Aliases
    from castwise.graph.classify import Call

Label = Literal["low", "high", "wide"]
"""low: the low format of its module; high: fp32, as captured; wide: fp64."""

_HIGH_ROLES = frozenset(
    {"input", "fp32", "apart", "opaque", "like", "output", "decides"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pin:
    """A label that is given, and why."""

    label: Label
    """The label."""

    because: str
    """The reason, for people."""


class Problem:
    """Variables, pins and demands of one graph."""

    def __init__(self, calls: Mapping[fx.Node, Call], aliases: Aliases) -> None:
        self.calls = calls
        self.aliases = aliases
        self.var: dict[fx.Node, int] = {}
        """The variable of each planned value."""
        self.members: list[list[fx.Node]] = []
        """The nodes of each variable, in order."""
        self._join()
        self.autocast = self._as_autocast()
        """Planned value -> what it would be under autocast with the same table."""
        self.low_grade = self._grades()
        """Planned values into which low numbers went."""
        self.pins = [self._pin(members) for members in self.members]
        """For each variable its pin, or none where the planner chooses."""
        self.lows = [self._low_dtype(members) for members in self.members]
        """For each variable what `low` is."""

    def dtype(self, node: fx.Node, labels: list[Label]) -> torch.dtype:
        """What a planned value is held in."""
        return self.dtype_of(self.var[node], labels)

    def dtype_of(self, var: int, labels: list[Label]) -> torch.dtype:
        """What the values of a variable are held in."""
        if labels[var] == "low":
            return self.lows[var]
        return torch.float32 if labels[var] == "high" else torch.float64

    def own_var(self, node: fx.Node) -> int | None:
        """The variable that a call runs in; for one that writes, that of its target."""
        if node in self.var:
            return self.var[node]
        first = node.args[0] if node.args else None
        if self.calls[node].writes and first in self.var:
            return self.var[first]  # type: ignore[index]
        return None

    def is_exact(self, node: fx.Node) -> bool:
        """Whether a value is one that nobody has rounded under autocast."""
        return self.autocast[node] == "high" and node not in self.low_grade

    def inputs(self, node: fx.Node) -> Iterator[fx.Node]:
        """The planned values that a call takes and that may be cast for it."""
        call = self.calls[node]
        for at, source in enumerate(node.all_input_nodes):
            if source not in self.var or (call.writes and at == 0):
                continue
            if not isinstance(value_of(source), torch.Tensor):
                continue  # several values at once are taken to pieces, never cast
            yield source

    def _join(self) -> None:
        """One variable for all that live in written memory, and for parts."""
        by_storage: dict[int, int] = {}
        for node, call in self.calls.items():
            if not is_planned(node):
                continue
            written = self.aliases.of[node] & self.aliases.written
            known = {by_storage[s] for s in written if s in by_storage}
            if call.role == "part" and node.args[0] in self.var:
                known.add(self.var[node.args[0]])  # type: ignore[index]
            var = self._joined(known)
            self.members[var].append(node)
            self.var[node] = var
            for storage in written:
                by_storage[storage] = var
            for storage, old in by_storage.items():
                if old in known:
                    by_storage[storage] = var

    def _joined(self, known: set[int]) -> int:
        if not known:
            self.members.append([])
            return len(self.members) - 1
        var, *others = sorted(known)
        for other in others:
            for node in self.members[other]:
                self.var[node] = var
            self.members[var] += self.members[other]
            self.members[other] = []
        return var

    def _as_autocast(self) -> dict[fx.Node, Label]:
        """Propagate formats as autocast does: by the table, and else by promotion."""
        found: dict[fx.Node, Label] = {}
        for node, call in self.calls.items():
            if node not in self.var:
                continue
            if call.writes or call.role == "part":
                first = node.args[0] if node.args else None
                found[node] = found.get(first, "high")  # type: ignore[arg-type]
            elif call.role == "low":
                found[node] = "low"
            elif call.role == "follows":
                found[node] = self._promoted(node, call, found)
            else:
                found[node] = "high"
        return found

    def _promoted(
        self, node: fx.Node, call: Call, known: Mapping[fx.Node, Label]
    ) -> Label:
        sources = [s for s in self.inputs(node) if s not in call.kept]
        if call.promotes and any(map(has_dimensions, sources)):
            sources = [s for s in sources if has_dimensions(s)]
        labels = {known[source] for source in sources}
        return "low" if labels == {"low"} else "high"

    def _grades(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for node, label in self.autocast.items():
            call = self.calls[node]
            if label == "low":
                found.add(node)
                continue
            if call.role == "part":
                graded = node.args[0] in found
            else:
                graded = call.role == "follows" and not call.writes
                graded = graded and self._inherits(node, call, found)
            if graded:
                found.add(node)
        return found

    def _inherits(self, node: fx.Node, call: Call, known: set[fx.Node]) -> bool:
        """Whether the low numbers among the inputs outweigh the others."""
        if call.low is not torch.bfloat16:
            return False  # in fp16 a value that autocast holds in fp32 may overflow
        graded = [source in known for source in self.inputs(node)]
        if call.name in {"mul", "div"}:  # relative errors add up
            return any(graded)
        return bool(graded) and all(graded)

    def _pin(self, members: list[fx.Node]) -> Pin | None:
        roles = {self.calls[node].role for node in members}
        if not members or roles <= {"follows", "part"}:
            return self._pin_of_followers(members)
        written = any(map(self.aliases.is_written, members))
        if "wide" in roles and (written or not roles <= {"wide", "part"}):
            return Pin(label="high", because="is written, so it stays as captured")
        if "wide" in roles:
            return Pin(label="wide", because=self._because(members, {"wide"}))
        if not roles.isdisjoint(_HIGH_ROLES):
            return Pin(label="high", because=self._because(members, _HIGH_ROLES))
        outside = self._held_outside(members)
        return outside or Pin(label="low", because=self._because(members, {"low"}))

    def _pin_of_followers(self, members: list[fx.Node]) -> Pin | None:
        outside = self._held_outside(members)
        if outside is not None:
            return outside
        exact = next((n for n in members if not self._may_be_low(n)), None)
        if exact is None:
            return None
        because = f"{exact.name} is exact under autocast, and stays so"
        return Pin(label="high", because=because)

    def _held_outside(self, members: list[fx.Node]) -> Pin | None:
        """Aliases that are handed out together stay aliases."""
        storages = frozenset().union(*(self.aliases.of[n] for n in members))
        shared = storages & self.aliases.held_outside
        written = shared & self.aliases.written
        twice = shared & self.aliases.handed_out
        if not written and not twice:
            return None
        return Pin(label="high", because="lives in memory that is held outside")

    def _may_be_low(self, node: fx.Node) -> bool:
        call = self.calls[node]
        if call.role == "part":
            return True  # its maker decides
        if node in self.low_grade:
            return True
        return call.moves and not call.writes

    def _because(self, members: list[fx.Node], roles: frozenset[str] | set[str]) -> str:
        node = next(n for n in members if self.calls[n].role in roles)
        return self.calls[node].because

    def _low_dtype(self, members: list[fx.Node]) -> torch.dtype:
        lows = (self.calls[node].low for node in members)
        return next((low for low in lows if low is not None), torch.bfloat16)
