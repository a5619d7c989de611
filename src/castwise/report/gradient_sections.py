"""What a gradient flow tells, arranged for a reader.

In reading order: the exponents of the gradients by module, what every loss scale would
lose, every gradient with the formats that it may take.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from castwise.report.exponent_drawing import module_drawing
from castwise.report.records import (
    Cell,
    Column,
    DataTable,
    Lines,
    Marker,
    Section,
    Series,
)

if TYPE_CHECKING:
    from castwise.graph.gradient_records import GradientFlow

_MOST_BITS = 28


def gradient_sections(flow: GradientFlow, fmt: str = "fp16") -> tuple[Section, ...]:
    """Return the chapters of a report on the gradients of one batch.

    Args:
        flow: What was counted; all of it finite.
        fmt: The format that a loss scale is suggested for.
    """
    scale = flow.suggest_scale(fmt).value
    modules = flow.by_module()
    return (
        Section(
            title="Gradients by module",
            blocks=(module_drawing(modules, fmt, scale), _modules(flow, fmt, scale)),
        ),
        Section(title="Loss scales", blocks=(_scales(flow, fmt, scale),)),
        Section(title="Every gradient", blocks=(_gradients(flow, fmt, scale),)),
    )


def _modules(flow: GradientFlow, fmt: str, scale: float) -> DataTable:
    rows: list[tuple[Cell, ...]] = []
    for module, histogram in flow.by_module().items():
        alone, scaled = histogram.shares(fmt), histogram.shares(fmt, scale)
        rows.append(
            (
                module or "(model)",
                float(sum(node.module == module for node in flow.telling)),
                _exponent(histogram.highest),
                alone.underflow,
                scaled.underflow,
                scaled.overflow,
            )
        )
    at = f"at 2^{math.log2(scale):.0f}"
    return DataTable(
        title="By module",
        columns=(
            Column(name="module", spelling="text"),
            Column(name="gradients"),
            Column(name="largest exponent"),
            Column(name="underflow at 1", spelling="percent", digits=2),
            Column(name=f"underflow {at}", spelling="percent", digits=2),
            Column(name=f"overflow {at}", spelling="percent", digits=2),
        ),
        rows=tuple(rows),
        caption=f"In {fmt}. Gradients that stay in fp32 under the plan, or are noise, "
        "are left out.",
        folded=len(rows) > 40,
    )


def _scales(flow: GradientFlow, fmt: str, scale: float) -> Lines:
    bits = tuple(float(each) for each in range(_MOST_BITS + 1))
    lost = tuple(flow.underflow(2.0**each, fmt) for each in bits)
    over = tuple(flow.overflow(2.0**each, fmt) for each in bits)
    return Lines(
        title=f"What the worst gradient loses in {fmt}",
        series=(
            Series(name="becomes zero", xs=bits, ys=lost),
            Series(name="becomes infinite", xs=bits, ys=over),
        ),
        x_label="log2 of the loss scale",
        y_label="share of its numbers",
        y_spelling="percent",
        markers=(Marker(name="suggested", x=math.log2(scale)),),
        caption=f"{flow.suggest_scale(fmt).because}.",
    )


def _gradients(flow: GradientFlow, fmt: str, scale: float) -> DataTable:
    formats, telling = flow.formats(scale), set(flow.telling)
    rows: list[tuple[Cell, ...]] = []
    for node in flow.nodes:
        under, over = node.shares(fmt, scale)
        why = "noise" if node.is_noise else "stays in fp32" if not node.is_low else ""
        rows.append(
            (
                node.name,
                node.op,
                node.module or "(model)",
                float(node.num_elements),
                _exponent(node.histogram.highest),
                node.shares(fmt)[0],
                under,
                over,
                ", ".join(formats[node.name]) if node in telling else why or "zero",
            )
        )
    at = f"at 2^{math.log2(scale):.0f}"
    names = ("gradient of", "operator", "module")
    return DataTable(
        title="At the suggested loss scale",
        columns=(
            *(Column(name=name, spelling="text") for name in names),
            Column(name="numbers"),
            Column(name="largest exponent"),
            Column(name="underflow at 1", spelling="percent", digits=2),
            Column(name=f"underflow {at}", spelling="percent", digits=2),
            Column(name=f"overflow {at}", spelling="percent", digits=2),
            Column(name="may be held in", spelling="text"),
        ),
        rows=tuple(rows),
        folded=len(rows) > 40,
    )


def _exponent(exponent: int | None) -> float | None:
    return None if exponent is None else float(exponent)
