"""Time and peak memory of the chunked cross-entropy beside its rivals, in one process.

    OMP_NUM_THREADS=1 python benchmarks/chunked_loss.py
    python benchmarks/chunked_loss.py --json docs/accepted/chunked_loss.json

Rivals: a linear layer and torch's cross-entropy, and torch's own chunked loss where
this version has one. Each is run forward and backward; times are CPU seconds of the
process, ratios medians over interleaved turns, with quartiles; peaks are of the whole
process above what it held before the call, so they hold the gradients. The second row
is the first one again: it shows what differences mean. Errors are of the gradient of
the head against float64, chunk by chunk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from page_tables import markdown
from small_lm import head_of_record
from torch import Tensor
from torch.nn import functional

from castwise.autocast import autocast
from castwise.layers.chunked_loss import chunked_cross_entropy
from castwise.memory.monitor import MemoryMonitor, steady_allocator

MIB = 2**20
PLAIN = "linear and cross_entropy"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return what everybody writes."""
    return functional.cross_entropy(functional.linear(hidden, weight), targets)


def rivals() -> dict[str, Loss]:
    """Return each way by its name."""
    found: dict[str, Loss] = {
        PLAIN: plain,
        "the same again": plain,
        "castwise, chunked": chunked_cross_entropy,
    }
    theirs = getattr(functional, "linear_cross_entropy", None)
    if theirs is not None:
        found["torch linear_cross_entropy"] = theirs
    return found


class Bench:
    """Hidden states, a head and targets."""

    def __init__(self, tokens: int, dim: int, vocab: int) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(tokens, dim, requires_grad=True)
        self.head = (0.02 * torch.randn(vocab, dim)).requires_grad_()
        self.targets = torch.randint(vocab, (tokens,))
        self.monitor = MemoryMonitor("cpu")
        self.exact = self._exact()

    def _exact(self) -> Tensor:
        """The gradient of the head in float64, a few tokens at a time."""
        total = torch.zeros_like(self.head, dtype=torch.float64)
        head = self.head.detach().double()
        for part, targets in zip(
            self.hidden.detach().double().split(256),
            self.targets.split(256),
            strict=True,
        ):
            error = (part @ head.T).softmax(1)
            error[torch.arange(len(targets)), targets] -= 1
            total.addmm_(error.T, part, alpha=1 / len(self.hidden))
        return total.float()

    def measure(self, fmt: str, loss_of: Loss) -> tuple[float, int]:
        """CPU seconds of a forward and backward, and the peak above what there was."""
        self.hidden.grad = self.head.grad = None
        before = self.monitor.now_bytes()
        self.monitor.reset_peak()
        started = time.process_time()
        with autocast("cpu", fmt) if fmt != "fp32" else nullcontext():
            loss = loss_of(self.hidden, self.head, self.targets)
        loss.backward()
        seconds = time.process_time() - started
        return seconds, self.monitor.peak_bytes() - before

    def error(self) -> float:
        """Relative error of the gradient that the last measurement left."""
        assert self.head.grad is not None
        return float((self.head.grad - self.exact).norm() / self.exact.norm())


def measured(bench: Bench, fmt: str, turns: int) -> dict[str, dict[str, float]]:
    """Every way in one format."""
    times: dict[str, list[float]] = {name: [] for name in rivals()}
    found: dict[str, dict[str, float]] = {name: {} for name in rivals()}
    for turn in range(turns + 1):
        for name, loss_of in rivals().items():
            seconds, peak = bench.measure(fmt, loss_of)
            if turn:  # the first turn warms up
                times[name].append(seconds)
            found[name] |= {"peak_mib": peak / MIB, "error": bench.error()}
    for name, row in found.items():
        ratios = [
            mine / its for mine, its in zip(times[name], times[PLAIN], strict=True)
        ]
        low, _, high = statistics.quantiles(ratios, n=4)
        row |= {
            "seconds": statistics.median(times[name]),
            "time_ratio": statistics.median(ratios),
            "lower_quartile": low,
            "upper_quartile": high,
            "times_less": found[PLAIN]["peak_mib"] / max(1 / MIB, row["peak_mib"]),
        }
    return found


COLUMNS = ("format", "way", "time", "over the first (quartiles)", "peak", "error")


def table(record: Mapping[str, Any]) -> str:
    """A table for a page."""
    rows = []
    for fmt in ("fp32", "bf16"):
        for way, row in record[fmt].items():
            spread = f"{row['lower_quartile']:.2f} to {row['upper_quartile']:.2f}"
            rows.append(
                (
                    fmt,
                    way,
                    f"{row['seconds']:.2f} s",
                    f"{row['time_ratio']:.2f} ({spread})",
                    f"{row['peak_mib']:,.0f} MiB (1/{row['times_less']:.1f})",
                    f"{row['error']:.1e}",
                )
            )
    return markdown(COLUMNS, rows)


def main() -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=50_304)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    steady_allocator()
    bench = Bench(args.tokens, args.dim, args.vocab)
    record = head_of_record(args) | {"threads": torch.get_num_threads()}
    for fmt in ("fp32", "bf16"):
        record[fmt] = measured(bench, fmt, args.turns)
    print(table(record))
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
