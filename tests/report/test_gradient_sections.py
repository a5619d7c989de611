"""Reports on a gradient flow: modules, loss scales, formats."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest
import torch

from castwise.graph.gradient_records import GradientFlow, GradientNode
from castwise.numerics.watch.exponents import ExponentHistogram
from castwise.report import (
    DataTable,
    Drawing,
    Lines,
    Report,
    Section,
    Verdict,
    render_page,
)
from castwise.report.exponent_drawing import module_drawing
from castwise.report.gradient_sections import gradient_sections

SVG = "{http://www.w3.org/2000/svg}"


def node(name: str, *values: float, is_low: bool = True) -> GradientNode:
    """The gradient of a weight that has these numbers."""
    return GradientNode(
        name=f"{name}.weight",
        op="weight",
        module=name,
        histogram=ExponentHistogram.of(torch.tensor(values)),
        num_elements=len(values),
        is_low=is_low,
    )


FLOW = GradientFlow(
    nodes=(
        node("first<b>", 2.0**-3, 2.0**-4, 2.0**-5, 2.0**-5),
        node("second", 2.0**-33, 2.0**-9),
        node("loss", 1.0, is_low=False),
    )
)


def blocks(section: Section) -> list[object]:
    """What a chapter holds."""
    return list(section.blocks)


def test_every_module_is_a_row_of_shades_on_the_axis_of_the_formats() -> None:
    """A shade stands over what fp16 holds of it, with and without the loss scale."""
    drawing = module_drawing(FLOW.by_module(), "fp16", 2.0**15)
    root = ET.fromstring(drawing.svg)  # noqa: S314 -- our own text
    shades = [
        rect for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None
    ]
    told = [rect.findtext(f"{SVG}title") for rect in shades]
    assert told == [
        "2^-5: 50 %",
        "2^-4: 25 %",
        "2^-3: 25 %",
        "2^-33: 50 %",
        "2^-9: 50 %",
    ]
    rows = [float(rect.attrib["y"]) for rect in shades]
    assert len(set(rows[:3])) == len(set(rows[3:])) == 1
    assert rows[0] < rows[3]
    bars = [rect for rect in root.iter(f"{SVG}rect") if rect not in shades]
    left = {at: float(bar.attrib["x"]) for at, bar in enumerate(bars)}
    place = {text: float(r.attrib["x"]) for text, r in zip(told, shades, strict=True)}
    assert place["2^-33: 50 %"] < left[2]  # without a scale fp16 begins at 2^-24
    assert left[0] < place["2^-33: 50 %"]  # with 2^15 at 2^-39
    labels = [text.text for text in root.iter(f"{SVG}text")]
    assert {"first<b>", "second", "fp16 x 2^15", "fp16"} <= set(labels)


def test_the_sections_say_what_each_scale_loses() -> None:
    """Worst shares by scale, the suggested one marked; formats of every gradient."""
    modules, scales, every = gradient_sections(FLOW)
    table = blocks(modules)[1]
    assert isinstance(table, DataTable)
    assert [row[:3] for row in table.rows] == [
        ("first<b>", 1.0, -3.0),
        ("second", 1.0, -9.0),
    ]
    assert table.rows[1][3] == 0.5  # 2^-33 is below 2^-25
    assert table.rows[1][4] == 0
    (curves,) = blocks(scales)
    assert isinstance(curves, Lines)
    lost, over = curves.series
    assert lost.ys[0] == 0.5
    assert lost.ys[9] == 0
    assert over.ys[18] == 0
    assert over.ys[19] == 0.25
    assert curves.markers[0].x == 15
    (gradients,) = blocks(every)
    assert isinstance(gradients, DataTable)
    assert [row[-1] for row in gradients.rows] == [
        "fp16, bf16, fp8_e5m2",
        "fp16, bf16",
        "stays in fp32",
    ]


def test_a_page_of_many_modules_is_complete() -> None:
    """What a picture cannot hold is in the table, and every name is escaped."""
    many = GradientFlow(
        nodes=tuple(node(f"layer<{n}>", 2.0 ** -(n % 20)) for n in range(45))
    )
    sections = gradient_sections(many)
    drawing, table = blocks(sections[0])
    assert isinstance(drawing, Drawing)
    assert "5 more modules" in drawing.caption
    assert isinstance(table, DataTable)
    assert len(table.rows) == 45
    verdict = Verdict(text="Fits.", mark="good")
    page = render_page(Report(title="t", verdict=verdict, sections=sections))
    assert "layer&lt;44&gt;" in page
    assert "layer<" not in page


@pytest.mark.parametrize("fmt", ["bf16", "fp8_e4m3"])
def test_a_scale_for_another_format_is_drawn_with_it(fmt: str) -> None:
    """The bar with the scale is that of the format asked for."""
    drawing = blocks(gradient_sections(FLOW, fmt)[0])[0]
    assert isinstance(drawing, Drawing)
    scale = FLOW.suggest_scale(fmt).value
    assert f">{fmt} x 2^{int(scale).bit_length() - 1}<" in drawing.svg
