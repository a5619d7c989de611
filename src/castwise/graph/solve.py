"""Choose the labels that need the fewest bytes of casts.

Three choices are made and their casts counted exactly; the cheapest is taken:

    autocast    every value as autocast has it, but each cast shared
    two passes  each value as most of its bytes are, first from its inputs, then from
                its users
    cheapest    a minimum cut: high on the source's side, low on the sink's. A value and
    cut         those who need it otherwise are tied by one edge for each direction,
                through a vertex of its own, since a cast is shared:

                    value ---cost---> (cast to low)  ---unlimited---> users
                    users ---unlimited---> (cast to high) ---cost---> value

The cut is exact but for operators that promote, where what a cast costs depends on all
inputs together; there the count decides.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from castwise.graph.demands import CAST_OVERHEAD, Needs, needs_of, wide_price
from castwise.graph.flow import UNLIMITED, Network
from castwise.graph.values import num_elements, requires_grad

if TYPE_CHECKING:
    from torch import fx

    from castwise.graph.problem import Label, Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """Labels of all variables, what they need, and who found them."""

    labels: list[Label]
    """For each variable."""

    needs: Needs
    """The casts."""

    solver: str
    """`cut`, `two passes` or `autocast`."""

    prices: dict[str, int]
    """What each solver's choice costs."""


@dataclass(frozen=True, slots=True)
class _Use:
    """One value and one call that wants it low, high, or as the call itself is."""

    source: fx.Node
    wants: Label | int  # a label, or the variable whose label is wanted
    promotes: bool


def solve(problem: Problem) -> Solution:
    """Choose labels; the cheapest of three choices."""
    uses = _uses(problem)
    choices = {
        "autocast": _as_autocast(problem),
        "two passes": _in_two_passes(problem, uses),
        "cut": _by_cut(problem, uses),
    }
    needs = {name: needs_of(problem, labels) for name, labels in choices.items()}
    prices = {name: needs[name].price for name in choices}
    best = min(choices, key=lambda name: prices[name])
    return Solution(labels=choices[best], needs=needs[best], solver=best, prices=prices)


def _uses(problem: Problem) -> list[_Use]:
    found = []
    for node, call in problem.calls.items():
        if call.role in {"input", "like", "reads", "part"} or call.name == "copy":
            continue
        for source in problem.inputs(node):
            wants = _wants(problem, node, source)
            if wants is not None:
                promotes = call.promotes and not call.writes
                found.append(_Use(source, wants, promotes))
    return found


def _wants(problem: Problem, node: fx.Node, source: fx.Node) -> Label | int | None:
    call = problem.calls[node]
    if source in call.kept:
        return "high"
    if call.role == "low":
        return "low"
    if call.role == "wide":
        return "wide"
    if call.role == "follows":
        return problem.own_var(node)
    if call.role == "decides" and problem.autocast[source] == "low":
        return None
    return "high"


def _start(problem: Problem) -> list[Label | None]:
    return [None if pin is None else pin.label for pin in problem.pins]


def _as_autocast(problem: Problem) -> list[Label]:
    labels: list[Label] = []
    for members, pin in zip(problem.members, problem.pins, strict=True):
        if pin is not None:
            labels.append(pin.label)
        else:  # a variable that another one took over has no members
            labels.append(problem.autocast[members[0]] if members else "high")
    return labels


def _in_two_passes(problem: Problem, uses: list[_Use]) -> list[Label]:
    """From inputs to users, then from users to inputs."""
    labels = _as_autocast(problem)
    by_source = defaultdict(list)
    for use in uses:
        by_source[problem.var[use.source]].append(use)
    free = [var for var, pin in enumerate(problem.pins) if pin is None]
    into = _inputs_of(problem, free)
    for order in (free, free[::-1]):
        for var in order:
            labels[var] = _cheaper(problem, var, labels, by_source[var], into[var])
    return labels


def _inputs_of(problem: Problem, free: list[int]) -> dict[int, list[fx.Node]]:
    return {
        var: [s for node in problem.members[var] for s in problem.inputs(node)]
        for var in free
    }


def _cheaper(
    problem: Problem,
    var: int,
    labels: list[Label],
    uses: list[_Use],
    sources: list[fx.Node],
) -> Label:
    """The label of one variable that is cheaper beside its neighbours."""
    prices: dict[Label, int] = {}
    choices: tuple[Label, Label] = ("high", "low")
    for label in choices:
        price = wide_price(problem, var) if label == "high" else 0
        price += sum(
            _price(source)
            for source in sources
            if problem.var[source] != var and labels[problem.var[source]] != label
        )
        for source in problem.members[var]:
            wanted = {_label(use.wants, labels) for use in uses if use.source is source}
            price += _price(source) * len(wanted - {label})
            if label == "low" and "high" in wanted and problem.is_exact(source):
                price += UNLIMITED
        prices[label] = price
    return min(choices, key=lambda label: prices[label])


def _label(wants: Label | int, labels: list[Label]) -> Label:
    return labels[wants] if isinstance(wants, int) else wants


def _by_cut(problem: Problem, uses: list[_Use]) -> list[Label]:
    network = Network()
    vertices = [_vertex(network, pin) for pin in _start(problem)]
    for var, pin in enumerate(problem.pins):
        if pin is None:
            price = wide_price(problem, var)
            network.add_edge(vertices[var], Network.SINK, price)
    down: dict[fx.Node, int] = {}
    up: dict[fx.Node, int] = {}
    for use in uses:
        source = vertices[problem.var[use.source]]
        user = _side(use.wants, vertices)
        if user == source:
            continue
        price = _price(use.source)
        if use.source not in down:
            down[use.source] = network.add_vertex()
            network.add_edge(source, down[use.source], price)
        network.add_edge(down[use.source], user, UNLIMITED)
        if problem.is_exact(use.source):
            network.add_edge(user, source, UNLIMITED)
        elif use.promotes:
            promoted = price // 2 if requires_grad(use.source) else 1
            network.add_edge(user, source, promoted)
        else:
            if use.source not in up:
                up[use.source] = network.add_vertex()
                network.add_edge(up[use.source], source, price)
            network.add_edge(user, up[use.source], UNLIMITED)
    high = network.source_side()
    return [
        pin.label if pin is not None else "high" if vertices[var] in high else "low"
        for var, pin in enumerate(problem.pins)
    ]


def _vertex(network: Network, pinned: Label | None) -> int:
    if pinned is None:
        return network.add_vertex()
    return Network.SINK if pinned == "low" else Network.SOURCE


def _side(wants: Label | int, vertices: list[int]) -> int:
    if isinstance(wants, int):
        return vertices[wants]
    return Network.SINK if wants == "low" else Network.SOURCE


def _price(source: fx.Node) -> int:
    """What a cast of a value costs, forward and backward."""
    return (
        6 * num_elements(source) * (2 if requires_grad(source) else 1) + CAST_OVERHEAD
    )
