"""The page: one HTML file that needs nothing else, and the same content as JSON.

A content security policy in the head forbids the page to load or run anything, so that
being self-contained does not depend on care. The records stand in the page as JSON too,
for programs that get only the page.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

import castwise
from castwise.checkpoints.durable import replace_file
from castwise.report.axes import spell_fact, spell_number
from castwise.report.charts import (
    MAX_LISTED_MARKERS,
    NUM_COLOURS,
    draw_bars,
    draw_histogram,
    draw_lines,
)
from castwise.report.document import to_json
from castwise.report.records import (
    Bars,
    Drawing,
    HeatTable,
    Histogram,
    Lines,
    Measured,
    Report,
    Spelling,
)

if TYPE_CHECKING:
    import os

_WIDTHS = {"wide": 780, "narrow": 348}
_SVG_NAMESPACE = "http://www.w3.org/2000/svg"


def write_report(report: Report, path: str | os.PathLike[str]) -> Path:
    """Write a report as one page, and as JSON beside it.

    Args:
        report: What to say.
        path: The page to write, for example `report.html`; its folder must exist.

    Returns:
        The path of the page.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    target = Path(path)
    for place, text in (
        (target.with_suffix(".json"), to_json(report)),
        (target, render_page(report)),
    ):
        with replace_file(place) as file:
            file.write(text.encode("utf-8", "backslashreplace"))
    return target


def render_page(report: Report) -> str:
    """Return the page of a report as HTML."""
    return _template().render(
        report=report,
        style=Markup(_resource("page.css")),  # noqa: S704 -- our own file
        data=_embedded(to_json(report)),
    )


@cache
def _template() -> Template:
    """Compile the page once."""
    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.globals.update(
        charts=_charts,
        drawing=_drawing,
        heat=_heat,
        kind=lambda block: type(block).__name__,
        max_markers=MAX_LISTED_MARKERS,
        num_colours=NUM_COLOURS,
        paragraphs=lambda text: re.split(r"\n\s*\n", text.strip()),
        spell=_spell,
        spell_fact=_spell_fact,
        interval=_interval,
        version=castwise.__version__,
    )
    return environment.from_string(_resource("page.html.jinja"))


def _charts(block: Lines | Bars | Histogram, key: str) -> list[tuple[str, Markup]]:
    """Draw a chart for each width of the page."""
    drawn = []
    for name, width in _WIDTHS.items():
        unique = f"{key}-{name}"
        if isinstance(block, Lines):
            drawn.append((name, draw_lines(block, width, unique)))
        elif isinstance(block, Bars):
            drawn.append((name, draw_bars(block, width, unique)))
        else:
            drawn.append((name, draw_histogram(block, width, unique)))
    return drawn


def _drawing(block: Drawing) -> Markup:
    """Write a checked drawing anew, so that it means the same in HTML as in XML."""
    root = ET.fromstring(block.svg)  # noqa: S314 -- checked by its record
    for element in root.iter():
        element.tag = str(element.tag).removeprefix(f"{{{_SVG_NAMESPACE}}}")
    root.attrib.update({"role": "img", "aria-label": block.alt})
    # HTML knows no self-closing shapes outside of its own list.
    text = ET.tostring(root, encoding="unicode", short_empty_elements=False)
    return Markup(text)  # noqa: S704 -- shapes and text only, written by ElementTree


def _spell(value: Any, spelling: Spelling = "number", digits: int = 3) -> str:
    if isinstance(value, Measured):
        value = value.value
    if value is None:
        return "\u2013"
    return value if isinstance(value, str) else spell_number(value, spelling, digits)


def _spell_fact(value: str | float | None) -> str:
    return spell_fact(value) if isinstance(value, int | float) else _spell(value)


def _interval(cell: Any, spelling: Spelling, digits: int) -> str:
    """Write the small print of a measured cell."""
    if not isinstance(cell, Measured):
        return ""
    parts = []
    if cell.low is not None and cell.high is not None:
        low, high = (_spell(e, spelling, digits) for e in (cell.low, cell.high))
        parts.append(f"{low.removesuffix(' %')}\u2013{high}")
    if cell.count is not None:
        parts.append(f"n={cell.count:,}")
    return ", ".join(parts)


def _heat(table: HeatTable, value: float | None) -> int:
    """Return the shade of a value in percent."""
    if value is None or value != value:  # noqa: PLR0124 -- nan
        return 0
    share = (value - table.low) / (table.high - table.low)
    return round(100 * min(1.0, max(0.0, share)))


def _embedded(text: str) -> Markup:
    """Keep JSON from closing the element that holds it."""
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704 -- no character of markup is left


def _resource(name: str) -> str:
    return files("castwise.report").joinpath(name).read_text(encoding="utf-8")
