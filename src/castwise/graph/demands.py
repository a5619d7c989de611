"""Which casts a choice of labels needs, and how many bytes they move.

Three kinds of cast:

    at a use       a call needs a value in another format; one cast is shared by all
                   that need it, if its memory is never written and the grad mode is
                   the same
    at the maker   a value is held in another format than its operator makes
    none           an operator that promotes takes both formats; only the gradient is
                   cast, by autograd

A cast reads and writes: 4 + 2 bytes for each number between fp32 and 16 bits, and as
many again for the gradient that comes back.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from castwise.graph.values import (
    has_dimensions,
    num_elements,
    requires_grad,
    value_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from castwise.graph.classify import Call
    from castwise.graph.problem import Label, Problem

CAST_OVERHEAD = 4096
"""What one cast costs besides its bytes, in bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cast:
    """One cast to insert."""

    source: fx.Node
    """The value that is cast."""

    to: torch.dtype
    """What it becomes."""

    users: tuple[fx.Node, ...]
    """The calls that take the cast; empty for a cast at the maker, which all take."""

    at_use: bool
    """Whether it is taken right before its first user, and not where it is made."""

    origin: torch.dtype
    """What it was."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it reads and writes in the forward."""
        return num_elements(self.source) * (self.origin.itemsize + self.to.itemsize)

    @property
    def num_bytes_backward(self) -> int:
        """Bytes that its gradient moves."""
        return self.num_bytes if requires_grad(self.source) else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """All casts of one choice, and what they cost."""

    casts: tuple[Cast, ...]
    """In the order of the values that are cast."""

    promoted: tuple[tuple[fx.Node, fx.Node], ...]
    """Value and call where an operator promotes, and only a gradient is cast."""

    @property
    def num_bytes(self) -> int:
        """Bytes moved by casts, forward and backward."""
        casts = sum(each.num_bytes + each.num_bytes_backward for each in self.casts)
        return casts + sum(
            6 * num_elements(value)
            for value, _ in self.promoted
            if requires_grad(value)
        )

    num_bytes_wide: int
    """Bytes that values take in fp32 beyond what they would take low."""

    @property
    def price(self) -> int:
        """What choices are compared by."""
        return self.num_bytes + CAST_OVERHEAD * len(self.casts) + self.num_bytes_wide


def needs_of(problem: Problem, labels: list[Label]) -> Needs:
    """Work out the casts that a choice of labels needs."""
    collected = _Collected(problem, labels)
    for node, call in problem.calls.items():
        if node in problem.var:
            collected.make(node, call)
        collected.use(node, call)
    return Needs(
        casts=tuple(collected.casts()),
        promoted=tuple(collected.promoted),
        num_bytes_wide=sum(
            wide_price(problem, var)
            for var, label in enumerate(labels)
            if label != "low" and problem.pins[var] is None
        ),
    )


def wide_price(problem: Problem, var: int) -> int:
    """Bytes that the values of a variable take in fp32 beyond what they take low."""
    return sum(
        2 * num_elements(node) * (2 if requires_grad(node) else 1)
        for node in problem.members[var]
    )


def native_dtype(problem: Problem, node: fx.Node, labels: list[Label]) -> torch.dtype:
    """What an operator makes by itself, under a choice of labels."""
    call = problem.calls[node]
    if call.role == "low":
        assert call.low is not None
        return call.low
    if call.role == "wide":
        return torch.float64
    if call.role == "part":
        maker = node.args[0]
        assert isinstance(maker, fx.Node)
        return native_dtype(problem, maker, labels)
    if call.role == "follows":
        return problem.dtype(node, labels)
    return torch.float32


class _Collected:
    """Casts, as they are found."""

    def __init__(self, problem: Problem, labels: list[Label]) -> None:
        self._problem = problem
        self._labels = labels
        self._made: dict[fx.Node, torch.dtype] = {}
        self._shared: dict[tuple[fx.Node, torch.dtype, int], list[fx.Node]] = (
            defaultdict(list)
        )
        self._alone: list[tuple[fx.Node, torch.dtype, fx.Node]] = []
        self.promoted: list[tuple[fx.Node, fx.Node]] = []

    def make(self, node: fx.Node, call: Call) -> None:
        """A value is made; it may be held in another format."""
        is_one = isinstance(value_of(node), torch.Tensor)
        if call.role == "input" or call.writes or not is_one:
            return
        native = native_dtype(self._problem, node, self._labels)
        if native != self._held(node):
            self._made[node] = native

    def use(self, node: fx.Node, call: Call) -> None:
        """A call takes values; some of them in another format."""
        for source, to in self._demands(node, call):
            if self._problem.aliases.casts_at_use(source):
                self._alone.append((source, to, node))
            else:
                self._shared[source, to, call.mode].append(node)

    def casts(self) -> Iterator[Cast]:
        """Yield everything that was found."""
        held = self._held
        for node, native in self._made.items():
            yield Cast(
                source=node, to=held(node), users=(), at_use=False, origin=native
            )
        for (source, to, mode), users in self._shared.items():
            there = self._problem.calls[source].mode
            yield Cast(
                source=source,
                to=to,
                users=tuple(users),
                at_use=mode != there,
                origin=held(source),
            )
        for source, to, user in self._alone:
            yield Cast(
                source=source, to=to, users=(user,), at_use=True, origin=held(source)
            )

    def _held(self, node: fx.Node) -> torch.dtype:
        return self._problem.dtype(node, self._labels)

    def _demands(
        self, node: fx.Node, call: Call
    ) -> Iterator[tuple[fx.Node, torch.dtype]]:
        if call.role in {"input", "like", "reads", "part"} or call.name == "copy":
            return
        if call.promotes and not call.writes:
            yield from self._of_promoter(node)
            return
        for source in self._problem.inputs(node):
            to = self._demand(node, call, source)
            if to is not None and to != self._held(source):
                yield source, to

    def _demand(self, node: fx.Node, call: Call, source: fx.Node) -> torch.dtype | None:
        if source in call.kept:
            return torch.float32
        if call.role == "low":
            return call.low
        if call.role == "wide":
            return torch.float64
        if call.role == "follows":
            var = self._problem.own_var(node)
            assert var is not None
            return self._problem.dtype_of(var, self._labels)
        if call.role == "decides" and self._problem.autocast[source] == "low":
            return None
        return torch.float32

    def _of_promoter(self, node: fx.Node) -> Iterator[tuple[fx.Node, torch.dtype]]:
        """Cast what does not come out right by promotion alone."""
        wanted = self._held(node)
        sources = list(self._problem.inputs(node))
        sized = [source for source in sources if has_dimensions(source)]
        deciding = sized or sources  # numbers without dimensions widen nothing
        if not deciding:
            return  # it makes floats out of whole numbers
        others = [source for source in deciding if self._held(source) != wanted]
        if wanted.itemsize == 4 and len(others) < len(deciding):
            narrow = [s for s in others if self._held(s).itemsize < 4]
            self.promoted += [(source, node) for source in narrow]
            others = [s for s in others if s not in narrow]
        elif wanted.itemsize == 4 and all(self._held(s).itemsize < 4 for s in others):
            first = min(others, key=num_elements)
            self.promoted += [(s, node) for s in others if s is not first]
            others = [first]
        yield from ((source, wanted) for source in others)
