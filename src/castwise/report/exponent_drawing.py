"""Pictures of exponents: how many numbers have which, and what fits.

A watched run is drawn as curves, one for each kind of tensor; gradients by module as
rows of shades. Below, on the same axis, stands from where to where each format reaches.
What is left of a bar is zero in that format, what is right of it is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

from castwise.formats import FORMATS
from castwise.numerics.watch.exponents import ExponentHistogram
from castwise.numerics.watch.windows import WHAT_IF, TensorKind, WatchWindow
from castwise.report.records import Drawing

_COLOURS: dict[TensorKind, str] = {
    "weight": "#3f7fd0",
    "gradient": "#cf6a2a",
    "output": "#3d9a62",
    "output_gradient": "#a45bc4",
}
KIND_NAMES: dict[TensorKind, str] = {
    "weight": "weights",
    "gradient": "weight gradients",
    "output": "outputs",
    "output_gradient": "output gradients",
}
"""How each kind of tensor is called on a page."""

_WIDTH, _LEFT, _RIGHT = 760, 78, 12
_TOP, _BASE, _ROW = 30, 210, 20
_SHADE = "#cf6a2a"
_MOST_MODULES = 40
_LONGEST = 40  # letters of a name


@dataclass(frozen=True, kw_only=True, slots=True)
class _Frame:
    """Where exponents stand in a picture."""

    low: int
    """The lowest exponent."""

    high: int
    """The exponent behind the highest."""

    left: int = _LEFT
    """Where the axis begins."""

    top: int = _TOP
    """Where what is drawn begins."""

    base: int = _BASE
    """Where the axis stands."""

    @classmethod
    def around(cls, histograms: list[ExponentHistogram], **places: int) -> _Frame:
        """A frame that holds some histograms, and most of fp16."""
        low = min([-28, *(each.lowest for each in histograms)])
        high = max([16, *(each.highest or 0 for each in histograms)])
        return cls(low=max(low - 1, -100), high=min(high + 2, 129), **places)

    def place(self, exponent: float) -> float:
        """Where an exponent stands; those beyond the frame at its border."""
        inside = min(max(exponent, self.low), self.high)
        share = (inside - self.low) / (self.high - self.low)
        return self.left + share * (_WIDTH - self.left - _RIGHT)


def exponent_drawing(window: WatchWindow) -> Drawing:
    """Draw the exponents of a window over the ranges of the formats."""
    totals = {kind: window.total(kind) for kind in KIND_NAMES}
    used = {kind: each for kind, each in totals.items() if each.counts}
    frame = _Frame.around(list(used.values()))
    parts = [*_axis(frame), *_curves(used, frame), *_legend(used)]
    told = "; ".join(
        f"{KIND_NAMES[kind]} from 2^{each.lowest} to 2^{each.highest}"
        for kind, each in used.items()
    )
    steps = f"step {window.last_step}"
    if window.first_step < window.last_step:
        steps = f"steps {window.first_step} to {window.last_step}"
    scale = f" Gradients without the loss scale, which was {window.scale:g}."
    return Drawing(
        title=f"Exponents, {steps}",
        svg=_svg(parts, frame, {name: (name, 0) for name in WHAT_IF}),
        alt=told or "no numbers",
        caption="Shares of each kind of tensor; zeros are left out. Below: what a "
        "format holds with all of its digits (strong) and with some of them (faint). "
        f"Left of a bar numbers become zero, right of it infinite.{scale}",
    )


def module_drawing(
    modules: Mapping[str, ExponentHistogram], fmt: str, scale: float
) -> Drawing:
    """Draw the exponents of gradients module by module, as shades.

    Args:
        modules: fqn of a module -> all its gradients.
        fmt: The format that the loss scale is for; it is drawn with and without.
        scale: A loss scale, a power of two.
    """
    used = {name: each for name, each in modules.items() if each.counts}
    ranked = sorted(used, key=lambda name: used[name].highest or 0)[:_MOST_MODULES]
    shown = {name: each for name, each in used.items() if name in ranked}
    longest = max((len(name) for name in shown), default=6)
    bits = round(math.log2(scale))
    frame = _Frame.around(
        list(shown.values()),
        left=max(_LEFT, 14 + 6 * min(longest, _LONGEST)),
        top=8,
        base=14 + _ROW * len(shown),
    )
    parts = _axis(frame)
    for at, (name, each) in enumerate(shown.items()):
        parts += _shades(name, each, frame.top + at * _ROW, frame)
    reaches = {f"{fmt} x 2^{bits}": (fmt, bits)} | {name: (name, 0) for name in WHAT_IF}
    caption = (
        "Each row is shaded by the share of its numbers; zeros are left out. Below: "
        "what a format holds with all of its digits (strong) and with some of them "
        f"(faint), {fmt} also with the suggested loss scale."
    )
    if len(used) > len(shown):
        caption += f" {len(used) - len(shown)} more modules are in the table only."
    told = (
        f"{name or 'the model itself'} from 2^{each.lowest} to 2^{each.highest}"
        for name, each in shown.items()
    )
    return Drawing(
        title="Exponents of gradients, by module",
        svg=_svg(parts, frame, reaches),
        alt="; ".join(told) or "no gradients",
        caption=caption,
    )


def _svg(
    parts: list[str], frame: _Frame, reaches: Mapping[str, tuple[str, int]]
) -> str:
    """Put a picture together, with the ranges of formats below it."""
    height = frame.base + 34 + _ROW * len(reaches) + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" font-family="sans-serif" '
        f'font-size="11">{"".join([*parts, *_ranges(reaches, frame)])}</svg>'
    )


def _axis(frame: _Frame) -> list[str]:
    base = (
        f'<line x1="{frame.left}" x2="{_WIDTH - _RIGHT}" y1="{frame.base}" '
        f'y2="{frame.base}" stroke="currentColor" stroke-opacity="0.6"/>'
    )
    parts = [base]
    step = 5 if frame.high - frame.low <= 70 else 10
    first = -(-frame.low // step) * step
    for exponent in range(first, frame.high + 1, step):
        x = frame.place(exponent)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top}" y2="{frame.base + 4}" '
            'stroke="currentColor" stroke-opacity="0.12"/>'
            f'<text x="{x:.1f}" y="{frame.base + 16}" text-anchor="middle" '
            f'fill="currentColor" fill-opacity="0.8">2^{exponent}</text>'
        )
    return parts


def _curves(used: dict[TensorKind, ExponentHistogram], frame: _Frame) -> list[str]:
    """Draw each kind as steps, the highest share at full height."""
    shares = {
        kind: [count / max(1, sum(each.counts)) for count in each.counts]
        for kind, each in used.items()
    }
    top = max((max(each) for each in shares.values()), default=1.0)
    parts = []
    for kind, values in shares.items():
        points = [f"M{frame.place(used[kind].lowest):.1f} {frame.base}"]
        for exponent, share in enumerate(values, used[kind].lowest):
            y = frame.base - (frame.base - frame.top) * share / top
            left, right = frame.place(exponent), frame.place(exponent + 1)
            points.append(f"L{left:.1f} {y:.1f}L{right:.1f} {y:.1f}")
        points.append(f"L{right:.1f} {frame.base}")
        parts.append(
            f'<path d="{"".join(points)}" fill="{_COLOURS[kind]}" fill-opacity="0.13" '
            f'stroke="{_COLOURS[kind]}" stroke-width="1.6"><title>{KIND_NAMES[kind]}'
            "</title></path>"
        )
    parts.append(
        f'<text x="{frame.left - 8}" y="{frame.top + 4}" text-anchor="end" '
        f'fill="currentColor" fill-opacity="0.8">{100 * top:.0f} %</text>'
    )
    return parts


def _shades(
    name: str, histogram: ExponentHistogram, y: int, frame: _Frame
) -> list[str]:
    """Draw one module as a row, its commonest exponent with full shade."""
    shown = name if len(name) <= _LONGEST else f"...{name[3 - _LONGEST :]}"
    label = (
        f'<text x="{frame.left - 8}" y="{y + 13}" text-anchor="end" '
        f'fill="currentColor">{escape(shown) or "(model)"}</text>'
    )
    parts = [label]
    most, total = max(histogram.counts), sum(histogram.counts)
    for exponent, count in enumerate(histogram.counts, histogram.lowest):
        left, right = frame.place(exponent), frame.place(exponent + 1)
        if not count or left == right:
            continue
        parts.append(
            f'<rect x="{left:.1f}" y="{y}" width="{right - left:.1f}" '
            f'height="{_ROW - 3}" fill="{_SHADE}" '
            f'fill-opacity="{0.08 + 0.92 * count / most:.2f}"><title>2^{exponent}: '
            f"{100 * count / total:.3g} %</title></rect>"
        )
    return parts


def _legend(used: dict[TensorKind, ExponentHistogram]) -> list[str]:
    parts = []
    x = float(_LEFT)
    for kind in used:
        parts.append(
            f'<rect x="{x:.0f}" y="6" width="11" height="11" fill="{_COLOURS[kind]}"/>'
            f'<text x="{x + 16:.0f}" y="16" fill="currentColor">'
            f"{KIND_NAMES[kind]}</text>"
        )
        x += 34 + 6.3 * len(KIND_NAMES[kind])
    return parts


def _ranges(reaches: Mapping[str, tuple[str, int]], frame: _Frame) -> list[str]:
    """Draw a bar for each format, under the axis, as far as it reaches with a scale."""
    parts = []
    for at, (name, (fmt, bits)) in enumerate(reaches.items()):
        form = FORMATS[fmt]
        y = frame.base + 34 + at * _ROW
        smallest = form.min_exponent - form.mantissa_bits
        ends = [
            frame.place(exponent - bits)
            for exponent in (smallest, form.min_exponent, form.max_exponent + 1)
        ]
        for opacity, left, right in (
            (0.22, ends[0], ends[1]),
            (0.55, ends[1], ends[2]),
        ):
            parts.append(
                f'<rect x="{left:.1f}" y="{y - 10}" width="{right - left:.1f}" '
                f'height="12" fill="currentColor" fill-opacity="{opacity}"/>'
            )
        parts.append(
            f'<text x="{frame.left - 8}" y="{y}" text-anchor="end" '
            f'fill="currentColor">{escape(name)}</text>'
        )
    return parts
