"""The page of a validation: the model as a tree, coloured by error beside its limit."""

from __future__ import annotations

import math
from html import escape

import castwise
from castwise.formats import FORMATS
from castwise.numerics.validate import ModuleVerdict, Validation
from castwise.report import (
    Bars,
    Column,
    DataTable,
    Drawing,
    Fact,
    Facts,
    Measured,
    Note,
    Report,
    Section,
    Tile,
    Verdict,
)
from castwise.report.records import Mark

_ROW, _INDENT, _WIDTH = 22, 14, 860
_NAMES_END, _FORMAT_AT, _BARS_AT = 330, 340, 400
_HUES = {"holds": "#2f9e6e", "inherited": "#c98a12", "own": "#d0443e"}
_LOW, _HIGH = "#3b6fd4", "#8a8f98"
_MOST_ROWS = 200


def report_of(result: Validation, target: str) -> Report:
    """Arrange a validation for a reader."""
    mark: Mark = "good" if result.holds else "bad"
    first = result.faults()[0] if result.faults() else str(result.rule)
    tiles = tuple(
        Tile(
            name=each.name,
            value=f"{each.measures.relative:.1e}",
            detail=f"limit {each.limit:.1e}, fp32 {each.floor.relative:.1e}",
            mark="good" if each.holds else "bad",
        )
        for each in result.results
    )
    return Report(
        title=f"Validation of {result.candidate}",
        subtitle=f"{target}, against {result.reference}, on {result.device}",
        verdict=Verdict(
            text=f"{result.candidate} {'holds' if result.holds else 'does not hold'}",
            mark=mark,
            because=first,
        ),
        tiles=tiles,
        sections=(
            Section(title="What holds", blocks=(_rule(result), _results(result))),
            Section(title="Modules", blocks=(_tree(result), _modules(result))),
            Section(title="Operators, each tried alone", blocks=_operators(result)),
        ),
        footer=f"castwise {castwise.__version__}, castwise validate {target}",
    )


def _rule(result: Validation) -> Facts:
    lifted = "; ".join(result.lifted) or "none"
    drift = result.loss_drift
    facts = [
        Fact(name="rule", value=str(result.rule), because=result.because),
        Fact(name="batches", value=str(result.num_batches)),
        Fact(name="seeds", value=", ".join(map(str, result.seeds))),
        Fact(name="loss scale", value=f"{result.scale:g}"),
        Fact(
            name="loss drift",
            value="none" if drift is None else f"{drift:.2e}",
            because=f"fp32 drifts by {result.loss_floor:.1e}",
        ),
        Fact(
            name="formats named by hand",
            value=lifted,
            because="the reference ran these lines in float64 all the same"
            if result.lifted
            else "",
        ),
    ]
    return Facts(facts=tuple(facts))


def _results(result: Validation) -> DataTable:
    numbers = ("error", "of fp32", "limit", "maximum", "ulp", "cosine")
    return DataTable(
        title="Output and gradients",
        columns=(
            Column(name="result", spelling="text"),
            *(
                Column(name=name, digits=6 if name == "cosine" else 3)
                for name in numbers
            ),
            Column(name="not finite", spelling="percent", digits=1),
            Column(name="zero", spelling="percent", digits=1),
        ),
        rows=tuple(
            (
                each.name,
                Measured(
                    value=each.measures.relative, mark="good" if each.holds else "bad"
                ),
                each.floor.relative,
                each.limit,
                each.measures.maximum,
                each.measures.ulp,
                each.measures.cosine,
                each.measures.nonfinite,
                each.measures.zero,
            )
            for each in result.results
        ),
        caption=(
            "Errors are relative, in the Euclidean norm; the worst of all batches and "
            "seeds. The maximum is relative to the largest element."
        ),
    )


def _tree(result: Validation) -> Drawing | Note:
    """The module tree; how long a bar is tells the error, its colour the state."""
    if not result.modules:
        return Note(text="A function has no modules.")
    shown = result.modules[:_MOST_ROWS]
    low, high = _decades(shown)
    height = _ROW * (len(shown) + 1) + 26
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            f'width="{_WIDTH}" height="{height}" font-size="12">'
        )
    ]
    for decade in range(low, high + 1):
        x = _x(10.0**decade, low, high)
        parts.append(
            f'<line x1="{x:.1f}" y1="20" x2="{x:.1f}" y2="{height - 6}" '
            'stroke="currentColor" stroke-opacity="0.15"/>'
            f'<text x="{x:.1f}" y="14" text-anchor="middle" fill="currentColor" '
            f'fill-opacity="0.65">1e{decade}</text>'
        )
    for row, each in enumerate(shown):
        parts.append(_module_row(each, result, 26 + _ROW * row, (low, high)))
    parts.append("</svg>")
    left_out = len(result.modules) - len(shown)
    more = f" {left_out} more modules stand in the table." if left_out else ""
    return Drawing(
        title="Error of each module's output and gradients",
        svg="".join(parts),
        alt=f"{len(shown)} modules with their largest errors beside those of fp32",
        caption=(
            "Bar: the largest error of the module. Tick: what is allowed. Dot: the "
            "same error in fp32. Green holds; red is at fault by its own operators; "
            f"amber inherits its error. Formats of 16 bits are blue."
            f"{more}"
        ),
    )


