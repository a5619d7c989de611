"""What a watched run tells, arranged for a reader: pictures and tables of its windows.

The first picture answers most questions: how many numbers have which exponent, and
below it, on the same axis, from where to where each format reaches. What stands left of
a bar is zero in that format, what stands right of it is infinite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from castwise.formats import FORMATS
from castwise.numerics.exponents import ExponentHistogram
from castwise.numerics.watch_records import (
    WHAT_IF,
    TensorKind,
    TensorWatch,
    WatchWindow,
)
from castwise.report.records import (
    Block,
    Cell,
    Column,
    DataTable,
    Drawing,
    HeatTable,
    Lines,
    Marker,
    Note,
    Section,
    Series,
)

_COLOURS: dict[TensorKind, str] = {
    "weight": "#3f7fd0",
    "gradient": "#cf6a2a",
    "output": "#3d9a62",
    "output_gradient": "#a45bc4",
}
_NAMES: dict[TensorKind, str] = {
    "weight": "weights",
    "gradient": "weight gradients",
    "output": "outputs",
    "output_gradient": "output gradients",
}
_WIDTH, _LEFT, _RIGHT = 760, 78, 12
_TOP, _BASE, _ROW = 30, 210, 20
_MOST_ROWS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Promotion:
    """A module that was given another precision, or its own again."""

    step: int
    """From which step on."""

    module: str
    """fqn of the module."""

    precision: str
    """What it runs in from there on."""

    because: str
    """The reason."""


def watch_sections(
    windows: Sequence[WatchWindow], promotions: Sequence[Promotion] = ()
) -> tuple[Section, ...]:
    """Return the chapters of a report on what was watched."""
    if not windows:
        note = Note(text="No window was complete, so nothing was counted.")
        return (Section(title="Numbers by exponent", blocks=(note,)),)
    last = windows[-1]
    return (
        Section(
            title="Numbers by exponent",
            blocks=(exponent_drawing(last), _what_if(last), _worst(last)),
        ),
        Section(title="Over time", blocks=tuple(_time_lines(windows, promotions))),
        Section(title="Every tensor", blocks=(_table(last),)),
    )


def exponent_drawing(window: WatchWindow) -> Drawing:
    """Draw the exponents of a window over the ranges of the formats."""
    totals = {kind: window.total(kind) for kind in _NAMES}
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
        f"{_NAMES[kind]} from 2^{each.lowest} to 2^{each.highest}"
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
        "format holds with all of its digits (dark) and with some of them (light). "
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
            f'stroke="{_COLOURS[kind]}" stroke-width="1.6"><title>{_NAMES[kind]}'
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
            f'<text x="{x + 16:.0f}" y="16" fill="currentColor">{_NAMES[kind]}</text>'
        )
        x += 34 + 6.3 * len(_NAMES[kind])
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


def _what_if(window: WatchWindow) -> DataTable:
    """What would become of all numbers in each format."""
    rows: list[tuple[Cell, ...]] = []
    for kind, name in _NAMES.items():
        total = window.total(kind)
        if not total.total:
            continue
        scale = window.scale if "gradient" in kind else 1.0
        for fmt in WHAT_IF:
            shares = total.shares(fmt, scale)
            lost = window.lost_updates(fmt) if kind == "weight" else None
            rows.append(
                (
                    name,
                    fmt,
                    shares.zero,
                    shares.underflow,
                    shares.subnormal,
                    shares.overflow,
                    shares.nonfinite,
                    lost,
                )
            )
    text = (
        Column(name="numbers", spelling="text"),
        Column(name="in format", spelling="text"),
    )
    names = ("zero", "underflow", "partial", "overflow", "not finite")
    return DataTable(
        title="What if they were held in",
        columns=(
            *text,
            *(Column(name=name, spelling="percent", digits=2) for name in names),
            Column(name="lost", spelling="percent", digits=1),
        ),
        rows=tuple(rows),
        caption=f"Gradients at the loss scale {window.scale:g}. Zero: were so already. "
        "Partial: keep some of their digits. Lost: updates below half an ulp of the "
        "weight in that format.",
    )


def _worst(window: WatchWindow) -> HeatTable | Note:
    """The tensors that would lose most, by format."""

    def harm(each: TensorWatch, fmt: str) -> float:
        scale = window.scale if "gradient" in each.kind else 1.0
        shares = each.shares(fmt, scale)
        return shares.underflow + shares.overflow + shares.nonfinite

    ranked = sorted(
        window.tensors, key=lambda each: -max(harm(each, fmt) for fmt in WHAT_IF)
    )
    chosen = [each for each in ranked if max(harm(each, f) for f in WHAT_IF) > 0]
    if not chosen:
        return Note(text="No tensor would lose a number in any of these formats.")
    shown = chosen[:_MOST_ROWS]
    return HeatTable(
        title="Tensors that would lose most",
        row_names=tuple(f"{each.name or '(model)'}, {each.kind}" for each in shown),
        column_names=WHAT_IF,
        values=tuple(tuple(harm(each, fmt) for fmt in WHAT_IF) for each in shown),
        caption="Share of the numbers that underflow, overflow or are not finite."
        + (f" {len(chosen) - len(shown)} more lose less." if chosen[16:] else ""),
    )


def _time_lines(
    windows: Sequence[WatchWindow], promotions: Sequence[Promotion]
) -> list[Block]:
    markers = tuple(
        Marker(name=f"{each.module} to {each.precision}: {each.because}", x=each.step)
        for each in promotions
    )
    measures = [window.measures() for window in windows]
    steps = tuple(float(window.last_step) for window in windows)

    def series(name: str, key: str) -> Series | None:
        chosen = [
            (x, each[key])
            for x, each in zip(steps, measures, strict=True)
            if key in each
        ]
        if not chosen:
            return None
        xs, ys = zip(*chosen, strict=True)
        return Series(name=name, xs=xs, ys=ys)

    def lines(title: str, named: dict[str, str], caption: str) -> Lines | None:
        found = [series(name, key) for key, name in named.items()]
        kept = tuple(each for each in found if each is not None)
        return (
            Lines(
                title=title,
                series=kept,
                y_label="share",
                y_spelling="percent",
                markers=markers,
                caption=caption,
            )
            if kept
            else None
        )

    charts: list[Block | None] = [
        lines(
            "Gradients that underflow, at the loss scale of the time",
            {
                "gradient_underflow_fp16": "in fp16",
                "gradient_underflow_bf16": "in bf16",
            },
            "Of all gradients, zeros included.",
        ),
        lines(
            "Updates that round to nothing",
            {
                "lost_updates": "as it runs",
                "lost_updates_bf16": "if weights were bf16",
                "lost_updates_fp16": "if weights were fp16",
            },
            "Below half an ulp of the weight.",
        ),
        lines(
            "Outputs that overflow, and numbers that are not finite",
            {
                "output_overflow_fp16": "outputs beyond fp16",
                "nonfinite": "not finite",
            },
            "Promotions are marked.",
        ),
        _scales(windows, markers),
    ]
    table = _promotion_table(promotions)
    return [each for each in (*charts, table) if each is not None]


def _scales(
    windows: Sequence[WatchWindow], markers: tuple[Marker, ...]
) -> Lines | None:
    possible = [(w.last_step, w.largest_scale("fp16")) for w in windows]
    chosen = [(float(step), scale) for step, scale in possible if scale is not None]
    if not chosen:
        return None
    return Lines(
        title="Loss scale",
        series=(
            Series(
                name="in force",
                xs=tuple(float(window.last_step) for window in windows),
                ys=tuple(window.scale for window in windows),
            ),
            Series(
                name="largest by which no gradient overflows fp16",
                xs=tuple(step for step, _ in chosen),
                ys=tuple(scale for _, scale in chosen),
            ),
        ),
        log_y=True,
        markers=markers,
    )


def _promotion_table(promotions: Sequence[Promotion]) -> DataTable | Note:
    if not promotions:
        return Note(text="No module was given another precision.")
    names = ("module", "precision", "because")
    return DataTable(
        title="History of the policy",
        columns=(
            Column(name="step"),
            *(Column(name=name, spelling="text") for name in names),
        ),
        rows=tuple(
            (float(each.step), each.module, each.precision, each.because)
            for each in promotions
        ),
    )


def _table(window: WatchWindow) -> DataTable:
    names = ("zero", "underflow", "partial", "overflow", "not finite", "lost")
    rows: list[tuple[Cell, ...]] = []
    for each in window.tensors:
        shares = each.shares()
        lost = None if each.lost is None else each.lost.get(each.format)
        highest = each.histogram.highest
        rows.append(
            (
                each.name or "(model)",
                each.kind,
                each.format,
                float(each.num_elements),
                None if highest is None else float(highest),
                shares.zero,
                shares.underflow,
                shares.subnormal,
                shares.overflow,
                shares.nonfinite,
                lost,
            )
        )
    return DataTable(
        title="In the formats that run",
        columns=(
            Column(name="name", spelling="text"),
            Column(name="kind", spelling="text"),
            Column(name="format", spelling="text"),
            Column(name="numbers"),
            Column(name="largest exponent"),
            *(Column(name=name, spelling="percent", digits=2) for name in names),
        ),
        rows=tuple(rows),
        caption="Of gradients: without the loss scale.",
        folded=len(rows) > 40,
    )
