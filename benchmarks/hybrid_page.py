"""Tables of docs/hybrid.md from docs/accepted/hybrid.json, and nothing else.

    castwise bench hybrid softmax physics ... --out docs/accepted/hybrid.json
    python benchmarks/hybrid_page.py

A bench that the record lacks is left out; without any, a table says that nothing was
measured.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from page_tables import filled, markdown

from castwise.hybrid.bench.controls import Control, conclusion
from castwise.hybrid.bench.notes import read_notes
from castwise.hybrid.bench.race import ratio, values_of, verdict
from castwise.policy import PHASES

ROOT = Path(__file__).parents[1]
PAGE, RECORD = ROOT / "docs" / "hybrid.md", ROOT / "docs" / "accepted" / "hybrid.json"
RACES = {
    "softmax": "softmax, momentum 0.9",
    "full_batch": "softmax, momentum tuned",
    "curve": "curve",
    "physics": "physics-informed",
    "minibatch": "batches of 64",
    "large_batch": "batches of 1,024",
    "fine_tuning": "fine-tuning",
    "late_training": "late training",
}
"""Bench -> what a reader calls it."""


def main() -> None:
    """Write the page."""
    made = tables(read_notes(RECORD))
    PAGE.write_text(filled(PAGE.read_text("utf-8"), made), "utf-8")
    sys.stdout.write(f"{PAGE} is written from {RECORD}\n")


def tables(record: Mapping[str, Any]) -> dict[str, str]:
    """Return every table of the page by its name."""
    benches = {name: part["record"] for name, part in record.items()}
    made = {
        "races": _races(benches),
        "points": _points(benches),
        "conclusions": _conclusions(benches),
        "controls": _controls(benches),
        "stacking": _stacking(benches),
    }
    return {name: table or "Not measured yet.\n" for name, table in made.items()}


def _races(benches: Mapping[str, Any]) -> str:
    """Time of every method over that of plain, medians over seeds."""
    names = [name for name in RACES if name in benches]
    runs = {name: benches[name]["runs"] for name in names}
    methods = list(dict.fromkeys(m for name in names for m in runs[name]))
    rows = []
    for method in methods:
        cells = [_race_cell(runs[name], method) for name in names]
        rows.append([f"`{method}`", *cells])
    return markdown(["", *(RACES[name] for name in names)], rows) if names else ""


def _race_cell(found: Mapping[str, Any], method: str) -> str:
    if method not in found:
        return ""
    seconds = statistics.median(values_of(found, method, "seconds"))
    passes = statistics.median(values_of(found, method, "backwards"))
    if math.isinf(seconds):
        return "not reached"
    if method == "plain":
        return f"{passes:.0f} passes, {seconds:.2f} s"
    of_passes = ratio(found, method, "backwards")
    of_time = ratio(found, method, "seconds")
    bold = "**" if verdict(found, method).startswith("gain") else ""
    return f"{of_passes:.2f}, {bold}{of_time:.2f}{bold}"


def _points(benches: Mapping[str, Any]) -> str:
    """Rate, momentum and schedule that every method was given."""
    names = [name for name in RACES if name in benches]
    runs = {name: benches[name]["runs"] for name in names}
    methods = list(dict.fromkeys(m for name in names for m in runs[name]))
    rows = [
        [f"`{method}`", *(_point_cell(runs[name].get(method)) for name in names)]
        for method in methods
    ]
    return markdown(["", *(RACES[name] for name in names)], rows) if names else ""


def _point_cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    point, edge = found["point"], "*" if found["edge"] else ""
    fall = f", falls over {point['decay']}" if point["decay"] else ""
    return f"{point['rate']:.3g}{edge}, {point['momentum']:.3g}{fall}"


def _conclusions(benches: Mapping[str, Any]) -> str:
    lines = [
        f"- *{title}*: {conclusion(benches[name]['runs'])}.\n"
        for name, title in RACES.items()
        if name in benches
    ]
    return "".join(lines)


def _controls(benches: Mapping[str, Any]) -> str:
    rows = []
    for name, bench in benches.items():
        for plain in bench["controls"]:
            control = Control(
                name=plain["name"],
                value=_number(plain["value"], math.inf),
                least=_number(plain["least"], -math.inf),
                most=_number(plain["most"], math.inf),
            )
            is_finite = math.isfinite(control.value)
            found = f"{control.value:.3g}" if is_finite else "not reached"
            rows.append([name, control.name, found, control.wanted, control.word])
    columns = ["bench", "control", "found", "wanted", ""]
    return markdown(columns, rows) if rows else ""


def _number(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _stacking(benches: Mapping[str, Any]) -> str:
    """MiB by phase and the peak over vanilla fp32."""
    if "stacking" not in benches:
        return ""
    arms = benches["stacking"]["runs"]
    first = max(next(iter(arms.values()))["phases"].values())
    rows = []
    for arm, found in arms.items():
        peaks = found["phases"]
        cells = [f"{peaks[p] / 2**20:.0f}" if p in peaks else "" for p in PHASES]
        rows.append([arm, *cells, f"{max(peaks.values()) / first:.2f}"])
    return markdown(["", *PHASES, "peak over the first"], rows)


if __name__ == "__main__":
    main()
