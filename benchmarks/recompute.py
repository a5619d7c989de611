"""Recompute by every k blocks and by a budget: bytes, time and gradients, as a curve.

The model of the seed's acceptance test A2 (width 128, 8 blocks, 16 x 64 tokens, dropout
0.1) makes a forward and a backward:

    none             all activations are kept: what everything is compared with
    every 4, 2, 1    `castwise.recompute`
    checkpoint       torch.utils.checkpoint around every block: the rival
    budget 25 % ...  `plan_for_budget`, between the least that is possible and none;
                     with `+ fp16` it may store saves in fp16 besides

Bytes are the peak of a real step, every storage counted, above weights. Gradients are
compared bit by bit with those of `none`. Times are CPU seconds, medians of the ratios
of neighbouring turns.

    python benchmarks/recompute.py --json docs/accepted/recompute.json \
        --picture docs/assets/recompute.svg
    python benchmarks/recompute.py --turns 1
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import torch
import torch.nn.functional as F  # noqa: N812 -- its name everywhere
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import castwise as cw
from castwise.memory.budget import plan_for_budget
from castwise.memory.lifetimes import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Way = Callable[[], contextlib.AbstractContextManager[Any]]

VOCABULARY = 61
SHARES = (0.9, 0.75, 0.5, 0.25, 0.1)


class Block(nn.Module):
    """Pre-norm attention and a multilayer perceptron, with dropout."""

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
        x = x + F.dropout(self.out(heard.transpose(1, 2).flatten(-2)), 0.1)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), 0.1)


class Model(nn.Module):
    """Embedding, blocks, head."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, VOCABULARY)
        self.checkpoints = False

    def forward(self, tokens: Tensor) -> Tensor:
        """Rate the next token everywhere."""
        x = self.table(tokens)
        for block in self.blocks:
            if self.checkpoints:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.head(x)


def loss_fn(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy over all places."""
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())


class Bench:
    """The model and its batch."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.model = Model(args.width, args.depth)
        tokens = torch.randint(VOCABULARY, (args.batch, args.length + 1))
        self.batch = tokens[:, :-1], tokens[:, 1:]

    def step(self) -> None:
        """A forward and a backward, with the same random numbers each time."""
        torch.manual_seed(1)
        self.model.zero_grad(set_to_none=True)
        loss_fn(self.model(self.batch[0]), self.batch[1]).backward()

    def gradients(self) -> list[Tensor]:
        """Those of a step."""
        self.step()
        return [weight.grad.clone() for weight in self.model.parameters()]

    def seconds(self) -> float:
        """CPU seconds of a step."""
        start = time.process_time()
        self.step()
        return time.process_time() - start

    def peak(self) -> int:
        """The peak of a step above weights and batch."""
        self.model.zero_grad(set_to_none=True)
        ledger = Ledger(self.model)
        for weight in self.model.parameters():
            ledger.name(weight, kind="weights")
        ledger.name_all(self.batch, kind="batch")
        with ledger:
            self.step()
        lifetimes = ledger.lifetimes()
        return lifetimes.peak()[1] - lifetimes.curve()[0]


@contextlib.contextmanager
def torch_checkpoints(model: Model) -> Iterator[None]:
    """The rival: written into the model."""
    model.checkpoints = True
    try:
        yield
    finally:
        model.checkpoints = False


@contextlib.contextmanager
def planned(plan: Any, model: Model) -> Iterator[None]:
    """A plan in force."""
    placed = plan.put(model)
    try:
        yield
    finally:
        placed.remove()


def measure(bench: Bench, way: Way, plain: list[Tensor], turns: int) -> dict[str, Any]:
    """Bytes, time against none, and whether gradients have the same bits."""
    with way():
        peak, found = bench.peak(), bench.gradients()
    ratios = []
    for turn in range(turns):
        times = {}
        for on in (True, False)[:: 1 - turn % 2 * 2]:
            with way() if on else contextlib.nullcontext():
                bench.seconds()
                times[on] = bench.seconds()
        ratios.append(times[True] / times[False])
    same = all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    return {
        "peak_mb": peak / 1e6,
        "time_ratio": statistics.median(ratios),
        "same": same,
    }


def plans(bench: Bench) -> dict[str, Any]:
    """Plans for budgets between the least and none, exact and with fp16."""
    full = cw.estimate(bench.model, bench.batch, loss_fn).peak_bytes
    least = cw.estimate(
        bench.model, bench.batch, loss_fn, recompute=cw.recompute
    ).peak_bytes
    return {
        f"budget {share:.0%}{' + fp16' if store else ''}": plan_for_budget(
            bench.model,
            bench.batch,
            loss_fn,
            budget=int(least + share * (full - least)),
            store=store,
        )
        for store in (None, "fp16")
        for share in SHARES
    }


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Bytes against time: what each choice costs."""
    mpl.use("svg")
    figure, axes = plt.subplots(figsize=(7, 4.2))
    kinds = {
        "every k": [name for name in rows if name.startswith(("none", "every"))],
        "budget": [n for n in rows if n.startswith("budget") and "fp16" not in n],
        "budget, or saves in fp16": [n for n in rows if "fp16" in n],
        "torch.utils.checkpoint": [n for n in rows if n.startswith("checkpoint")],
    }
    for (label, names), marker in zip(kinds.items(), "osD*", strict=True):
        points = sorted((rows[n]["peak_mb"], rows[n]["time_ratio"]) for n in names)
        axes.plot(*zip(*points, strict=True), marker=marker, label=label, linewidth=1)
    axes.set_xlabel("peak of activations and gradients, MB")
    axes.set_ylabel("time of a step over that without recompute")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure, print, draw, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    plain = bench.gradients()
    ways: dict[str, Any] = {"none": contextlib.nullcontext}
    for every in (4, 2, 1):
        ways[f"every {every}"] = lambda k=every: cw.recompute(bench.model, every=k)
    ways["checkpoint (torch)"] = lambda: torch_checkpoints(bench.model)
    chosen = plans(bench)
    for name, plan in chosen.items():
        ways[name] = lambda p=plan: planned(p, bench.model)
    rows = {}
    print(f"{'way':22} {'peak MB':>9} {'':>6} {'time':>7}  gradients  plan")
    for name, way in ways.items():
        rows[name] = row = measure(bench, way, plain, args.turns)
        share = row["peak_mb"] / rows["none"]["peak_mb"] - 1
        plan = chosen.get(name)
        if plan is not None:
            row["choices"] = list(plan.choices.values())
            row["budget_mb"] = plan.budget_bytes / 1e6
            row["estimated_mb"] = plan.peak_bytes / 1e6
        print(
            f"{name:22} {row['peak_mb']:9.2f} {share:+6.0%} {row['time_ratio']:7.3f}  "
            f"{'same bits' if row['same'] else 'other    '}  "
            f"{'' if plan is None else plan.summary()}"
        )
    record = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "torch": str(torch.__version__),
        "castwise": cw.__version__,
        "python": platform.python_version(),
        "settings": {
            k: v for k, v in vars(args).items() if k not in {"json", "picture"}
        },
        "ways": rows,
    }
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.picture is not None:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