def _module_row(
    each: ModuleVerdict, result: Validation, y: int, decades: tuple[int, int]
) -> str:
    depth = each.module.count(".") + bool(each.module)
    label = each.module.rpartition(".")[2] or "(model)"
    x = 4 + _INDENT * min(depth, 12)
    text = f"{label}  {each.kind}" if label != each.kind else label
    most = max(8, (_NAMES_END - x) // 7)
    text = text if len(text) <= most else f"{text[: most - 1]}~"
    parts = [
        f'<text x="{x}" y="{y + 14}" fill="currentColor">{escape(text)}</text>',
        (
            f'<rect x="{_FORMAT_AT - 4}" y="{y + 2}" width="42" height="16" rx="8" '
            f'fill="{_format_hue(each.compute)}" fill-opacity="0.25"/>'
            f'<text x="{_FORMAT_AT + 17}" y="{y + 14}" text-anchor="middle" '
            f'font-size="11" fill="currentColor">{escape(each.compute)}</text>'
        ),
    ]
    errors = each.errors()
    if errors:
        error, floor = max(errors.values(), key=lambda pair: _finite(pair[0]))
        end = _x(error, *decades)
        parts.append(
            f'<rect x="{_BARS_AT}" y="{y + 5}" width="{max(end - _BARS_AT, 1):.1f}" '
            f'height="11" rx="2" fill="{_HUES[each.state]}"/>'
            f'<text x="{min(end + 6, _WIDTH - 52):.1f}" y="{y + 15}" font-size="11" '
            f'fill="currentColor">{error:.1e}</text>'
        )
        limit = _x(result.rule.limit(floor), *decades)
        parts.append(
            f'<line x1="{limit:.1f}" y1="{y + 2}" x2="{limit:.1f}" y2="{y + 19}" '
            'stroke="currentColor" stroke-width="2"/>'
            f'<circle cx="{_x(floor, *decades):.1f}" cy="{y + 10.5}" r="3.5" '
            'fill="none" stroke="currentColor" stroke-width="1.5"/>'
        )
    return "".join(parts)


def _format_hue(fmt: str) -> str:
    return _LOW if FORMATS[fmt].bits <= 16 else _HIGH


def _short(module: str | None, most: int = 12) -> str:
    """A module's name as far as it fits beside a bar; its end tells most."""
    name = module or "outside"
    return name if len(name) <= most else f"~{name[1 - most :]}"


def _decades(modules: tuple[ModuleVerdict, ...]) -> tuple[int, int]:
    """The powers of ten between which everything that is drawn lies."""
    pairs = [pair for each in modules for pair in each.errors().values()]
    values = [_finite(value) for pair in pairs for value in pair if value > 0]
    low = math.floor(math.log10(max(min(values, default=1e-8), 1e-18)))
    high = math.ceil(math.log10(min(max(values, default=1.0), 1e9)))
    return max(low, high - 16), max(high, low + 1, 0)


def _x(value: float, low: int, high: int) -> float:
    width = _WIDTH - _BARS_AT - 60
    place = (math.log10(max(_finite(value), 10.0**low)) - low) / (high - low)
    return _BARS_AT + width * min(max(place, 0.0), 1.0)


def _finite(value: float) -> float:
    return min(value, 1e9) if not math.isnan(value) else 1e9


def _modules(result: Validation) -> DataTable:
    kinds = ("output", "output_gradient", "weight_gradient")
    rows = []
    for each in result.modules:
        errors = each.errors()
        mark = "good" if each.state == "holds" else "bad"
        cells: list[float | Measured | None] = []
        for kind in kinds:
            pair = errors.get(kind)
            cells += (
                [None, None]
                if pair is None
                else [
                    Measured(value=pair[0], mark="none" if mark == "good" else "bad"),
                    pair[1],
                ]
            )
        rows.append(
            (each.module or "(model)", each.kind, each.compute, each.state, *cells)
        )
    named = [k.replace("_", " ") for k in kinds]
    return DataTable(
        title="Modules",
        columns=(
            *(
                Column(name=n, spelling="text")
                for n in ("module", "class", "compute", "state")
            ),
            *(Column(name=n) for kind in named for n in (kind, "of fp32")),
        ),
        rows=tuple(rows),
        folded=True,
        caption="Relative errors, the worst over calls, batches and seeds.",
    )


def _operators(result: Validation) -> tuple[Bars | DataTable | Note, ...]:
    if not result.operators:
        return (Note(text="Operators were not tried."),)
    ordered = sorted(result.operators, key=lambda each: -_finite(each.error))
    worst = [each for each in ordered if math.isfinite(each.error)][:12]
    bars = Bars(
        title="The operators that are farthest off",
        names=tuple(f"{_short(e.module)} {e.op}" for e in worst),
        values=tuple(
            Measured(value=e.error, mark="none" if e.holds(result.rule) else "bad")
            for e in worst
        ),
        caption=(
            "Each operator ran on the inputs of the float64 reference, rounded to the "
            "formats of the candidate, so that no error is inherited; operators of the "
            "backward ran on their own inputs."
        ),
    )
    table = DataTable(
        title="All operators",
        columns=(
            *(
                Column(name=n, spelling="text")
                for n in ("module", "operator", "stage", "line", "format", "inputs of")
            ),
            Column(name="calls"),
            Column(name="error"),
            Column(name="of fp32"),
            Column(name="flushed to zero", spelling="percent", digits=1),
        ),
        rows=tuple(
            (
                e.module or "",
                e.op,
                e.stage,
                e.where,
                e.format,
                e.basis,
                e.num_calls,
                Measured(value=e.error, mark="none" if e.holds(result.rule) else "bad"),
                e.floor,
                e.flushed,
            )
            for e in ordered
        ),
        folded=True,
    )
    return bars, table
