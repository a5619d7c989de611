"""Saved activations: bytes, gradient error and time of each way, in one process.

A transformer language model (width 256, 2 layers by default, dropout 0) makes a forward
and a backward in turns, each way right after torch's own:

    fp32 / torch.autocast       what castwise is compared with
    fp16, bf16, int8            saves stored in that format (`store_saves`)
    derived                     saves that one cheap operator computes again
    derived + fp16              both
    recompute                   every block run again
    checkpoint                  torch.utils.checkpoint around every block: the rival
    file                        saves in an unlinked file (`offload_saves`)

Bytes are counted, not sampled: of each storage alive (`castwise.memory.lifetimes`).
`held` is what waits between forward and backward, `peak` the most at any instant, both
above weights and batch. Errors are against the same model in float64. Times are CPU
seconds of the process: medians of the ratios of neighbouring turns, with quartiles;
`again` is the plain way once more, which shows what differences mean. Left alone, glibc
gives large blocks back and faults them in again, in one way more than in another and in
some runs; `--keep-blocks` makes it keep them.

    python benchmarks/saves.py --keep-blocks --json docs/accepted/saves.json --page
    python benchmarks/saves.py --turns 2 --width 64
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from autocast import keep_blocks
from page_tables import filled, markdown
from small_lm import (
    LanguageModel,
    draw_tokens,
    head_of_record,
    lifetimes_of,
    time_ratio,
    token_loss,
    torch_checkpoints,
)
from torch import Tensor

import castwise as cw

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
FOLDER = tempfile.gettempdir()
WAYS: dict[str, Callable[[LanguageModel], contextlib.AbstractContextManager[Any]]] = {
    "again": lambda _: contextlib.nullcontext(),
    "fp16": lambda model: cw.store_saves(model, "fp16"),
    "bf16": lambda model: cw.store_saves(model, "bf16"),
    "int8": lambda model: cw.store_saves(model, "int8"),
    "derived": lambda model: cw.store_saves(model, derive=True),
    "derived + fp16": lambda model: cw.store_saves(model, "fp16", derive=True),
    "derived + int8": lambda model: cw.store_saves(model, "int8", derive=True),
    "recompute": cw.recompute,
    "checkpoint (torch)": torch_checkpoints,
    "file": lambda model: cw.offload_saves(model, folder=FOLDER),
}
"""Each way, put on the model within a `with` block."""


class Bench:
    """One model, one batch, in fp32 or under torch.autocast."""

    def __init__(self, args: argparse.Namespace, *, low: bool) -> None:
        torch.manual_seed(0)
        self.low = low
        self.model = LanguageModel(args.width, args.depth)
        self.x, self.y = draw_tokens(args.batch, args.length)
        exact = Bench.__new__(Bench)
        exact.low, exact.x, exact.y = False, self.x, self.y
        exact.model = copy.deepcopy(self.model).double()
        self.exact = exact.gradient()

    def loss(self) -> Tensor:
        """One forward."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
            return token_loss(self.model(self.x), self.y)

    def gradient(self) -> Tensor:
        """All gradients of one step, as one vector."""
        self.loss().backward()
        found = [weight.grad.flatten() for weight in self.model.parameters()]
        self.model.zero_grad(set_to_none=True)
        return torch.cat(found).double()

    def step(self) -> None:
        """One forward and backward."""
        self.loss().backward()
        self.model.zero_grad(set_to_none=True)

    def seconds(self) -> float:
        """CPU seconds of one step."""
        start = time.process_time()
        self.step()
        return time.process_time() - start

    def error(self) -> float:
        """Relative error of the gradient against float64."""
        return float((self.gradient() - self.exact).norm() / self.exact.norm())

    def bytes(self) -> tuple[int, int]:
        """Held between forward and backward, and the peak, above what stands."""
        lifetimes, standing = lifetimes_of(self.model, (self.x, self.y), self.loss)
        held = lifetimes.curve()[lifetimes.marks["backward"]] - standing
        return held, lifetimes.peak()[1] - standing


