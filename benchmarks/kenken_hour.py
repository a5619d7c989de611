"""How the `hour` preset grows, and what it solves of the frozen test sets in the end.

Train some seeds, each a run of its own, then let this room turn their folders into a
record, a picture and the table of docs/kenken.md:

    castwise train kenken --preset hour --threads 1 --seed 0 --out runs/hour/0
    python benchmarks/kenken_hour.py runs/hour/0 runs/hour/1 runs/hour/2

The curve is the quick measure of every epoch, on validation puzzles; the table is the
best checkpoint by that measure on the frozen test sets, which no run has seen, beside
what logic alone solves. Exits with 1 where a goal is missed. `--page` writes the table
anew from the record and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: one thread a process

import torch
from page_tables import filled, markdown
from pictures import picture

from castwise.checkpoints import CheckpointShelf
from castwise.errors import CheckpointError
from castwise.recipes.kenken import examining
from castwise.recipes.kenken.settings import PRESETS, KenKenSettings
from castwise.recipes.kenken.solver import KIND
from castwise.training.journal import read_journal

DOCS = Path(__file__).parents[1] / "docs"
RECORD = DOCS / "accepted" / "kenken_hour.json"
PICTURE = DOCS / "assets" / "kenken_hour.svg"
PAGE = DOCS / "kenken.md"

GOALS = {4: 0.99, 5: 0.99, 6: 0.99, 7: 0.90}
"""Share of the STANDARD test puzzles of each size that every seed has to solve."""

MOST_SECONDS = 3600.0

SHOWN = (
    "![Share of validation puzzles solved against steps, by size]"
    "(assets/kenken_hour.svg)\n"
)
COLUMNS = ("set", "seeds", "network", "least seed", "forwards", "logic", "needs", "")


def watched(folder: Path, num_puzzles: int) -> dict[str, Any]:
    """Read one run: how it grew, and what its best checkpoint solves.

    Raises:
        CheckpointError: The run is not one of the preset, or did not end.
    """
    shelf = CheckpointShelf(folder=folder / "checkpoints", kind=KIND)
    best, last = shelf.best().value, shelf.latest().value
    if best is None or last is None:
        raise CheckpointError(f"{folder} needs a checkpoint that was measured")
    settings = KenKenSettings.from_description(last.tree["facts"]["settings"])
    if last.step < settings.num_steps:
        raise CheckpointError(
            f"{folder} needs a run that ended, and stands at step {last.step} of "
            f"{settings.num_steps}; go on with castwise train kenken --resume"
        )
    epochs = [each for each in read_journal(folder) if each.event == "epoch"]
    facts, rows = examining.evaluate_checkpoint(
        checkpoint=best.path,
        runs=folder,
        sizes=settings.sizes,
        modes=examining.ALL_MODES,
        num_puzzles=num_puzzles,
        order="most_certain_first",
        data=None,
    )
    return {
        "seed": settings.seed,
        "settings": settings.describe(),
        "seconds": float(epochs[-1].values["train_seconds"])
        + float(epochs[-1].values["evaluate_seconds"]),
        "growth": [
            {
                "step": each.step,
                "seconds": float(each.values["train_seconds"]),
                **{str(n): float(each.values[f"solved_{n}"]) for n in settings.sizes},
            }
            for each in epochs
        ],
        "exam": facts,
        "sets": [
            {
                "size": row.size,
                "mode": row.mode,
                "digest": row.digest,
                "network": row.network.value,
                "interval": list(row.network.interval),
                "num": row.network.num,
                "forwards": row.forwards,
                "logic": row.propagation.value,
            }
            for row in rows
        ],
    }


def missed(record: Mapping[str, Any]) -> list[str]:
    """Say which goals are missed, by which seed."""
    found = []
    for run in record["runs"]:
        if run["seconds"] > MOST_SECONDS:
            found.append(f"seed {run['seed']} took {run['seconds']:.0f} s")
        found += [
            f"seed {run['seed']}: {each['network']:.3f} of {each['size']} x "
            f"{each['size']}, needs {_goal(each)}"
            for each in run["sets"]
            if each["network"] < _goal(each)
        ]
    return found


def _goal(found: Mapping[str, Any]) -> float:
    """Return what has to be solved of a set; 0 for those that are only shown."""
    return GOALS.get(found["size"], 0.0) if found["mode"] == "standard" else 0.0


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Share solved against steps, by size: the mean of the seeds, and each of them."""
    y_label = "validation puzzles solved from the empty grid"
    with picture(path, "step", y_label) as axes:
        for number, size in enumerate(record["runs"][0]["settings"]["sizes"]):
            courses = [
                [(point["step"], point[str(size)]) for point in run["growth"]]
                for run in record["runs"]
            ]
            for course in courses:
                axes.plot(*zip(*course, strict=True), f"C{number}", alpha=0.25, lw=0.8)
            means = [
                (points[0][0], fmean(share for _, share in points))
                for points in zip(*courses, strict=True)
            ]
            name = f"{size} x {size}"
            axes.plot(*zip(*means, strict=True), f"C{number}", marker=".", label=name)


