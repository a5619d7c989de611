"""Pictures as SVG, drawn here: they take their colours from the page's theme.

Each chart is drawn for a given width in pixels, so that its letters keep their size;
the page holds a wide and a narrow drawing and shows the one that fits. Everything that
comes from outside goes through `_tag`, which escapes it.
"""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from markupsafe import Markup

from castwise.report.axes import Axis, byte_unit, fit_axis, spell_number, spell_tick
from castwise.report.records import Histogram

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from castwise.report.records import Bars, Lines, Measured, Series, Spelling

NUM_COLOURS = 8
"""Colours that the style sheet defines, `--c1` to `--c8`; curves beyond reuse them."""

MAX_LISTED_MARKERS = 12
"""Events that get a number on the picture and a line below it."""

_DASHES = ("", "6 3", "2 3", "9 3 2 3")  # with the colours: distinct in print too
_LETTER = 6.2  # average width of a letter at the size of labels, in pixels
_TOP, _BOTTOM, _RIGHT = 22.0, 38.0, 14.0


def draw_lines(chart: Lines, width: int, key: str) -> Markup:
    """Draw curves.

    Args:
        chart: What to draw.
        width: Of the picture, in pixels.
        key: Unique on the page.
    """
    height = 300 if width > 500 else 240
    xs = [x for s in chart.series for x in s.xs]
    xs += [m.x for m in chart.markers] + [
        e for b in chart.bands for e in (b.begin, b.end)
    ]
    ys = [y for s in chart.series for y in s.ys]
    unit = byte_unit(ys) if chart.y_spelling == "bytes" else 1.0
    top = _TOP + 18 * bool(chart.bands)  # names of bands stand above the curves
    y_axis = fit_axis(ys, height - _BOTTOM, top, log=chart.log_y, unit=unit)
    left = _left_of(y_axis, chart.y_spelling)
    x_axis = _x_axis(xs, left, width)
    parts = [
        *_bands(chart, x_axis, y_axis),
        *_grid(chart, x_axis, y_axis),
        *_markers(chart, x_axis, y_axis),
    ]
    for i, series in enumerate(chart.series):
        parts += _curve(series, i, x_axis, y_axis)
    words = [_describe(series) for series in chart.series]
    return _picture(key, chart.title, "; ".join(words), width, height, parts)


def draw_bars(chart: Bars, width: int, key: str) -> Markup:
    """Draw horizontal bars with their confidence intervals; arguments as above."""
    row, top = 28.0, 6.0
    longest = max((len(name) for name in chart.names), default=0)
    left = min(longest * 1.2 * _LETTER + 12, width * 0.4)  # of a wide font
    room = 70.0  # for the value beside the bar
    ends = [e for v in chart.values for e in (v.value, v.low, v.high) if e is not None]
    axis = fit_axis([0.0, *ends], left, width - room, num_ticks=4, tight=True)
    height = round(top + row * len(chart.names) + 6)
    parts = [_tag("line", "base", x1=axis.place(0), x2=axis.place(0), y1=0, y2=height)]
    for i, (name, value) in enumerate(zip(chart.names, chart.values, strict=True)):
        y = top + row * i
        label = _clip(name, left - 10)
        parts.append(_text(label, left - 8, y + 15, "label end"))
        shown = value.value if axis.can_show(value.value) else 0.0
        a, b = sorted((axis.place(0), axis.place(shown)))
        colour = {"good": "good", "bad": "bad"}.get(value.mark, "c1")
        parts.append(
            _tag("rect", f"bar f-{colour}", x=a, y=y + 3, width=b - a, height=16, rx=2)
        )
        right = b
        if _is_interval(value, axis):
            x1, x2 = axis.place(value.low or 0.0), axis.place(value.high or 0.0)
            right = max(right, x2)
            path = f"M{x1:.1f} {y + 7}v8M{x1:.1f} {y + 11}H{x2:.1f}M{x2:.1f} {y + 7}v8"
            parts += [_tag("path", css, d=path) for css in ("halo", "whisker")]
        text = spell_number(value.value, chart.spelling)
        parts.append(_text(text, right + 7, y + 15, "label strong"))
    words = "; ".join(
        f"{name} {spell_number(value.value, chart.spelling)}"
        for name, value in zip(chart.names, chart.values, strict=True)
    )
    return _picture(key, chart.title, words, width, height, parts)