def measure(bench: Bench, turns: int) -> dict[str, dict[str, float]]:
    """Every way beside the plain one."""
    held, peak = bench.bytes()
    plain_error = bench.error()
    plain = [bench.seconds() for _ in range(3)]
    name = "torch.autocast" if bench.low else "fp32"
    found = {
        name: {
            "held_mb": held / 1e6,
            "peak_mb": peak / 1e6,
            "error": plain_error,
            "milliseconds": 1e3 * statistics.median(plain),
        }
    }
    for way, put in WAYS.items():
        with put(bench.model):
            low_held, low_peak = bench.bytes()
            error = bench.error()
        ratios = [
            time_ratio(bench.step, lambda put=put: put(bench.model), turn)
            for turn in range(turns)
        ]
        low, _, high = statistics.quantiles(ratios, n=4)
        found[way] = {
            "held_mb": low_held / 1e6,
            "held_share": low_held / held,
            "peak_mb": low_peak / 1e6,
            "peak_share": low_peak / peak,
            "error": error,
            "error_ratio": error / plain_error,
            "time_ratio": statistics.median(ratios),
            "lower_quartile": low,
            "upper_quartile": high,
        }
    return found


COLUMNS = (
    "compute",
    "saves",
    "held for the backward",
    "peak of the step",
    "gradient error",
    "time (quartiles)",
)


def table(record: Mapping[str, Any]) -> str:
    """The table of the page."""
    names = {"fp32": "as torch", "torch.autocast": "as torch.autocast"}
    return table_of_saves(record, names)


def table_of_saves(record: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """A table of ways by format of compute; the first way of each is compared with."""
    rows = []
    for compute in ("fp32", "bf16"):
        first = next(iter(record[compute].values()))
        for way, row in record[compute].items():
            name = names.get(way, way)
            if "failed" in row:
                rows.append((compute, name, "fails", "", "", ""))
                continue
            held, peak = (
                f"{row[key]:.2f} MB"
                + ("" if row is first else f" ({row[key] / first[key] - 1:+.0%})")
                for key in ("held_mb", "peak_mb")
            )
            spread = (
                f"{row['milliseconds']:.0f} ms"
                if row is first
                else f"{row['time_ratio']:.3f} ({row['lower_quartile']:.3f} "
                f"to {row['upper_quartile']:.3f})"
            )
            rows.append((compute, name, held, peak, f"{row['error']:.2e}", spread))
    return markdown(COLUMNS, rows)


def show(name: str, rows: dict[str, dict[str, float]]) -> None:
    """Print a table."""
    print(f"\n{name}")
    print(f"{'way':20} {'held':>14} {'peak':>14} {'error':>9} {'time':>20}")
    for way, row in rows.items():
        held = f"{row['held_mb']:.2f} MB {row.get('held_share', 1) - 1:+.0%}"
        peak = f"{row['peak_mb']:.2f} MB {row.get('peak_share', 1) - 1:+.0%}"
        ratio = row.get("time_ratio")
        spread = (
            f"{row['milliseconds']:.1f} ms"
            if ratio is None
            else f"{ratio:.3f} ({row['lower_quartile']:.3f} "
            f"to {row['upper_quartile']:.3f})"
        )
        print(f"{way:20} {held:>14} {peak:>14} {row['error']:9.2e} {spread:>20}")


def main() -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep-blocks", action="store_true", help="see above")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", action="store_true", help="write docs/memory.md")
    args = parser.parse_args()
    if args.keep_blocks:
        keep_blocks()
    torch.set_num_threads(args.threads)
    record: dict[str, Any] = head_of_record(args)
    for low, name in ((False, "fp32"), (True, "bf16")):
        record[name] = measure(Bench(args, low=low), args.turns)
        show(f"{name} compute", record[name])
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.page:
        PAGE.write_text(filled(PAGE.read_text(), {"saves": table(record)}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
