"""A plan as a picture: values as boxes in the colour of their format, casts on edges.

    Path("plan.svg").write_text(draw(compiled.plan().graphs[0], module="blocks.0"))

Time runs downwards. A value stands one row below the last of its inputs. Weights are
left out, as they come in from everywhere; their casts are in the bill.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from castwise.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from castwise.graph.plan import GraphPlan, PlannedNode

_COLOURS = {
    "fp64": "#b39ddb",
    "fp32": "#90caf9",
    "bf16": "#ffcc80",
    "fp16": "#ffab91",
    None: "#e0e0e0",
}
_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _TOP = 132, 26, 18, 30, 40

_Place = tuple[float, float]


def draw(graph: GraphPlan, module: str = "") -> str:
    """Draw the part of a graph that a module called, as SVG.

    Raises:
        PolicyError: The graph has no value from that module.
    """
    nodes = {node.name: node for node in graph.nodes if _is_shown(node, module)}
    if not nodes:
        raise PolicyError(f"need a module with values in {graph.name}, got {module!r}")
    places = _places(nodes)
    width = max(x for x, _ in places.values()) + _WIDTH + _GAP_X
    height = max(y for _, y in places.values()) + _HEIGHT + _GAP_Y
    casts = {
        (cast.value, user): cast.to
        for cast in graph.casts
        for user in cast.users or _users(graph, cast.value)
    }
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="11">'
    )
    parts = [
        head,
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *_legend(),
    ]
    for name, node in nodes.items():
        for source in node.inputs:
            if source in places:
                cast = casts.get((source, name))
                parts += _edge(places[source], places[name], cast)
    parts += [_box(node, places[name]) for name, node in nodes.items()]
    return "\n".join([*parts, "</svg>", ""])


def _is_shown(node: PlannedNode, module: str) -> bool:
    is_inside = not module or node.module == module
    is_inside = is_inside or node.module.startswith(f"{module}.")
    return is_inside and node.role not in {"input", "output", "reads"}


def _users(graph: GraphPlan, name: str) -> list[str]:
    return [node.name for node in graph.nodes if name in node.inputs]


def _places(nodes: Mapping[str, PlannedNode]) -> dict[str, _Place]:
    """One row below the last input; side by side in the order they run."""
    rows: dict[str, int] = {}
    filled: dict[int, int] = defaultdict(int)
    places: dict[str, _Place] = {}
    for name, node in nodes.items():
        above = [rows[source] for source in node.inputs if source in rows]
        row = rows[name] = 1 + max(above, default=-1)
        column, filled[row] = filled[row], filled[row] + 1
        x = _GAP_X + column * (_WIDTH + _GAP_X)
        places[name] = (x, _TOP + row * (_HEIGHT + _GAP_Y))
    return places


def _legend() -> Iterable[str]:
    for at, (fmt, colour) in enumerate(_COLOURS.items()):
        x = _GAP_X + 74 * at
        yield f'<rect x="{x}" y="10" width="14" height="14" fill="{colour}"/>'
        yield f'<text x="{x + 18}" y="21">{fmt or "none"}</text>'


def _box(node: PlannedNode, place: _Place) -> str:
    x, y = place
    colour = _COLOURS.get(node.format, "#ffffff")
    return (
        f'<g><title>{escape(str(node))}</title><rect x="{x}" y="{y}" rx="4" '
        f'width="{_WIDTH}" height="{_HEIGHT}" fill="{colour}" stroke="#616161"/>'
        f'<text x="{x + _WIDTH / 2}" y="{y + 17}" text-anchor="middle">'
        f"{escape(node.op[:20])}</text></g>"
    )


def _edge(start: _Place, end: _Place, cast: str | None) -> Iterable[str]:
    x, y = start[0] + _WIDTH / 2, start[1] + _HEIGHT
    to_x, to_y = end[0] + _WIDTH / 2, end[1]
    middle = (y + to_y) / 2
    colour, width = ("#9e9e9e", 1) if cast is None else ("#d32f2f", 2)
    yield (
        f'<path d="M{x} {y} C{x} {middle} {to_x} {middle} {to_x} {to_y}" fill="none" '
        f'stroke="{colour}" stroke-width="{width}"/>'
    )
    if cast is not None:
        yield (
            f'<text x="{(x + to_x) / 2 + 4}" y="{middle + 4}" fill="#d32f2f">'
            f"{cast}</text>"
        )
