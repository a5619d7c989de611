"""bf16 against fp32 on the KenKen run: step time, loss, solved rate, peak memory.

    python benchmarks/kenken_precision.py --steps 40          # interleaved step times
    python benchmarks/kenken_precision.py --runs 1            # and paired whole runs

Step times are medians of both precisions, interleaved in one process on the same
batches. Whole runs are processes of their own with the same seed, one after another.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import castwise as cw
from castwise.recipes.kenken.model import KenKenModel, model_settings
from castwise.recipes.kenken.settings import settings_of
from castwise.recipes.kenken.supply import default_folder, open_supply
from castwise.recipes.kenken.task import KenKenTask
from castwise.training.journal import read_journal

DTYPES = {"fp32": "32-true", "bf16": "bf16-mixed"}


def step_times(num_steps: int) -> dict[str, list[float]]:
    """Time steps of both precisions in turn, on the same batches, in milliseconds."""
    settings = settings_of("small", {})
    supply = open_supply(settings, default_folder(), progress=lambda *_: None)
    tasks = {}
    for dtype, preset in DTYPES.items():
        torch.manual_seed(0)
        model = KenKenModel(model_settings(settings.model))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        run = cw.prepare(model, optimizer, cw.preset(preset), clip_norm=1.0)
        task = KenKenTask(
            run=run,
            model=model,
            supply=supply,
            settings=settings,
            device=torch.device("cpu"),
        )
        tasks[dtype] = (run, task)
    times: dict[str, list[float]] = {dtype: [] for dtype in tasks}
    for number in range(num_steps + 3):
        for dtype, (run, task) in tasks.items():
            batch = task.batch(number)
            started = time.perf_counter()
            with run.step() as step:
                step.backward(task.loss(batch).value)
            if number >= 3:
                times[dtype].append(1e3 * (time.perf_counter() - started))
    return times


def whole_run(dtype: str, seed: int, steps: int | None) -> dict[str, float]:
    """Train once in a process of its own; return what its journal ends with."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "castwise", "train", "kenken"]
        command += ["--dtype", dtype, "--seed", str(seed), "--out", str(out)]
        if steps is not None:
            command += ["--steps", str(steps)]
        subprocess.run(command, check=True, capture_output=True)
        records = read_journal(out)
    epochs = [record.values for record in records if record.event == "epoch"]
    train = [record.values for record in records if record.event == "train"]
    final = next(record.values for record in records if record.event == "final")
    return {
        "train_loss": statistics.fmean(line["loss"] for line in train[-10:]),
        "validation_loss": epochs[-1]["validation_loss"],
        "train_seconds": epochs[-1]["train_seconds"],
        "step_ms": statistics.median(line["step_ms"] for line in train),
        "peak_mib": max(epoch["train_peak_mib"] for epoch in epochs),
        **{name: final[name] for name in final if name.startswith("solved")},
    }


def main() -> None:
    """Print a table and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="interleaved steps")
    parser.add_argument("--runs", type=int, default=0, help="paired whole runs")
    parser.add_argument("--run-steps", type=int, help="updates of each whole run")
    parser.add_argument("--json", type=Path, help="where to write the record")
    flags = parser.parse_args()
    times = step_times(flags.steps)
    record: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "torch": str(torch.__version__),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "step_ms": {},
        "runs": {},
    }
    for dtype, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        record["step_ms"][dtype] = [low, middle, high]
        print(f"{dtype}: {middle:.1f} ms a step (quartiles {low:.1f} to {high:.1f})")
    ratio = record["step_ms"]["bf16"][1] / record["step_ms"]["fp32"][1]
    print(f"bf16 takes {ratio:.2f} of the time of fp32")
    for seed in range(flags.runs):
        for dtype in DTYPES:
            found = whole_run(dtype, seed, flags.run_steps)
            record["runs"][f"{dtype} seed {seed}"] = found
            told = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
            print(f"{dtype} seed {seed}: {told}", flush=True)
    if flags.json is not None:
        flags.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
