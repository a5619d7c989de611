"""Does a run on two processes reach the loss of one, as near as order of sums allows?

    python benchmarks/loss_on_ranks.py --steps 10 --orders 3
    python benchmarks/loss_on_ranks.py --recipe resolvent_lm --steps 10 --orders 3

The noise floor is measured, not assumed, in two ways. One process trains on the same
batches with their rows in other orders: what no two correct programs can be expected
to stay below in fp32. And the distance of a 16-bit run from the same run in fp32 is
what rounding to that format does by itself: each process rounds the gradient of its own
rows, so two processes round twice where one rounds once. Two processes, by DDP and by
FSDP2, are then held against both.

The language models train on CPython's language reference, in windows of 64 bytes.
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
order = int(sys.argv.pop(1))

def lot(num_rows):
    drawn = torch.Generator().manual_seed(order)
    same = torch.arange(num_rows)
    return torch.randperm(num_rows, generator=drawn) if order else same

if "kenken" in sys.argv:
    from castwise.recipes.kenken.batches import PuzzleBatch
    PuzzleBatch.part = lambda self, ranks: self.select(lot(len(self)))
elif "resolvent_lm" in sys.argv:
    from castwise.recipes.language.token_file import TokenBatch
    TokenBatch.part = lambda self, ranks: TokenBatch(
        tokens=self.tokens[lot(len(self.tokens))],
        targets=self.targets[lot(len(self.tokens))],
    )
else:
    from castwise.recipes.soliton_lm.module import SolitonModule
    SolitonModule.share_of = lambda self, batch: (
        batch.tokens[lot(len(batch.tokens))], batch.targets[lot(len(batch.tokens))]
    )
from castwise.cli import main
main()
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SMALL = """
text: {sequence_length: 64, batch_size: 8}
training: {num_validation: 16, log_every: 1}
"""
PRESETS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def losses(folder: Path) -> dict[str, float]:
    """Loss of the last step, and on what the model is measured on."""
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


def flags_of(recipe: str, steps: int, kept: Path) -> list[str]:
    """Return the command that every run of a recipe shares."""
    if recipe == "kenken":
        size = ["--preset", "tiny"]
    else:
        config = kept / "small.yaml"
        config.write_text(SMALL)
        size = ["--config", str(config)]
    return ["train", recipe, *size, "--threads", "1", "--steps", str(steps)]


def main() -> None:
    """Print the noise floor and the distance of two processes, by format."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="kenken")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--orders", type=int, default=4)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    asked = parser.parse_args()
    wide: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as kept:
        flags = flags_of(asked.recipe, asked.steps, Path(kept))
        for dtype in asked.dtypes:
            words = [*flags, "--precision", PRESETS[dtype]]
            place = Path(kept) / dtype
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
