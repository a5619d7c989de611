"""What a watched run tells, arranged for a reader: pictures and tables of its windows.

In reading order: the exponents over the ranges of the formats, what would become of the
numbers in each format, the tensors that would lose most, time lines, every tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from castwise.numerics.watch.windows import (
    WHAT_IF,
    TensorWatch,
    WatchWindow,
)
from castwise.report.exponent_drawing import KIND_NAMES, exponent_drawing
from castwise.report.records import (
    Block,
    Cell,
    Column,
    DataTable,
    HeatTable,
    Lines,
    Marker,
    Note,
    Section,
    Series,
)

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


def _what_if(window: WatchWindow) -> DataTable:
    """What would become of all numbers in each format."""
    rows: list[tuple[Cell, ...]] = []
    for kind, name in KIND_NAMES.items():
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
