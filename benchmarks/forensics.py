"""What skip forensics costs: while nothing is skipped, and when a step is.

    python benchmarks/forensics.py

The tape listens to calls of the model and to functions of torch after it, so its cost
is the same for a small model and a large one. It is measured where it shows best: two
runs of one linear layer step in turns, one whose tape was taken off. Beside it stand
steps of transformers, finite and skipped. All in CPU seconds of one thread.
"""

from __future__ import annotations

import math
import statistics
import time

import torch
from torch import nn
from torch.nn import functional

import castwise as cw

WIDTHS = (32, 128, 256)
NUM_TURNS = 1500
NUM_STEPS = 20


def make_run(model: nn.Module) -> cw.Run:
    """A run in bf16 with clipping."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return cw.prepare(model, optimizer, cw.preset("bf16-mixed"), clip_norm=1.0)


def transformer(width: int) -> nn.Module:
    """Four layers and a head."""
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 4), nn.Linear(width, 17))


def timed(run: cw.Run, x: torch.Tensor, y: torch.Tensor, factor: float = 1.0) -> float:
    """CPU seconds of one step, which other processes do not prolong."""
    started = time.process_time()
    with run.step() as step:
        logits = run.model(x).float()
        loss = functional.cross_entropy(logits.flatten(0, 1), y.flatten()) * factor
        step.backward(loss)
    return time.process_time() - started


def idle_cost() -> float:
    """CPU seconds that the tape adds to a step."""
    runs = [make_run(nn.Linear(8, 17)) for _ in range(2)]
    runs[0]._tape.remove()  # noqa: SLF001 -- the rival is a run without forensics
    x, y = torch.randn(2, 4, 8), torch.randint(17, (2, 4))
    differences = []
    for number in range(NUM_TURNS):
        order = (0, 1) if number % 2 else (1, 0)
        seconds = {which: timed(runs[which], x, y) for which in order}
        differences.append(seconds[1] - seconds[0])
    return statistics.median(differences[50:])


def main() -> None:
    """Print one line for each width."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    idle = idle_cost()
    print(f"the tape adds {1e6 * idle:.0f} us to a step")
    print("width   step ms   idle cost   skipped step ms   in steps")
    for width in WIDTHS:
        run = make_run(transformer(width))
        x, y = torch.randn(8, 64, width), torch.randint(17, (8, 64))
        step = statistics.median([timed(run, x, y) for _ in range(NUM_STEPS)][3:])
        skip = statistics.median(timed(run, x, y, math.nan) for _ in range(3))
        print(
            f"{width:5d}  {1e3 * step:8.1f}  {idle / step:10.2%}  "
            f"{1e3 * skip:16.0f}  {skip / step:9.1f}"
        )


if __name__ == "__main__":
    main()