def draw_histogram(chart: Histogram, width: int, key: str) -> Markup:
    """Draw counts over intervals; arguments as above."""
    height = 220
    y_axis = fit_axis([0.0, *chart.counts], height - _BOTTOM, _TOP, num_ticks=4)
    x_axis = _x_axis(chart.edges, _left_of(y_axis, "number"), width)
    parts = _grid(chart, x_axis, y_axis)
    for i, count in enumerate(chart.counts):
        a, b = x_axis.place(chart.edges[i]), x_axis.place(chart.edges[i + 1])
        top = y_axis.place(count if y_axis.can_show(count) else 0.0)
        span = f"{spell_tick(chart.edges[i])} to {spell_tick(chart.edges[i + 1])}"
        parts.append(
            _tag(
                *("rect", "bar f-c1", _tag("title", "", f"{span}: {count:g}")),
                x=a + 0.5,
                y=top,
                width=max(0.5, b - a - 1),
                height=y_axis.begin - top,
            )
        )
    total = sum(count for count in chart.counts if math.isfinite(count))
    words = (
        f"{total:g} counts in {len(chart.counts)} intervals from "
        f"{chart.edges[0]:g} to {chart.edges[-1]:g}"
    )
    return _picture(key, chart.title, words, width, height, parts)


def _picture(
    key: str, title: str, words: str, width: int, height: int, parts: Sequence[Markup]
) -> Markup:
    names = (
        _tag("title", "", title, id=f"{key}-title"),
        _tag("desc", "", words, id=f"{key}-desc"),
    )
    return _tag(
        "svg",
        "chart",
        *(*names, *parts),
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_labelledby=f"{key}-title {key}-desc",
    )


