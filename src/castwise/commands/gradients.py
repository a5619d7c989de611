"""`castwise gradients`: how large every gradient is, and which loss scale fits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from castwise.commands.options import (
    FAILURE,
    SUCCESS,
    chosen_policy,
    evidence_command,
    write_evidence,
)

if TYPE_CHECKING:
    from castwise.graph import GradientFlow
    from castwise.report import Report

FORMATS = ("fp16", "bf16", "fp8_e5m2", "fp8_e4m3")
MOST_LOST = 0.01
"""A verdict is negative where some gradient loses a larger share than this."""


@evidence_command("gradients")
@click.option(
    "--format",
    "fmt",
    type=click.Choice(FORMATS),
    default="fp16",
    show_default=True,
    help="The format that a loss scale is suggested for.",
)
@click.option(
    "--sample",
    type=click.IntRange(min=0),
    default=4096,
    show_default=True,
    help="Numbers counted of each gradient; 0 counts all.",
)
def command(
    target: str,
    policy: Path | None,
    preset: str | None,
    fmt: str,
    sample: int,
    json_path: Path | None,
    report_path: Path | None,
) -> int:
    """Count the gradients of one batch by exponent, and suggest a static loss scale.

    The first batch runs forward and backward in fp32; the policy tells which gradients
    will come in a low format, and those limit the scale. Leaves with 1 where a gradient
    would lose more than 1 % of its numbers at that scale.
    """
    from rich.console import Console

    from castwise.graph import gradient_flow
    from castwise.numerics.target import load_target

    found = load_target(target)
    flow = gradient_flow(
        found.model,
        found.batches[0],
        found.loss_fn,
        chosen_policy(policy, preset),
        sample=sample or None,
    )
    verdict, holds = judged(flow, fmt)
    write_evidence(
        flow.record(), json_path, lambda: report_of(target, flow, fmt), report_path
    )
    console = Console()
    for line in (verdict, *_lines(flow, fmt)):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    return SUCCESS if holds else FAILURE


def judged(flow: GradientFlow, fmt: str) -> tuple[str, bool]:
    """Say in one sentence which scale fits, and whether little is lost at it."""
    scale = flow.suggest_scale(fmt)
    text = f"static loss scale 2^{math.log2(scale.value):.0f}: {scale.because}"
    return text, flow.underflow(scale.value, fmt) <= MOST_LOST


def _lines(flow: GradientFlow, fmt: str) -> list[str]:
    """The modules that would lose most at that scale."""
    scale = flow.suggest_scale(fmt).value
    noise = sum(node.is_noise for node in flow.nodes)
    counts = (
        f"{len(flow.nodes)} gradients, {len(flow.telling)} in a low format, "
        f"{noise} noise"
    )
    worst = sorted(flow.telling, key=lambda node: -node.shares(fmt, scale)[0])
    shares = ((node, node.shares(fmt, scale)[0]) for node in worst[:5])
    losses = (f"{100 * lost:.2g} % lost of {node}" for node, lost in shares if lost)
    return [f"  {line}" for line in (counts, *losses)]


def report_of(target: str, flow: GradientFlow, fmt: str) -> Report:
    """Arrange the gradients for a reader."""
    from castwise.report import Report, Tile, Verdict
    from castwise.report.gradient_sections import gradient_sections

    text, holds = judged(flow, fmt)
    scale = flow.suggest_scale(fmt).value
    return Report(
        title=f"Gradients of {target}",
        verdict=Verdict(
            text=f"{text[0].upper()}{text[1:]}.", mark="good" if holds else "bad"
        ),
        tiles=(
            Tile(name="Suggested scale", value=f"2^{math.log2(scale):.0f}", detail=fmt),
            Tile(
                name="Nothing overflows up to",
                value=f"2^{math.log2(flow.largest_scale(fmt)):.0f}",
            ),
            Tile(
                name="Worst gradient loses",
                value=f"{100 * flow.underflow(scale, fmt):.2g} %",
                detail=f"{100 * flow.underflow(1.0, fmt):.2g} % without a scale",
            ),
            Tile(
                name="Gradients",
                value=f"{len(flow.nodes)}",
                detail=f"{sum(node.is_noise for node in flow.nodes)} of them noise",
            ),
        ),
        sections=gradient_sections(flow, fmt),
    )
