"""Does a run on two processes reach the loss of one, as near as order of sums allows?

    python benchmarks/loss_on_ranks.py --steps 20

The noise floor is measured, not assumed, in two ways. One process trains on the same
batches with their rows in other orders: what no two correct programs can be expected
to stay below in fp32. And the distance of a 16-bit run from the same run in fp32 is
what rounding to that format does by itself: each process rounds the gradient of its own
rows, so two processes round twice where one rounds once. Two processes, by DDP and by
FSDP2, are then held against both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SHUFFLED = """
import sys, torch
from castwise.recipes.kenken.batches import PuzzleBatch
order = int(sys.argv.pop(1))
def part(self, ranks):
    lot = torch.Generator().manual_seed(order)
    return self.select(torch.randperm(len(self), generator=lot)) if order else self
PuzzleBatch.part = part
from castwise.cli import main
main()
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def losses(folder: Path) -> dict[str, float]:
    """Loss of the last step, and on validation puzzles."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    found = {line["event"]: line for line in lines}
    return {
        "train": found["train"]["loss"],
        "validation": found["epoch"]["validation_loss"],
    }


def run(words: list[str], folder: Path) -> dict[str, float]:
    """Train in a process of its own."""
    subprocess.run(
        [sys.executable, *words, "--out", str(folder)],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return losses(folder)


def main() -> None:
    """Print the noise floor and the distance of two processes, by format."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--orders", type=int, default=4)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    asked = parser.parse_args()
    steps = str(asked.steps)
    flags = ["train", "kenken", "--preset", "tiny", "--threads", "1", "--steps", steps]
    wide: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as kept:
        for dtype in asked.dtypes:
            words, place = [*flags, "--dtype", dtype], Path(kept) / dtype
            one = [
                run(["-c", SHUFFLED, str(order), *words], place / str(order))
                for order in range(asked.orders)
            ]
            wide = wide or one[0]
            for name, here in one[0].items():
                floor = max(abs(other[name] - here) for other in one)
                apart = abs(here - wide[name])
                print(f"{dtype} {name}: {here:.7f}, rows in other orders {floor:.1e}")
                if apart:
                    print(f"{dtype} {name}: {apart:.1e} from {asked.dtypes[0]}")
            for strategy in ("ddp", "fsdp"):
                two = run(
                    [*TORCHRUN, "-m", "castwise", *words, "--strategy", strategy],
                    place / strategy,
                )
                for name, here in one[0].items():
                    print(f"  {strategy} {name}: {two[name] - here:+.1e}")


if __name__ == "__main__":
    main()
