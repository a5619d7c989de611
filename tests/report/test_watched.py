"""Reports on what was watched: the picture is right, and the page holds everything."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest
import torch

from castwise.numerics.watch.exponents import ExponentHistogram
from castwise.numerics.watch.windows import TensorWatch, WatchWindow
from castwise.report import (
    DataTable,
    HeatTable,
    Lines,
    Note,
    Report,
    Verdict,
    render_page,
)
from castwise.report.exponent_drawing import exponent_drawing
from castwise.report.watched import Promotion, watch_sections

SVG = "{http://www.w3.org/2000/svg}"


def window(step: int, *, scale: float = 1.0, tiny: float = 1e-6) -> WatchWindow:
    """One window of four tensors, the gradients small."""
    torch.manual_seed(step)
    numbers = {
        "weight": torch.randn(77) / 8,
        "gradient": torch.randn(77) * tiny,
        "output": torch.randn(500) * 30,
        "output_gradient": torch.randn(500) * tiny,
    }
    tensors = tuple(
        TensorWatch(
            kind=kind,  # type: ignore[arg-type]
            name="layers.0<b>",
            format="fp32",
            num_elements=len(values),
            histogram=ExponentHistogram.of(values),
            lost={"fp32": 0.0, "bf16": 0.7, "fp16": 0.2} if kind == "weight" else None,
        )
        for kind, values in numbers.items()
    )
    return WatchWindow(
        first_step=step,
        last_step=step,
        scale=scale,
        num_ranks=1,
        num_skipped=0,
        tensors=tensors,
    )


def test_the_ranges_of_the_formats_stand_on_the_axis_of_the_numbers() -> None:
    """fp16 begins at 2^-24, has all digits from 2^-14, and ends before 2^16."""
    root = ET.fromstring(exponent_drawing(window(3)).svg)  # noqa: S314 -- our own
    ticks = {
        int(text[2:]): float(element.attrib["x"])
        for element in root.iter(f"{SVG}text")
        if (text := element.text or "").startswith("2^")
    }
    left, right = min(ticks), max(ticks)
    unit = (ticks[right] - ticks[left]) / (right - left)
    label = next(e for e in root.iter(f"{SVG}text") if e.text == "fp16")
    y = float(label.attrib["y"]) - 10
    bars = [
        (float(e.attrib["x"]), float(e.attrib["width"]))
        for e in root.iter(f"{SVG}rect")
        if float(e.attrib["y"]) == y
    ]
    begins = [(x - ticks[0]) / unit for x, _ in bars]
    ends = [(x + width - ticks[0]) / unit for x, width in bars]
    assert begins == pytest.approx([-24, -14], abs=0.02)
    assert ends == pytest.approx([-14, 16], abs=0.02)


def test_a_curve_is_as_high_as_its_share() -> None:
    """The highest of all has full height; others keep their proportion."""
    drawing = exponent_drawing(window(3))
    root = ET.fromstring(drawing.svg)  # noqa: S314 -- our own
    paths = [e.attrib["d"] for e in root.iter(f"{SVG}path")]
    assert len(paths) == 4
    heights = [min(float(y) for y in re.findall(r" ([\d.]+)", d)) for d in paths]
    assert min(heights) == 30.0
    found = [window(3).total("weight"), window(3).total("gradient")]
    shares = [max(each.counts) / sum(each.counts) for each in found]
    drawn = [(210 - height) / 180 for height in heights[:2]]
    assert drawn[0] / drawn[1] == pytest.approx(shares[0] / shares[1], rel=0.01)


def test_the_chapters_hold_pictures_tables_and_promotions() -> None:
    """What-if by format, the worst tensors, time lines with markers, every tensor."""
    promoted = Promotion(
        step=5, module="head", precision="c=fp32", because="exp overflows fp16"
    )
    sections = watch_sections([window(3), window(9, scale=2.0**10)], [promoted])
    blocks = {block.title: block for s in sections for block in s.blocks if block}
    what_if = blocks["What if they were held in"]
    assert isinstance(what_if, DataTable)
    assert ("weights", "bf16") in {row[:2] for row in what_if.rows}
    assert (
        next(row for row in what_if.rows if row[:2] == ("weights", "bf16"))[-1] == 0.7
    )
    assert isinstance(blocks["Tensors that would lose most"], HeatTable)
    lines = blocks["Gradients that underflow, at the loss scale of the time"]
    assert isinstance(lines, Lines)
    assert lines.markers[0].x == 5
    in_fp16 = lines.series[0].ys
    assert in_fp16[0] > 0.01
    assert in_fp16[1] < in_fp16[0] / 10
    report = Report(title="w", verdict=Verdict(text="w"), sections=sections)
    page = render_page(report)
    assert "exp overflows fp16" in page
    assert "layers.0&lt;b&gt;" in page


def test_nothing_watched_is_said() -> None:
    """No window, no picture."""
    (section,) = watch_sections([])
    (note,) = section.blocks
    assert isinstance(note, Note)


def test_numbers_that_are_all_zero_or_not_finite_can_be_drawn() -> None:
    """There is nothing on the axis, and the tables say why."""
    empty = window(1)
    tensors = (
        TensorWatch(
            kind="output",
            name="dead",
            format="fp16",
            num_elements=3,
            histogram=ExponentHistogram.of(torch.tensor([0.0, torch.nan, torch.inf])),
        ),
    )
    values = {name: getattr(empty, name) for name in WatchWindow.__slots__}
    sections = watch_sections([WatchWindow(**values | {"tensors": tensors})])
    assert "no numbers" in render_page(
        Report(title="w", verdict=Verdict(text="w"), sections=sections)
    )
