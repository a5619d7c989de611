"""The picture of a watched run: how many numbers have which exponent, and what fits.

Below the curves, on the same axis, stands from where to where each format reaches. What
is left of a bar is zero in that format, what is right of it is infinite.
"""

from __future__ import annotations

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


def exponent_drawing(window: WatchWindow) -> Drawing:
    """Draw the exponents of a window over the ranges of the formats."""
    totals = {kind: window.total(kind) for kind in KIND_NAMES}
    used = {kind: each for kind, each in totals.items() if each.counts}
    low = min([-28, *(each.lowest for each in used.values())])
    high = max([16, *(each.highest or 0 for each in used.values())])
    low, high = max(low - 1, -100), min(high + 2, 129)
    parts = [*_axis(low, high), *_curves(used, low, high), *_legend(used)]
    parts += _ranges(low, high)
    height = _BASE + 34 + _ROW * len(WHAT_IF) + 8
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" font-family="sans-serif" '
        f'font-size="11">{"".join(parts)}</svg>'
    )
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
        svg=svg,
        alt=told or "no numbers",
        caption="Shares of each kind of tensor; zeros are left out. Below: what a "
        "format holds with all of its digits (strong) and with some of them (faint). "
        f"Left of a bar numbers become zero, right of it infinite.{scale}",
    )


def _place(exponent: float, low: int, high: int) -> float:
    return _LEFT + (exponent - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)


def _axis(low: int, high: int) -> list[str]:
    base = (
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{_BASE}" y2="{_BASE}" '
        'stroke="currentColor" stroke-opacity="0.6"/>'
    )
    parts = [base]
    step = 5 if high - low <= 70 else 10
    first = -(-low // step) * step
    for exponent in range(first, high + 1, step):
        x = _place(exponent, low, high)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_BASE + 4}" '
            'stroke="currentColor" stroke-opacity="0.12"/>'
            f'<text x="{x:.1f}" y="{_BASE + 16}" text-anchor="middle" '
            f'fill="currentColor" fill-opacity="0.8">2^{exponent}</text>'
        )
    return parts


def _curves(
    used: dict[TensorKind, ExponentHistogram], low: int, high: int
) -> list[str]:
    """Draw each kind as steps, the highest share at full height."""
    shares = {
        kind: [count / max(1, sum(each.counts)) for count in each.counts]
        for kind, each in used.items()
    }
    top = max((max(each) for each in shares.values()), default=1.0)
    parts = []
    for kind, values in shares.items():
        points = [f"M{_place(used[kind].lowest, low, high):.1f} {_BASE}"]
        for exponent, share in enumerate(values, used[kind].lowest):
            y = _BASE - (_BASE - _TOP) * share / top
            left = _place(max(exponent, low), low, high)
            right = _place(min(max(exponent + 1, low), high), low, high)
            points.append(f"L{left:.1f} {y:.1f}L{right:.1f} {y:.1f}")
        points.append(f"L{right:.1f} {_BASE}")
        parts.append(
            f'<path d="{"".join(points)}" fill="{_COLOURS[kind]}" fill-opacity="0.13" '
            f'stroke="{_COLOURS[kind]}" stroke-width="1.6"><title>{KIND_NAMES[kind]}'
            "</title></path>"
        )
    parts.append(
        f'<text x="{_LEFT - 8}" y="{_TOP + 4}" text-anchor="end" '
        f'fill="currentColor" fill-opacity="0.8">{100 * top:.0f} %</text>'
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


def _ranges(low: int, high: int) -> list[str]:
    """Draw a bar for each format, under the axis."""
    parts = []
    for at, name in enumerate(WHAT_IF):
        fmt = FORMATS[name]
        y = _BASE + 34 + at * _ROW
        smallest = fmt.min_exponent - fmt.mantissa_bits
        ends = [
            _place(min(max(exponent, low), high), low, high)
            for exponent in (smallest, fmt.min_exponent, fmt.max_exponent + 1)
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
            f'<text x="{_LEFT - 8}" y="{y}" text-anchor="end" fill="currentColor">'
            f"{escape(name)}</text>"
        )
    return parts