def _x_axis(values: Iterable[float], left: float, width: int) -> Axis:
    """Fit the x axis tightly, with fewer labels on a narrow picture."""
    return fit_axis(values, left, width - _RIGHT, num_ticks=width // 110, tight=True)


def _left_of(y_axis: Axis, spelling: Spelling) -> float:
    """Leave room for the labels of the y axis."""
    labels = [spell_tick(tick, spelling) for tick in y_axis.ticks]
    return 14 + _LETTER * max(4, *map(len, labels))


def _is_interval(value: Measured, axis: Axis) -> bool:
    return all(e is not None and axis.can_show(e) for e in (value.low, value.high))


def _grid(chart: Lines | Histogram, x_axis: Axis, y_axis: Axis) -> list[Markup]:
    y_label = "count" if isinstance(chart, Histogram) else chart.y_label
    spelling = "number" if isinstance(chart, Histogram) else chart.y_spelling
    parts = []
    for tick in y_axis.ticks:
        y = y_axis.place(tick)
        parts.append(_tag("line", "grid", x1=x_axis.begin, x2=x_axis.end, y1=y, y2=y))
        text = spell_tick(tick, spelling)
        parts.append(_text(text, x_axis.begin - 8, y + 4, "tick end"))
    base = y_axis.begin
    parts.append(_tag("line", "base", x1=x_axis.begin, x2=x_axis.end, y1=base, y2=base))
    for tick in x_axis.ticks:
        x = x_axis.place(tick)
        parts.append(_tag("line", "base", x1=x, x2=x, y1=base, y2=base + 4))
        parts.append(_text(spell_tick(tick), x, base + 17, "tick middle"))
    parts.append(_text(chart.x_label, x_axis.end, base + 33, "axis end"))
    parts.append(_text(y_label, 2, 11, "axis"))
    return parts


def _bands(chart: Lines, x_axis: Axis, y_axis: Axis) -> list[Markup]:
    parts = []
    for i, band in enumerate(chart.bands):
        a, b = sorted((x_axis.place(band.begin), x_axis.place(band.end)))
        parts.append(
            _tag(
                *("rect", f"band b{i % 2}", _tag("title", "", band.name)),
                x=a,
                y=y_axis.end,
                width=b - a,
                height=y_axis.begin - y_axis.end,
            )
        )
        label = _clip(band.name, b - a - 12)
        if len(label) > 1:
            parts.append(_text(label, a + 3, y_axis.end - 6, "tick"))
    return parts


def _markers(chart: Lines, x_axis: Axis, y_axis: Axis) -> list[Markup]:
    """Draw a line for each event, with a number as long as they can be told apart."""
    parts = []
    numbered = len(chart.markers) <= MAX_LISTED_MARKERS
    for i, marker in enumerate(chart.markers, 1):
        x = x_axis.place(marker.x)
        title = _tag("title", "", marker.name)
        line = _tag("line", "event", title, x1=x, x2=x, y1=y_axis.end, y2=y_axis.begin)
        parts.append(line)
        if numbered:
            parts.append(_tag("circle", "flag", title, cx=x, cy=y_axis.end + 9, r=8))
            parts.append(_text(str(i), x, y_axis.end + 12.5, "flag-number middle"))
    return parts


def _curve(series: Series, i: int, x_axis: Axis, y_axis: Axis) -> list[Markup]:
    """Draw a curve; where it has no value there is a gap, and a cross above it."""
    colour = f"s-c{i % NUM_COLOURS + 1}"
    paths: list[str] = []
    crosses: list[str] = []
    pen_is_down = False
    points = _thin(series, round(x_axis.end - x_axis.begin))
    for x, y in points:
        if not math.isfinite(x):
            continue
        px = x_axis.place(x)
        if y_axis.can_show(y):
            paths.append(f"{'L' if pen_is_down else 'M'}{px:.1f} {y_axis.place(y):.1f}")
        else:
            crosses.append(f"M{px - 3:.1f} {y_axis.end + 21}l6 6m-6 0l6-6")
        pen_is_down = y_axis.can_show(y)
    dash = _DASHES[i % len(_DASHES)]
    name = _tag("title", "", series.name)
    parts = [
        _tag("path", f"curve {colour}", name, d="".join(paths), stroke_dasharray=dash)
    ]
    if len(points) <= 24:
        parts += [
            _tag(
                *("circle", f"dot f-c{i % NUM_COLOURS + 1}"),
                _tag("title", "", f"{series.name}: {x:g}, {y:.4g}"),
                cx=x_axis.place(x),
                cy=y_axis.place(y),
                r=2.8,
            )
            for x, y in points
            if math.isfinite(x) and y_axis.can_show(y)
        ]
    if crosses:
        title = _tag("title", "", f"{series.name}: no value that can be shown")
        parts.append(_tag("path", "cross", title, d="".join(crosses)))
    return parts


def _thin(series: Series, num_pixels: int) -> list[tuple[float, float]]:
    """Keep the extremes of each pixel and every value that is not finite."""
    points = list(zip(series.xs, series.ys, strict=True))
    num_groups = max(1, num_pixels // 2)
    if len(points) <= 2 * num_groups:
        return points
    kept: list[tuple[float, float]] = []
    size = -(-len(points) // num_groups)
    for start in range(0, len(points), size):
        group = range(start, min(start + size, len(points)))
        finite = [i for i in group if math.isfinite(points[i][1])]
        chosen = {i for i in group if not math.isfinite(points[i][1])}
        if finite:
            chosen.add(min(finite, key=lambda i: points[i][1]))
            chosen.add(max(finite, key=lambda i: points[i][1]))
        kept += [points[i] for i in sorted(chosen)]
    return kept


def _describe(series: Series) -> str:
    """Say a curve in words."""
    finite = [y for y in series.ys if math.isfinite(y)]
    missing = len(series.ys) - len(finite)
    words = f"{series.name}: {len(series.ys)} points"
    if finite:
        words += (
            f", from {finite[0]:.4g} to {finite[-1]:.4g}, lowest {min(finite):.4g}, "
            f"highest {max(finite):.4g}"
        )
    return f"{words}, {missing} of them not finite" if missing else words


def _clip(text: str, room: float) -> str:
    """Shorten a text to the room that it has, in pixels."""
    fits = int(room / _LETTER)
    return text if len(text) <= fits else text[: max(0, fits - 1)].rstrip() + "\u2026"


def _text(text: str, x: float, y: float, css: str) -> Markup:
    return _tag("text", css, text, x=x, y=y)


def _tag(name: str, css: str, *inner: str | Markup, **attributes: object) -> Markup:
    """Build an element; texts and attributes are escaped, markup is not."""
    body = "".join(i if isinstance(i, Markup) else escape(i) for i in inner)
    written = {"class": css, **attributes}
    pairs = "".join(
        f' {key.replace("_", "-")}="{_attribute(value)}"'
        for key, value in written.items()
        if value != ""
    )
    return Markup(f"<{name}{pairs}>{body}</{name}>")  # noqa: S704 -- escaped above


def _attribute(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else escape(str(value))
