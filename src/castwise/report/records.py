"""What a report may say, as frozen records of plain values.

A `Report` is a verdict, a row of tiles and sections; a section is a list of blocks:
`Facts`, `DataTable`, `Lines`, `Bars`, `Histogram`, `HeatTable`, `Drawing`, `Note`.
Every sequence is a tuple and every leaf a text, a number or None, so that a report is a
value: it compares, and passes through JSON unchanged.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree as ET

from castwise.errors import SettingsError

Mark = Literal["good", "bad", "warning", "none"]
"""How a value is to be read; shown by sign and colour, never by colour alone."""

Spelling = Literal["number", "percent", "bytes", "text"]
"""How the values of a column or an axis are written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One named value with the reason for it."""

    name: str
    """What it is."""

    value: str | float | None
    """What it came to be; for a precision, the effective one."""

    asked: str | None = None
    """What was asked for, when that is a different question."""

    because: str = ""
    """Why the value is what it is."""

    mark: Mark = "none"
    """How to read it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """A list of named values."""

    facts: tuple[Fact, ...]
    """In reading order."""

    title: str = ""
    """Heading."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A number with its uncertainty."""

    value: float
    """The measured value."""

    low: float | None = None
    """Lower end of the confidence interval."""

    high: float | None = None
    """Upper end of the confidence interval."""

    count: int | None = None
    """Number of samples."""

    mark: Mark = "none"
    """How to read it."""


