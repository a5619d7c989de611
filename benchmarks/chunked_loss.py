"""Time and peak memory of the chunked cross-entropy beside its rivals, in one process.

    OMP_NUM_THREADS=1 python benchmarks/chunked_loss.py

Rivals: a linear layer and torch's cross-entropy, and torch's own chunked loss where
this version has one. Each is run forward and backward; times are medians of interleaved
turns, peaks are of the whole process above what it held before the call. The first row
is the loss against itself: it shows what the differences mean.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional

from castwise.autocast import autocast
from castwise.layers.chunked_loss import chunked_cross_entropy
from castwise.memory.monitor import MemoryMonitor, steady_allocator

MIB = 2**20
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return what everybody writes."""
    return functional.cross_entropy(functional.linear(hidden, weight), targets)


def rivals() -> dict[str, Loss]:
    """Return each way by its name."""
    found: dict[str, Loss] = {
        "linear + cross_entropy": plain,
        "linear + cross_entropy, again": plain,
        "castwise, chunked": chunked_cross_entropy,
    }
    theirs = getattr(functional, "linear_cross_entropy", None)
    if theirs is not None:
        found["torch linear_cross_entropy"] = theirs
    return found


def main() -> None:
    """Measure, and print one row for each way and format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=50_304)
    parser.add_argument("--turns", type=int, default=3)
    flags = parser.parse_args()
    steady_allocator()
    torch.manual_seed(0)
    hidden = torch.randn(flags.tokens, flags.dim, requires_grad=True)
    head = (0.02 * torch.randn(flags.vocab, flags.dim)).requires_grad_()
    targets = torch.randint(flags.vocab, (flags.tokens,))
    monitor = MemoryMonitor("cpu")
    print(f"{flags.tokens} tokens, D={flags.dim}, V={flags.vocab}")
    for fmt in ("fp32", "bf16"):
        times: dict[str, list[float]] = {name: [] for name in rivals()}
        peaks: dict[str, int] = {}
        losses: dict[str, float] = {}
        for turn in range(flags.turns + 1):
            for name, loss_of in rivals().items():
                hidden.grad = head.grad = None
                before = monitor.now_bytes()
                monitor.reset_peak()
                started = time.perf_counter()
                with autocast("cpu", fmt) if fmt != "fp32" else nullcontext():
                    loss = loss_of(hidden, head, targets)
                loss.backward()
                seconds = time.perf_counter() - started
                peaks[name] = monitor.peak_bytes() - before
                losses[name] = float(loss.detach())
                del loss
                if turn:  # the first turn warms up
                    times[name].append(seconds)
        first = next(iter(times))
        for name, each in times.items():
            middle = statistics.median(each)
            share = middle / statistics.median(times[first])
            print(
                f"{fmt}  {name:32s} loss {losses[name]:.6f}  "
                f"{middle:7.2f} s  x{share:.2f}  peak {peaks[name] / MIB:7.0f} MiB  "
                f"1/{peaks[first] / peaks[name]:.1f}"
            )


if __name__ == "__main__":
    main()
