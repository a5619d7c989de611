"""`castwise watch`: train a few steps, and tell where numbers underflow or get lost."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from castwise.commands.options import (
    FAILURE,
    SUCCESS,
    chosen_policy,
    evidence_command,
    write_evidence,
)

if TYPE_CHECKING:
    from castwise.numerics.target import Target
    from castwise.numerics.watch.windows import WatchWindow
    from castwise.report import Report
    from castwise.training.step import Run

MOST_LOST = 0.5
"""A verdict is negative where more updates than this share round to nothing."""


@evidence_command("watch")
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Steps to train, over the target's batches again and again.",
)
@click.option(
    "--every",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Steps from one that is looked at to the next.",
)
@click.option(
    "--sentinel", is_flag=True, help="Take bad steps back, and promote modules."
)
def command(
    target: str,
    policy: Path | None,
    preset: str | None,
    steps: int,
    every: int,
    sentinel: bool,
    json_path: Path | None,
    report_path: Path | None,
) -> int:
    """Train some steps under a policy and watch the numbers.

    Counts weights, gradients and outputs by exponent, which tells what underflows or
    overflows in the formats that run and in others, and which updates round to nothing.
    Leaves with 1 where numbers are not finite at the end, or most updates are lost.
    """
    from rich.console import Console

    from castwise.errors import TargetError
    from castwise.numerics.target import load_target
    from castwise.training.step import prepare

    chosen = chosen_policy(policy, preset)
    found = load_target(target)
    if found.optimizer is None:
        raise TargetError(
            f"a watch needs the optimizer that trains the model, and {target} returns "
            "none; return it fourth"
        )
    run = prepare(found.model, found.optimizer, chosen)
    windows = _watched(found, run, steps, every, guarded=sentinel)
    write_evidence(
        _record(run, windows),
        json_path,
        lambda: report_of(target, run, windows),
        report_path,
    )
    console = Console()
    verdict, holds = judged(windows)
    console.print(verdict, highlight=False, soft_wrap=True, markup=False)
    for line in _lines(run, windows):
        console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
    return SUCCESS if holds else FAILURE


def _watched(
    found: Target, run: Run, steps: int, every: int, *, guarded: bool
) -> list[WatchWindow]:
    """Train, and return what was counted."""
    from castwise.numerics.watch import WatchSchedule, watch
    from castwise.training.sentinel import Sentinel, SentinelSettings

    every = min(every, steps)
    schedule = WatchSchedule(every=every, first=(steps - 1) % every)
    guard = Sentinel(run, SentinelSettings(probe_every=every)) if guarded else None
    with watch(run, schedule=schedule) as watching:
        for batch in itertools.islice(itertools.cycle(found.batches), steps):
            *inputs, wanted = batch

            def compute(inputs: Any = inputs, wanted: Any = wanted) -> Any:
                return found.loss_fn(found.model(*inputs), wanted)

            if guard is not None:
                guard.step(compute)
            else:
                with run.step() as step:
                    step.backward(compute())
    return watching.windows


def judged(windows: list[WatchWindow]) -> tuple[str, bool]:
    """Say in one sentence what came out, and whether it is good."""
    last = windows[-1]
    measures = last.measures()
    lost = last.lost_updates()
    steps = f"after step {last.last_step + 1}"
    if measures["nonfinite"] > 0:
        share = 100 * measures["nonfinite"]
        return f"{steps}, {share:.2g} % of the numbers are not finite", False
    if lost is not None and lost > MOST_LOST:
        return f"{steps}, {100 * lost:.0f} % of the updates round to nothing", False
    kept = "none is told" if lost is None else f"{100 * lost:.2g} % of the updates lost"
    return f"{steps}, all numbers are finite, {kept}", True


def _lines(run: Run, windows: list[WatchWindow]) -> list[str]:
    last = windows[-1]
    gradients = last.total("gradient", "output_gradient")
    lines = [run.precision.summary()]
    scale = last.largest_scale("fp16")
    for fmt in ("fp16", "bf16"):
        share = 100 * gradients.shares(fmt, last.scale).underflow
        line = f"gradients that underflow in {fmt}: {share:.2g} %"
        if fmt == "fp16" and scale is not None:
            best = 100 * gradients.shares(fmt, scale).underflow
            line += f", {best:.2g} % at the largest safe loss scale {scale:g}"
        lines.append(line)
    lines += [f"skipped: {each.because}" for each in run.history.skips[-3:]]
    lines += [f"changed: {change}" for change in run.changes]
    return lines


def _record(run: Run, windows: list[WatchWindow]) -> dict[str, Any]:
    from castwise.training.overrides import records

    return {
        "windows": [window.record() for window in windows],
        "changes": records(run.changes),
        "skipped": run.num_skipped,
        "stepped": run.num_stepped,
    }


def report_of(target: str, run: Run, windows: list[WatchWindow]) -> Report:
    """Arrange what was watched for a reader."""
    from castwise.report import Report, Tile, Verdict
    from castwise.report.watched import Promotion, watch_sections

    text, holds = judged(windows)
    last = windows[-1]
    scale = last.largest_scale("fp16")
    gradients = last.total("gradient", "output_gradient").shares("fp16", last.scale)
    lost = last.lost_updates()
    promotions = [
        Promotion(
            step=change.step,
            module=change.module,
            precision=change.precision or "as the policy says",
            because=change.because,
        )
        for change in run.changes
    ]
    return Report(
        title=f"Watch over {target}",
        subtitle=run.precision.summary(),
        verdict=Verdict(text=text.capitalize(), mark="good" if holds else "bad"),
        tiles=(
            Tile(
                name="Updates lost",
                value="-" if lost is None else f"{100 * lost:.3g} %",
                detail="weights held with their remainder" if lost is None else "",
            ),
            Tile(
                name="Gradients that underflow",
                value=f"{100 * gradients.underflow:.3g} %",
                detail=f"in fp16, at the loss scale {last.scale:g}",
            ),
            Tile(
                name="Largest safe loss scale",
                value="-" if scale is None else f"{scale:g}",
                detail="for fp16, in the last window",
            ),
            Tile(
                name="Steps",
                value=f"{run.num_stepped}",
                detail=f"skipped: {run.num_skipped}; changes of the policy: "
                f"{len(run.changes)}",
            ),
        ),
        sections=watch_sections(windows, promotions),
    )
