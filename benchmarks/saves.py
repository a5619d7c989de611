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
seconds of the process: medians of the ratios of neighbouring turns, with quartiles.

    python benchmarks/saves.py --json docs/accepted/saves.json
    python benchmarks/saves.py --turns 2 --width 64
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime as dt
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 -- its name everywhere
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import castwise as cw
from castwise.memory.lifetimes import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

VOCABULARY = 101


class Block(nn.Module):
    """Pre-norm attention and a multilayer perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, width)
        """Add attention, then the perceptron."""
        heads = self.into(self.norm1(x)).unflatten(-1, (3, 4, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        heard = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heard.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """Embedding, blocks, head."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)
        self.checkpoints = False

    def forward(self, tokens: Tensor) -> Tensor:
        """Rate the next token everywhere."""
        x = self.table(tokens)
        for block in self.blocks:
            if self.checkpoints:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.head(self.norm(x))


@contextlib.contextmanager
def torch_checkpoints(model: Model) -> Iterator[None]:
    """The rival of recompute: written into the model."""
    model.checkpoints = True
    try:
        yield
    finally:
        model.checkpoints = False


FOLDER = tempfile.gettempdir()
WAYS: dict[str, Callable[[Model], contextlib.AbstractContextManager[Any]]] = {
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
        self.model = Model(args.width, args.depth)
        tokens = torch.randint(VOCABULARY, (args.batch, args.length + 1))
        self.x, self.y = tokens[:, :-1], tokens[:, 1:]
        exact = Bench.__new__(Bench)
        exact.low, exact.x, exact.y = False, self.x, self.y
        exact.model = copy.deepcopy(self.model).double()
        self.exact = exact.gradient()

    def loss(self) -> Tensor:
        """One forward."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
            logits = self.model(self.x)
            return F.cross_entropy(logits.flatten(0, 1), self.y.flatten())

    def gradient(self) -> Tensor:
        """All gradients of one step, as one vector."""
        self.loss().backward()
        found = [weight.grad.flatten() for weight in self.model.parameters()]
        self.model.zero_grad(set_to_none=True)
        return torch.cat(found).double()

    def seconds(self) -> float:
        """CPU seconds of one step."""
        start = time.process_time()
        self.loss().backward()
        self.model.zero_grad(set_to_none=True)
        return time.process_time() - start

    def error(self) -> float:
        """Relative error of the gradient against float64."""
        return float((self.gradient() - self.exact).norm() / self.exact.norm())

    def bytes(self) -> tuple[int, int]:
        """Held between forward and backward, and the peak, above what stands."""
        ledger = Ledger(self.model)
        for weight in self.model.parameters():
            ledger.name(weight, kind="weights")
        ledger.name_all((self.x, self.y), kind="batch")
        with ledger:
            loss = self.loss()
            ledger.begin("backward")
            loss.backward()
        self.model.zero_grad(set_to_none=True)
        lifetimes = ledger.lifetimes()
        curve = lifetimes.curve()
        standing = curve[0]
        held = curve[lifetimes.marks["backward"]] - standing
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
        ratios = [_ratio(bench, put, turn) for turn in range(turns)]
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


def _ratio(bench: Bench, put: Callable[[Model], Any], turn: int) -> float:
    """Time of a step over that of its neighbour without, in alternating order."""
    times: dict[bool, float] = {}
    for with_way in (True, False)[:: 1 - turn % 2 * 2]:
        with put(bench.model) if with_way else contextlib.nullcontext():
            bench.seconds()  # warm caches of this way
            times[with_way] = bench.seconds()
    return times[True] / times[False]


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
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record: dict[str, Any] = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "torch": str(torch.__version__),
        "castwise": cw.__version__,
        "python": platform.python_version(),
        "settings": {k: v for k, v in vars(args).items() if k != "json"},
    }
    for low, name in ((False, "fp32"), (True, "bf16")):
        record[name] = measure(Bench(args, low=low), args.turns)
        show(f"{name} compute", record[name])
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
