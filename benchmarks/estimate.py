"""Estimated memory of a training step beside what a real step takes, and beside rivals.

    python benchmarks/estimate.py --jobs 2 --page       # what is not recorded yet
    python benchmarks/estimate.py --only gpt2 --tiny --json /tmp/tiny.json

Fifty-six rows: seven models in three policies and with 8-bit states, each with and
without recompute. The record is complete after each row, so that a run which was
stopped goes on where it was (`--fresh` begins anew), and several rows run side by side.
Every row is a process of its own, and in it stand, in this order:

    estimate    castwise.estimate, before anything ran, with the seconds it took
    tracker     torch.distributed._tools.MemTracker, torch's own, under fake tensors; it
                is given the casts of torch.autocast, and knows no 16-bit storage
    accelerate  its rule for Adam: four times the weights
    ledger      unique storages alive in a real step of `prepare`, to the byte
    allocator   what torch's CPU allocator handed out meanwhile, by its profiler: the
                ledger, and what kernels take and give back within one operator
    resident    by how much the kernel's high-water mark rises in a step, and what stood
                there before: blurred by pages, and by what oneDNN keeps

The ledger is the truth that a tensor-level estimate can be right about; the last two
tell what is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from allocator import most_allocated
from estimate_models import CASES, build
from page_tables import filled, markdown
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from castwise import prepare, preset
from castwise.checkpoints.durable import replace_file
from castwise.memory.estimate import estimate
from castwise.memory.estimate_fakes import fake_like, fake_model
from castwise.memory.lifetimes import tensors_within
from castwise.memory.monitor import MemoryMonitor, steady_allocator
from castwise.memory.recompute import recompute
from castwise.optim import AdamW, SweepSettings
from castwise.training.step import Run
from castwise.training.step_memory import watch_step

POLICIES = ("32-true", "bf16-mixed", "bf16-true")
KINDS = ("torch", "adamw8bit")
BLOCKS = {
    "kenken": "blocks.*",
    "resolvent": "blocks.?",
    "soliton": "be*.?",
    "gpt2": "transformer.h.?",
    "llama": "model.layers.?",
    "vit": "*layer*.?",
    "conv": "stages.?",
}
MB = 1e6
PAGE = Path(__file__).parents[1] / "docs" / "estimate.md"
RECORD = Path(__file__).parents[1] / "docs" / "accepted" / "estimate.json"


def optimizer_of(kind: str) -> Callable[[Any], torch.optim.Optimizer]:
    """Return what builds an optimizer over parameters."""
    if kind == "torch":
        return lambda weights: torch.optim.AdamW(weights, lr=1e-4)
    settings = SweepSettings(states="8bit", check_finite=False)
    return lambda weights: AdamW(weights, lr=1e-4, settings=settings)


def row(case: str, policy: str, kind: str, *, again: bool, tiny: bool) -> dict:
    """Measure one case in this process."""
    steady_allocator()
    model, batch, loss_fn = build(case, tiny=tiny)
    make = optimizer_of(kind)
    chosen = (BLOCKS[case],) if again else ()
    settings = {"optimizer": make, "recompute": chosen}
    estimate(model, batch, loss_fn, preset(policy), **settings)  # first calls load code
    start = time.perf_counter()
    told = estimate(model, batch, loss_fn, preset(policy), **settings)
    seconds = time.perf_counter() - start
    rule = None
    with contextlib.suppress(ImportError):
        from accelerate.utils import (  # noqa: PLC0415 -- an optional rival
            calculate_maximum_sizes,
        )

        rule = 4 * calculate_maximum_sizes(model)[0]
    rival = None
    if kind == "torch" and policy != "bf16-true":
        rival = tracked(model, batch, loss_fn, chosen, low=policy == "bf16-mixed")
    standing = told.standing_bytes
    if chosen:
        recompute(model, modules=chosen)
    run = prepare(model, make(list(model.parameters())), preset(policy))
    for _ in range(2):
        step(run, batch, loss_fn)
    lifetimes = watch_step(run, batch, loss_fn)
    return {
        "case": case,
        "policy": policy,
        "optimizer": kind,
        "recompute": again,
        "num_parameters": told.num_parameters,
        "estimate": told.peak_bytes,
        "estimate_saved": told.saved_bytes,
        "estimate_seconds": seconds,
        "tracker": rival,
        "accelerate": rule,
        "ledger": lifetimes.peak()[1],
        "ledger_saved": lifetimes.saved_bytes(),
        "allocator": standing + most_allocated(lambda: step(run, batch, loss_fn)),
        "resident": standing + resident(run, batch, loss_fn),
        "peak": f"{told.peak.stage} {told.peak.op} of {told.peak.module}",
    }


def step(run: Run, batch: Sequence[Any], loss_fn: Any) -> None:
    """Make one step as a plain loop does."""
    with run.step() as open_step:
        open_step.backward(loss_fn(run.model(*batch[:-1]), batch[-1]))


def resident(run: Run, batch: Sequence[Any], loss_fn: Any) -> int:
    """By how much the resident set rises within a step; the median of five."""
    monitor, rises = MemoryMonitor("cpu"), []
    for _ in range(5):
        before = monitor.now_bytes()
        with monitor.span("step"):
            step(run, batch, loss_fn)
        rises.append(monitor.readings[-1].peak_bytes - before)
    return sorted(rises)[2]


def tracked(
    model: nn.Module, batch: Any, loss_fn: Any, chosen: tuple[str, ...], *, low: bool
) -> int | None:
    """What torch's own tracker foretells; none where it fails."""
    from torch.distributed._tools.mem_tracker import (  # noqa: PLC0415 -- the rival
        MemTracker,
    )

    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            here = torch.device("cpu")
            twin, given = fake_model(model, here).module, fake_like(batch, here)
            if chosen:
                recompute(twin, modules=chosen)
            optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-4)
            tracker = MemTracker()
            inputs = {id(each): each for each in tensors_within(given)}
            tracker.track_external(twin, optimizer, *inputs.values())
            with tracker:
                for turn in range(2):
                    with torch.autocast("cpu", torch.bfloat16, enabled=low):
                        loss = loss_fn(twin(*given[:-1]), given[-1])
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    if not turn:
                        tracker.reset_mod_stats()
            peak = tracker.get_tracker_snapshot("peak")
    except (RuntimeError, AttributeError, ValueError, AssertionError) as error:
        print(f"tracker failed: {type(error).__name__}: {error}"[:160], file=sys.stderr)
        return None
    return int(next(iter(peak.values()))["Total"])