Cell = str | float | Measured | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """The head of a column and the spelling of its values."""

    name: str
    """What stands below."""

    spelling: Spelling = "number"
    """How values are written; numbers are set flush right."""

    unit: str = ""
    """Shown in the head."""

    digits: int = 3
    """Significant digits of a number, decimals of a percentage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataTable:
    """A table of values."""

    columns: tuple[Column, ...]
    """From left to right."""

    rows: tuple[tuple[Cell, ...], ...]
    """From top to bottom, as long as `columns`."""

    title: str = ""
    """Heading."""

    caption: str = ""
    """What the reader must know to read it."""

    folded: bool = False
    """Whether it is shown on demand."""

    def __post_init__(self) -> None:
        """Refuse ragged rows."""
        for i, row in enumerate(self.rows):
            _need(
                len(row) == len(self.columns),
                f"table {self.title!r} needs {len(self.columns)} cells in each row, "
                f"got {len(row)} in row {i}",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One named curve."""

    name: str
    """Shown in the legend."""

    xs: tuple[float, ...]
    """Places."""

    ys: tuple[float, ...]
    """Values; what is not finite is marked on the picture, not hidden."""

    def __post_init__(self) -> None:
        """Refuse coordinates that do not pair."""
        _need(
            len(self.xs) == len(self.ys),
            f"series {self.name!r} needs as many xs as ys, got {len(self.xs)} and "
            f"{len(self.ys)}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """A stretch of the x axis with a name, such as a stage of a curriculum."""

    name: str
    """Shown at the top where it fits."""

    begin: float
    """Left end."""

    end: float
    """Right end."""

    def __post_init__(self) -> None:
        """Refuse ends that have no place."""
        known = math.isfinite(self.begin) and math.isfinite(self.end)
        _need(known, f"band {self.name!r} needs finite ends")


@dataclass(frozen=True, kw_only=True, slots=True)
class Marker:
    """An event at one place of the x axis."""

    name: str
    """What happened, listed below the picture."""

    x: float
    """Where."""

    def __post_init__(self) -> None:
        """Refuse an event that has no place."""
        _need(math.isfinite(self.x), f"marker {self.name!r} needs a finite place")


@dataclass(frozen=True, kw_only=True, slots=True)
class Lines:
    """Curves over one pair of axes."""

    title: str
    """Heading."""

    series: tuple[Series, ...]
    """The curves."""

    x_label: str = "step"
    """What runs to the right."""

    y_label: str = ""
    """What runs upwards, with its unit."""

    log_y: bool = False
    """Whether the y axis is logarithmic; values of zero or less are then marked."""

    y_spelling: Spelling = "number"
    """How values are written on the y axis."""

    bands: tuple[Band, ...] = ()
    """Stretches of the x axis."""

    markers: tuple[Marker, ...] = ()
    """Events."""

    caption: str = ""
    """What the reader must know to read it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bars:
    """Named values, one bar each."""

    title: str
    """Heading."""

    names: tuple[str, ...]
    """One for each bar, from top to bottom."""

    values: tuple[Measured, ...]
    """One for each bar."""

    spelling: Spelling = "number"
    """How values are written."""

    caption: str = ""
    """What the reader must know to read it."""

    def __post_init__(self) -> None:
        """Refuse bars without a name or names without a bar."""
        _need(
            len(self.names) == len(self.values),
            f"bars {self.title!r} need as many names as values, got {len(self.names)} "
            f"and {len(self.values)}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """Counts over adjoining intervals."""

    title: str
    """Heading."""

    edges: tuple[float, ...]
    """Ends of the intervals, ascending."""

    counts: tuple[float, ...]
    """One for each interval."""

    x_label: str = ""
    """What is counted, with its unit."""

    caption: str = ""
    """What the reader must know to read it."""

    def __post_init__(self) -> None:
        """Refuse edges that do not enclose the counts."""
        _need(
            len(self.edges) == len(self.counts) + 1,
            f"histogram {self.title!r} needs one edge more than counts, got "
            f"{len(self.edges)} edges and {len(self.counts)} counts",
        )
        ascending = all(a < b for a, b in zip(self.edges, self.edges[1:], strict=False))
        known = all(map(math.isfinite, self.edges))
        _need(
            ascending and known,
            f"histogram {self.title!r} needs finite, ascending edges",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatTable:
    """A table of one kind of number, shaded by its value."""

    title: str
    """Heading."""

    row_names: tuple[str, ...]
    """From top to bottom."""

    column_names: tuple[str, ...]
    """From left to right."""

    values: tuple[tuple[float | None, ...], ...]
    """Row by row; None where there is nothing to measure."""

    low: float = 0.0
    """Value without shade."""

    high: float = 1.0
    """Value with full shade."""

    spelling: Spelling = "percent"
    """How values are written."""

    caption: str = ""
    """What the reader must know to read it."""

    def __post_init__(self) -> None:
        """Refuse values that do not fill the table."""
        shape = [len(row) for row in self.values]
        _need(
            shape == [len(self.column_names)] * len(self.row_names),
            f"heat table {self.title!r} needs {len(self.row_names)} rows of "
            f"{len(self.column_names)} values, got rows of {shape}",
        )
        _need(self.low < self.high, f"heat table {self.title!r} needs low < high")


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """A picture that a recipe drew itself, as SVG."""

    title: str
    """Heading."""

    svg: str
    """One svg element with shapes and text only; `currentColor` follows the theme."""

    alt: str
    """The picture in words, for who cannot see it."""

    caption: str = ""
    """What the reader must know to read it."""

    def __post_init__(self) -> None:
        """Refuse what could run or load anything."""
        _check_svg(self.title, self.svg)


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """A paragraph."""

    text: str
    """Plain text; an empty line begins a new paragraph."""

    mark: Mark = "none"
    """A plain paragraph, or a box that says how it is meant."""


Block = Facts | DataTable | Lines | Bars | Histogram | HeatTable | Drawing | Note


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A chapter of the report."""

    title: str
    """Heading; also the entry in the table of contents."""

    blocks: tuple[Block, ...]
    """In reading order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One of the few figures that the reader came for."""

    name: str
    """What it is."""

    value: str
    """As it shall stand there, large."""

    detail: str = ""
    """Small print: interval, number of samples, comparison."""

    mark: Mark = "none"
    """How to read it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The one sentence to take away."""

    text: str
    """What came out."""

    mark: Mark = "none"
    """Whether that is good."""

    because: str = ""
    """What the sentence rests on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A whole report."""

    title: str
    """What was done."""

    verdict: Verdict
    """What came out."""

    sections: tuple[Section, ...]
    """The evidence."""

    subtitle: str = ""
    """When, where, with what."""

    tiles: tuple[Tile, ...] = ()
    """The few figures on top."""

    footer: str = ""
    """Version, command and machine, to repeat it."""


_SHAPES = frozenset(
    [
        "svg",
        "g",
        "path",
        "rect",
        "circle",
        "ellipse",
        "line",
        "polyline",
        "polygon",
        "text",
        "tspan",
        "title",
        "desc",
    ]
)
_SVG = "{http://www.w3.org/2000/svg}"


def _check_svg(title: str, svg: str) -> None:
    """Allow shapes and text; nothing that runs, loads or styles the page around it."""
    remedy = f"drawing {title!r} needs one svg element of shapes and text"
    _need("<!" not in svg and "<?" not in svg, f"{remedy}, got a declaration")
    try:
        root = ET.fromstring(svg)  # noqa: S314 -- no declarations, so no entities
    except (ET.ParseError, ValueError) as error:
        raise SettingsError(f"{remedy}, got no well-formed XML: {error}") from error
    _need(root.tag.removeprefix(_SVG) == "svg", f"{remedy}, got {root.tag}")
    for element in root.iter():
        tag = str(element.tag).removeprefix(_SVG)
        _need(tag in _SHAPES, f"{remedy}, got a {tag} element")
        for name, value in element.attrib.items():
            bad = re.match(r"on|style$|class$|id$|.*href$", name.lower())
            _need(
                not bad and "url" not in value.lower(),
                f"{remedy}, got {name}={value!r}",
            )


def _need(condition: object, message: str) -> None:
    if not condition:
        raise SettingsError(message)
