"""What skip forensics costs: while nothing is skipped, and when a step is.

    python benchmarks/forensics.py

Two runs of the same model step in turns, one with its tape and one whose tape was taken
off; medians of both in one process, in CPU seconds of one thread. A skipped step is
timed beside them.
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
NUM_STEPS = 120


def make_run(width: int, *, listens: bool) -> cw.Run:
    """A transformer of four layers in bf16."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 4), nn.Linear(width, 17))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run = cw.prepare(model, optimizer, cw.preset("bf16-mixed"), clip_norm=1.0)
    if not listens:
        run._tape.remove()  # noqa: SLF001 -- the rival is a run without forensics
    return run


def timed(
    run: cw.Run, x: torch.Tensor, y: torch.Tensor, factor: float = 1.0
) -> tuple[float, cw.Stepped | cw.Skipped]:
    """CPU seconds of one step, which other processes do not prolong; its outcome."""
    started = time.process_time()
    with run.step() as step:
        logits = run.model(x).float()
        loss = functional.cross_entropy(logits.flatten(0, 1), y.flatten()) * factor
        step.backward(loss)
    return time.process_time() - started, step.outcome


def main() -> None:
    """Print one line for each width."""
    torch.set_num_threads(1)
    print("width  without ms  with ms     idle cost  skipped step ms  in steps")
    for width in WIDTHS:
        x, y = torch.randn(8, 64, width), torch.randint(17, (8, 64))
        runs = [make_run(width, listens=listens) for listens in (False, True)]
        num_steps = NUM_STEPS if width < max(WIDTHS) else NUM_STEPS // 3
        seconds: list[list[float]] = [[], []]
        for number in range(num_steps):
            order = (0, 1) if number % 2 else (1, 0)
            for which in order:
                seconds[which].append(timed(runs[which], x, y)[0])
        without, with_it = (statistics.median(each[5:]) for each in seconds)
        # Pairs see the same noise: their difference is steadier than that of medians.
        pairs = zip(seconds[1][5:], seconds[0][5:], strict=True)
        extra = statistics.median(a - b for a, b in pairs)
        skips = [timed(runs[1], x, y, math.nan)[0] for _ in range(3)]
        skip = statistics.median(skips)
        print(
            f"{width:5d}  {1e3 * without:10.2f}  {1e3 * with_it:7.2f}  "
            f"{1e6 * extra:5.0f} us {extra / without:5.2%}  {1e3 * skip:15.1f}  "
            f"{skip / without:8.1f}"
        )


if __name__ == "__main__":
    main()