Row = tuple[str, str, str, str]
"""Case, policy, optimizer, and whether blocks are recomputed: 0 or 1."""


def all_rows(only: str | None) -> list[Row]:
    """Every row that there is, or those of one case."""
    kinds = [(policy, "torch") for policy in POLICIES] + [("bf16-true", KINDS[1])]
    return [
        (case, policy, kind, again)
        for case in (CASES if only is None else (only,))
        for policy, kind in kinds
        for again in ("0", "1")
    ]


def main() -> int:
    """Run every row that is not recorded in a process of its own; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="rows side by side")
    parser.add_argument("--limit", type=int, help="make at most so many rows")
    parser.add_argument("--json", type=Path, default=RECORD)
    parser.add_argument("--fresh", action="store_true", help="forget what is recorded")
    parser.add_argument("--page", action="store_true", help="write docs/estimate.md")
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.row:
        case, policy, kind, again = flags.row
        warnings.simplefilter("ignore")
        print(json.dumps(row(case, policy, kind, again=again == "1", tiny=flags.tiny)))
        return 0
    rows = all_rows(flags.only)
    record = _read(flags.json, tiny=flags.tiny)
    if flags.fresh:
        record["rows"] = []
    left = [each for each in rows if _of(record, each) is None]
    print(HEAD)
    with ThreadPoolExecutor(flags.jobs) as pool:
        made = [
            pool.submit(_made, each, tiny=flags.tiny) for each in left[: flags.limit]
        ]
        for each in as_completed(made):
            found = each.result()
            if found is not None:
                record["rows"].append(found)
                _write(flags.json, record)
                print(_line(found), flush=True)
    _sum_up(record["rows"])
    if flags.page:
        PAGE.write_text(filled(PAGE.read_text(), {"estimate": table(record)}))
    return 0 if all(_of(record, each) for each in rows) else 1


def _made(each: Row, *, tiny: bool) -> dict[str, Any] | None:
    """Run one row in a process of its own; none where it failed."""
    command = [sys.executable, __file__, "--row", *each, *["--tiny"] * tiny]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(*each, "failed:", done.stderr[-800:], flush=True)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _read(path: Path, *, tiny: bool) -> dict[str, Any]:
    """Return the record so far, or a new one; sizes are not mixed.

    Raises:
        SystemExit: The file holds rows of the other size.
    """
    if not path.exists():
        return {"tiny": tiny, "torch": str(torch.__version__), "rows": []}
    record: dict[str, Any] = json.loads(path.read_text())
    if record["tiny"] != tiny:
        raise SystemExit(f"{path} holds {'tiny' if record['tiny'] else 'full'} rows")
    return record


def _write(path: Path, record: dict[str, Any]) -> None:
    order = all_rows(None)
    record["rows"].sort(key=lambda found: order.index(_row_of(found)))
    record["date"] = dt.datetime.now(dt.UTC).date().isoformat()
    record["torch"] = str(torch.__version__)
    with replace_file(path) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())


def _row_of(found: dict[str, Any]) -> Row:
    again = "01"[found["recompute"]]
    return found["case"], found["policy"], found["optimizer"], again


def _of(record: dict[str, Any], each: Row) -> dict[str, Any] | None:
    """Return what is recorded of a row."""
    matching = (found for found in record["rows"] if _row_of(found) == each)
    return next(matching, None)


SIZES = ("estimate", "tracker", "accelerate", "ledger", "allocator", "resident")
HEAD = (
    f"case policy optimizer again {' '.join(SIZES)} MB | peak off, saved off, seconds"
)


def _cells(found: dict[str, Any]) -> list[str]:
    """One row as words: what it is, sizes in MB, and how far the estimate is off."""
    sizes = [
        "-" if found[name] is None else f"{found[name] / MB:.1f}" for name in SIZES
    ]
    return [
        found["case"],
        found["policy"],
        {"torch": "AdamW", "adamw8bit": "AdamW, 8 bits"}[found["optimizer"]],
        "yes" if found["recompute"] else "no",
        *sizes,
        f"{found['estimate'] / found['ledger'] - 1:+.3%}",
        f"{found['estimate_saved'] - found['ledger_saved']:+d} B",
        f"{found['estimate_seconds']:.2f} s",
    ]


def _line(found: dict[str, Any]) -> str:
    return " ".join(f"{cell:>8}" for cell in _cells(found))


COLUMNS = (
    "model",
    "policy",
    "optimizer",
    "recompute",
    *("estimate, MB", "torch's tracker", "accelerate's rule", "real step, MB"),
    *("allocator", "resident", "peak off", "saved off", "time to tell"),
)


def table(record: dict[str, Any]) -> str:
    """The table of the page."""
    return markdown(COLUMNS, [_cells(found) for found in record["rows"]])


def _sum_up(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    worst = max(abs(each["estimate"] / each["ledger"] - 1) for each in rows)
    wrong = sum(each["estimate_saved"] != each["ledger_saved"] for each in rows)
    alike = [each for each in rows if each["tracker"] is not None]
    rival = max(
        (abs(each["tracker"] / each["ledger"] - 1) for each in alike), default=0.0
    )
    print(
        f"{len(rows)} rows: peak off by at most {worst:.3%} (torch's tracker: "
        f"{rival:.2%} on its {len(alike)}); saved bytes differ in {wrong}"
    )


if __name__ == "__main__":
    sys.exit(main())
