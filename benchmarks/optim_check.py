"""Where to look for overflow: in the backward, at each gradient, or before the step.

    python benchmarks/optim_check.py [--width 2048] [--layers 12] [--rounds 15]

A gradient that the backward has just written might still be in the cache, so that a
hook on its parameter could check it for nothing. This measures it: the same backward
with and without hooks that run the sweep's own check on each gradient, and the check of
all gradients before a step, as the sweep does it. Turn by turn, in one thread, which is
what hooks run in; CPU time of the thread, so that other programs count for less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from castwise.optim import AdamW, hold_weights
from castwise.optim.machine_table import MachineSweeper


def timed(work: Callable[[], Any]) -> float:
    """Return the milliseconds that some work takes of this thread."""
    start = time.thread_time()
    work()
    return (time.thread_time() - start) * 1e3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=64, help="of a batch")
    parser.add_argument("--rounds", type=int, default=15)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    width = settings.width
    layers = [torch.nn.Linear(width, width, bias=False) for _ in range(settings.layers)]
    model = torch.nn.Sequential(*layers)
    optimizer = AdamW(model.parameters())
    held = hold_weights(optimizer)
    batch = torch.randn(settings.rows, width, dtype=torch.bfloat16)
    times: dict[str, list[float]] = defaultdict(list)

    def check(parameter: torch.Tensor) -> None:
        one = optimizer._swept_one(parameter, optimizer.param_groups[0], "one")  # noqa: SLF001 -- what a hook of ours would do
        sweeper = MachineSweeper([one])
        times["checks in the hooks"][-1] += timed(sweeper.nonfinite)

    for _ in range(settings.rounds + 1):
        for hooked in (False, True):
            optimizer.zero_grad()
            times["checks in the hooks"].append(0.0)
            handles = [
                weight.register_post_accumulate_grad_hook(check)
                for weight in model.parameters()
                if hooked
            ]
            loss = model(batch).float().square().mean()
            took = timed(loss.backward)
            times["backward, hooked" if hooked else "backward"].append(took)
            for each in handles:
                each.remove()
            if not hooked:
                times["checks in the hooks"].pop()
        sweeper = MachineSweeper(optimizer._swept())  # noqa: SLF001 -- its check alone
        times["check before the step"].append(timed(sweeper.nonfinite))
    size = sum(weight.numel() for weight in model.parameters())
    print(
        f"{size:,} parameters, {held.bytes_per_parameter():.0f} bytes of weights each"
    )
    for name, taken in times.items():
        rest = sorted(taken[1:])  # the first one compiles
        print(f"{name:24}{rest[0]:9.2f} ms least{statistics.median(rest):9.2f} median")


if __name__ == "__main__":
    main()