def table(record: Mapping[str, Any]) -> str:
    """The table of the page: every frozen set, pooled and by the worst seed."""
    by_set: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for run in record["runs"]:
        for each in run["sets"]:
            by_set.setdefault((each["size"], each["mode"]), []).append(each)
    rows = []
    for (size, mode), found in by_set.items():
        least = min(each["network"] for each in found)
        needs = _goal(found[0])
        verdict = "holds" if least >= needs else "**missed**"
        rows.append(
            (
                f"{size} x {size} {mode}",
                str(len(found)),
                f"{fmean(each['network'] for each in found):.4f}",
                f"{least:.3f}",
                f"{fmean(each['forwards'] for each in found):.1f}",
                f"{found[0]['logic']:.3f}",
                f">= {needs:.2f}" if needs else "shown",
                verdict if needs else "",
            )
        )
    return "\n".join([SHOWN, markdown(COLUMNS, rows), _footing(record)])


def _footing(record: Mapping[str, Any]) -> str:
    minutes = ", ".join(f"{run['seconds'] / 60:.0f}" for run in record["runs"])
    first = record["runs"][0]
    return (
        f"{first['settings']['num_steps']:,} steps; minutes by seed, evaluations "
        f"included: {minutes}, {record['note']}; {first['sets'][0]['num']:,} puzzles a "
        f"set; torch {record['torch']}, {record['date']}.\n"
    )


def main() -> int:
    """Read the runs, examine them, write record, picture and page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="runs of the preset")
    parser.add_argument("--count", type=int, default=1000, help="puzzles of each set")
    parser.add_argument("--note", default="one thread each, side by side on two cores")
    parser.add_argument("--json", type=Path, default=RECORD)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--page", action="store_true", help="run nothing")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    if flags.page:
        record = json.loads(flags.json.read_text())
    else:
        record = {
            "date": datetime.now(UTC).date().isoformat(),
            "torch": str(torch.__version__),
            "note": flags.note,
            "goals": {str(size): share for size, share in GOALS.items()},
            "runs": [watched(folder, flags.count) for folder in flags.folders],
        }
        asked = PRESETS["hour"].describe() | {"seed": None}
        if any(run["settings"] | {"seed": None} != asked for run in record["runs"]):
            print("note: a run has other settings than the preset has today")
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        flags.json.write_text(json.dumps(record, indent=1) + "\n")
    draw(record, flags.picture)
    print(table(record))
    if flags.json == RECORD:
        PAGE.write_text(filled(PAGE.read_text(), {"kenken_hour": table(record)}))
    goals = missed(record)
    print("\n".join(goals) or "every goal is reached")
    return 1 if goals else 0


if __name__ == "__main__":
    sys.exit(main())
