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
        --picture docs/assets/recompute.svg --page
    python benchmarks/recompute.py --turns 1
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from page_tables import filled, markdown
from pictures import picture
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
from castwise.memory.budget import plan_for_budget

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from small_lm import Way

PAGE = Path(__file__).parents[1] / "docs" / "recompute.md"
SHARES = (0.9, 0.75, 0.5, 0.25, 0.1)


class Bench:
    """The model and its batch."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.model = LanguageModel(args.width, args.depth, dropout=0.1)
        self.batch = draw_tokens(args.batch, args.length)

    def loss(self) -> Tensor:
        """A forward, with the same random numbers each time."""
        torch.manual_seed(1)
        return token_loss(self.model(self.batch[0]), self.batch[1])

    def step(self) -> None:
        """A forward and a backward."""
        self.model.zero_grad(set_to_none=True)
        self.loss().backward()

    def gradients(self) -> list[Tensor]:
        """Those of a step."""
        self.step()
        return [weight.grad.clone() for weight in self.model.parameters()]

    def peak(self) -> int:
        """The peak of a step above weights and batch."""
        lifetimes, standing = lifetimes_of(self.model, self.batch, self.loss)
        return lifetimes.peak()[1] - standing


@contextlib.contextmanager
def planned(plan: Any, model: LanguageModel) -> Iterator[None]:
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
    ratios = [time_ratio(bench.step, way, turn) for turn in range(turns)]
    same = all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    return {
        "peak_mb": peak / 1e6,
        "time_ratio": statistics.median(ratios),
        "same": same,
    }


def plans(bench: Bench) -> dict[str, Any]:
    """Plans for budgets between the least and none, exact and with fp16."""
    full = cw.estimate(bench.model, bench.batch, token_loss).peak_bytes
    least = cw.estimate(
        bench.model, bench.batch, token_loss, recompute=cw.recompute
    ).peak_bytes
    return {
        f"budget {share:.0%}{' + fp16' if store else ''}": plan_for_budget(
            bench.model,
            bench.batch,
            token_loss,
            budget=int(least + share * (full - least)),
            store=store,
        )
        for store in (None, "fp16")
        for share in SHARES
    }


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Bytes against time: what each choice costs."""
    kinds = {
        "every k": [name for name in rows if name.startswith(("none", "every"))],
        "budget": [n for n in rows if n.startswith("budget") and "fp16" not in n],
        "budget, or saves in fp16": [n for n in rows if "fp16" in n],
        "torch.utils.checkpoint": [n for n in rows if n.startswith("checkpoint")],
    }
    x_label = "peak of activations and gradients, MB"
    y_label = "time of a step over that without recompute"
    with picture(path, x_label, y_label) as axes:
        for (label, names), marker in zip(kinds.items(), "osD*", strict=True):
            points = sorted((rows[n]["peak_mb"], rows[n]["time_ratio"]) for n in names)
            axes.plot(
                *zip(*points, strict=True), marker=marker, label=label, linewidth=1
            )


COLUMNS = ("way", "peak", "time", "gradients", "blocks recomputed", "stored in fp16")


def table(record: Mapping[str, Any]) -> str:
    """The table of the page."""
    most = record["ways"]["none"]["peak_mb"]
    rows = []
    for name, row in record["ways"].items():
        choices = row.get("choices")
        share = "" if name == "none" else f" ({row['peak_mb'] / most - 1:+.0%})"
        counts = (
            ["", ""]
            if choices is None
            else [
                f"{choices.count('recompute')} of {len(choices)}",
                str(choices.count("store") or ""),
            ]
        )
        rows.append(
            [
                name,
                f"{row['peak_mb']:.2f} MB{share}",
                f"{row['time_ratio']:.2f}",
                "same bits" if row["same"] else "others",
                *counts,
            ]
        )
    return markdown(COLUMNS, rows)


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
    parser.add_argument("--page", action="store_true", help="write docs/recompute.md")
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
    record = {**head_of_record(args), "ways": rows}
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.picture is not None:
        draw(rows, args.picture)
    if args.page:
        PAGE.write_text(filled(PAGE.read_text(), {"recompute": table(record)}))


if __name__ == "__main__":
    main()
