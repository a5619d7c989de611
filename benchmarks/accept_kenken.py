"""Train the `small` preset and hold it against thresholds that were frozen before.

    python benchmarks/accept_kenken.py --seeds 3 --json docs/accepted/kenken.json

Seeds that the file holds, trained with the settings of today, are not trained again.
Exits with 1 when a threshold is missed. The record holds what was measured, when, with
which versions; the documentation quotes it.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from castwise.recipes.kenken.settings import PRESETS
from castwise.training.journal import read_journal

THRESHOLDS = {
    "solved_4_standard": 0.96,
    "solved_5_standard": 0.95,
    "solved_6_standard": 0.88,
    "solved_4_and_5": 0.95,
}
MODES = ("standard", "zero", "negative")


def train_once(dtype: str, seed: int) -> dict[str, float]:
    """Train in a process of its own; return the final measures."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "castwise", "train", "kenken"]
        command += ["--dtype", dtype, "--seed", str(seed), "--out", str(out)]
        subprocess.run(command, check=True, capture_output=True)
        records = read_journal(out)
    final = next(record.values for record in records if record.event == "final")
    epochs = [record.values for record in records if record.event == "epoch"]
    measured = {name: float(value) for name, value in final.items()}
    pooled = [measured[f"solved_{size}_{mode}"] for size in (4, 5) for mode in MODES]
    measured["solved_4_and_5"] = sum(pooled) / len(pooled)
    measured["train_seconds"] = epochs[-1]["train_seconds"]
    measured["peak_mib"] = max(epoch["train_peak_mib"] for epoch in epochs)
    return measured


def kept_seeds(path: Path | None, record: dict[str, Any]) -> dict[str, Any]:
    """Return the seeds that a file holds of the same settings, versions and format."""
    if path is None or not path.exists():
        return {}
    before = json.loads(path.read_text())
    same = all(
        before.get(name) == record[name] for name in ("settings", "dtype", "torch")
    )
    return dict(before["seeds"]) if same else {}


def main() -> int:
    """Train every seed, print what was measured, and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    record: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "torch": str(torch.__version__),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "dtype": flags.dtype,
        "thresholds": THRESHOLDS,
        "settings": PRESETS["small"].describe(),
        "seeds": {},
    }
    kept = kept_seeds(flags.json, record)
    missed = []
    for seed in range(flags.seeds):
        measured = kept.get(str(seed)) or train_once(flags.dtype, seed)
        record["seeds"][str(seed)] = measured
        for name, value in measured.items():
            print(f"seed {seed}: {name} {value:.4g}", flush=True)
        missed += [
            f"seed {seed}: {name} is {measured[name]:.3f}, needs {least}"
            for name, least in THRESHOLDS.items()
            if measured[name] < least
        ]
    if flags.json is not None:
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        flags.json.write_text(json.dumps(record, indent=2) + "\n")
    print("\n".join(missed) or "every threshold holds")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
