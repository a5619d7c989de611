"""Compressed gradients under DDP: loss, bytes on the wire, time, and when each pays.

Two processes train a small byte-level transformer on the text of this repository's
pages, by every way in turn, in the same two processes and from the same weights:

    none                      DDP as it is: fp32 sums
    bf16, fp16                `castwise.replicate(compress="bf16")`
    powersgd:rank=1, 4, 16    the same with compress="powersgd:rank=..."
    torch fp16                torch's fp16_compress_hook: the rival of fp16
    torch powersgd 4          torch's powerSGD_hook of rank 4: the rival of powersgd.
                              Each bucket is waited for before the next one is sent:
                              over gloo messages of several buckets get mixed up

`payload` is what a rank hands over to be summed in a step, counted; `wire` is what the
kernel counted on the network interface for each rank, headers and acknowledgements
included. Losses are means over a held-out part of the text after the last step, with
the largest and smallest over seeds. Times are medians of whole steps, free and at a
limited rate for each rank and direction: the processes live in a network namespace of
their own, whose loopback is slowed down by tc (needs root or user namespaces; without
them the times at a rate are left out, and the model alone speaks).

The model: a step takes what it takes without a network, plus wire bytes over the rate.
`pays below` is the rate at which that of `none` is as long.

    python benchmarks/compression.py --json docs/accepted/compression.json --page
    python benchmarks/compression.py --steps 4 --seeds 1 --rates 100 --turns 2
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- its name everywhere
from page_tables import filled, markdown
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import castwise as cw
from castwise.distributed.replication import feedback_of, replicate

PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"
NUM_RANKS, VOCABULARY, LENGTH = 2, 256, 64
START = 10  # steps that every powersgd sends whole, ours and torch's
OURS = (
    "none",
    "bf16",
    "fp16",
    "powersgd:rank=1",
    "powersgd:rank=4",
    "powersgd:rank=16",
)
RIVALS = ("torch fp16", "torch powersgd 4")
WAYS = (*OURS, *RIVALS)


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
        self.table, self.places = (
            nn.Embedding(VOCABULARY, width),
            nn.Embedding(64, width),
        )
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next byte."""
        x = self.table(tokens) + self.places.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def text() -> Tensor:
    """The bytes of the pages, in order of their names."""
    pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    return torch.frombuffer(
        bytearray(b"".join(page.read_bytes() for page in pages)), dtype=torch.uint8
    ).long()


class Lots:
    """Rows of the text: for each step and rank its own, and a part held out."""

    def __init__(self, rank: int, seed: int, args: argparse.Namespace) -> None:
        whole, num_rows = args.text, args.rows
        cut = len(whole) * 9 // 10
        self._seen, self._held_out = whole[:cut], whole[cut:]
        self._rank, self._num_rows, self._seed = rank, num_rows, seed

    def training(self, step: int) -> tuple[Tensor, Tensor]:
        """Bytes and what follows them, drawn anew for each step and rank."""
        draws = torch.Generator().manual_seed(
            1_000_003 * self._seed + NUM_RANKS * step + self._rank
        )
        last = len(self._seen) - LENGTH - 1
        return _rows(
            self._seen, torch.randint(last, (self._num_rows,), generator=draws)
        )

    def held_out(self) -> tuple[Tensor, Tensor]:
        """The same 128 rows always."""
        last = len(self._held_out) - LENGTH - 1
        return _rows(self._held_out, torch.linspace(0, last, 128).long())


def _rows(source: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
    rows = source[begins[:, None] + torch.arange(LENGTH + 1)]
    return rows[:, :-1], rows[:, 1:]


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy in nats a byte."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def replicated(way: str, model: nn.Module, run: cw.Run) -> DistributedDataParallel:
    """DDP by one of the ways."""
    if way == "none":
        return replicate(model, cw.preset("32-true"))
    if way in OURS:
        compress = f"{way},start={START}" if ":" in way else way
        return replicate(
            model, cw.preset("32-true"), compress=compress, loss_scale=run.loss_scale
        )
    ddp = DistributedDataParallel(model)
    if way == "torch fp16":
        ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    else:
        state = powerSGD_hook.PowerSGDState(
            process_group=None,
            matrix_approximation_rank=4,
            start_powerSGD_iter=START,
            min_compression_rate=2,
        )
        ddp.register_comm_hook(state, lambda s, bucket: _waited_for(s, bucket))  # noqa: PLW0108 -- DDP reads annotations, and refuses postponed ones
    return ddp


def _waited_for(state: Any, bucket: Any) -> Any:
    future = powerSGD_hook.powerSGD_hook(state, bucket)
    future.wait()
    return future


class Training:
    """One way from one seed, step by step."""

    def __init__(
        self, way: str, rank: int, seed: int, args: argparse.Namespace
    ) -> None:
        torch.manual_seed(seed)
        self.model = Model(args.width, args.depth)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3)
        self.run = cw.prepare(
            self.model, optimizer, cw.preset("32-true"), clip_norm=1.0
        )
        self.way, self.ddp = way, replicated(way, self.model, self.run)
        self.lots, self.number = Lots(rank, seed, args), 0

    def step(self) -> None:
        """Forward, backward, sums, update."""
        tokens, target = self.lots.training(self.number)
        with self.run.step() as step:
            step.backward(loss_of(self.ddp(tokens), target))
        self.number += 1

    def payload(self) -> int | None:
        """Bytes that this rank gave to be summed in the latest step, where known."""
        numel = sum(weight.numel() for weight in self.model.parameters())
        feedback = feedback_of(self.ddp)
        if feedback is not None:
            return feedback.num_bytes
        width = {"none": 4, "bf16": 2, "fp16": 2, "torch fp16": 2}.get(self.way)
        return None if width is None else width * numel

    def held_out_loss(self) -> float:
        """Of the rows that nobody trains on."""
        tokens, target = self.lots.held_out()
        with self.run.inference():
            return float(loss_of(self.model(tokens), target))


def work(rank: int, store: str, args: argparse.Namespace, out: Any) -> None:
    """All that one process does."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=NUM_RANKS
    )
    found: dict[str, Any] = {way: {} for way in WAYS}
    for way in WAYS:
        losses = []
        for seed in range(args.seeds):
            training = Training(way, rank, seed, args)
            for _ in range(args.steps):
                training.step()
            losses.append(training.held_out_loss())
        found[way]["losses"] = losses
        note(rank, f"{way}: {statistics.mean(losses):.4f} nats")
    measure_steps(rank, args, found)
    if rank == 0:
        out.put(found)
    distributed.barrier()
    distributed.destroy_process_group()


def measure_steps(rank: int, args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Bytes and seconds of a step, free and at every rate, all ways in turns."""
    runs = {way: Training(way, rank, 0, args) for way in WAYS}
    for training in runs.values():
        for _ in range(START + 2):  # what follows is as compressed as it gets
            training.step()
    for rate in (None, *args.rates):
        if rate is not None and not args.inside:
            continue
        set_rate(rank, rate)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(args.turns):
            for way, training in runs.items():
                distributed.barrier()
                before, started = wire_bytes(), time.perf_counter()
                training.step()
                distributed.barrier()
                seconds[way].append(time.perf_counter() - started)
                found[way]["wire"] = (wire_bytes() - before) // NUM_RANKS
                found[way]["payload"] = training.payload()
        for way, taken in seconds.items():
            found[way].setdefault("seconds", {})[str(rate)] = statistics.median(taken)
        note(rank, f"rate {rate}: measured")


def set_rate(rank: int, megabits: float | None) -> None:
    """Slow the loopback of this namespace down; both directions share it."""
    distributed.barrier()
    if rank == 0 and megabits is not None:
        _tc("replace", "dev", "lo", "root", "tbf", "rate", f"{2 * megabits}mbit",
            "burst", "64kb", "limit", "64mb")  # fmt: skip
    distributed.barrier()


def _tc(*words: str) -> None:
    subprocess.run(["tc", "qdisc", *words], check=True)  # noqa: S607 -- where it is differs


def wire_bytes() -> int:
    """What the loopback of this namespace has received so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    line = next(line for line in lines if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def note(rank: int, what: str) -> None:
    """Tell progress once."""
    if rank == 0:
        print(what, file=sys.stderr, flush=True)


def pays_below(found: dict[str, Any], way: str) -> float | None:
    """Megabits a second below which a way is faster than none, by the model."""
    none, this = found["none"], found[way]
    saved = 8 * (none["wire"] - this["wire"]) / 1e6
    dearer = this["seconds"]["None"] - none["seconds"]["None"]
    return None if dearer <= 0 else saved / dearer


def table(record: Mapping[str, Any]) -> str:
    """What was found, as rows of the page."""
    found = record["ways"]
    rates = [
        rate
        for rate in record["settings"]["rates"]
        if str(rate) in found["none"]["seconds"]
    ]
    heads = ["way", "loss, nats a byte", "payload, kB", "wire, kB", "step, ms"]
    heads += [f"at {rate:g} Mbit/s, ms (model)" for rate in rates]
    heads += ["pays below, Mbit/s"]
    rows = []
    for way, each in found.items():
        losses, free = each["losses"], each["seconds"]["None"]
        spread = f"{min(losses):.3f} to {max(losses):.3f}"
        payload = "" if each["payload"] is None else f"{each['payload'] / 1e3:,.0f}"
        row = [way, spread, payload, f"{each['wire'] / 1e3:,.0f}", f"{1e3 * free:.0f}"]
        for rate in rates:
            model = free + 8 * each["wire"] / (1e6 * rate)
            row.append(f"{1e3 * each['seconds'][str(rate)]:.0f} ({1e3 * model:.0f})")
        most = None if way == "none" else pays_below(found, way)
        pays = "always" if most is None else f"{most:,.0f}"
        rows.append([*row, "" if way == "none" else pays])
    return markdown(heads, rows)


def in_own_network(script: list[str]) -> bool:
    """Run this program again in a network namespace; False where that is refused."""
    if shutil.which("unshare") is None or shutil.which("tc") is None:
        return False
    for unshare in (["unshare", "-n"], ["unshare", "-rn"]):
        with contextlib.suppress(subprocess.CalledProcessError, OSError):
            subprocess.run([*unshare, "ip", "link", "set", "lo", "up"], check=True)
            shell = 'ip link set lo up mtu 1500 && exec "$0" "$@"'
            ended = subprocess.run(
                [*unshare, "sh", "-c", shell, sys.executable, *script, "--inside"],
                check=False,
            )
            sys.exit(ended.returncode)
    return False


def main() -> None:
    """Measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of each training")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each way")
    parser.add_argument("--turns", type=int, default=7, help="timed steps of each way")
    parser.add_argument("--rates", type=float, nargs="*", default=[1000, 100, 20])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8, help="of each rank and step")
    parser.add_argument("--json", type=Path, help="where the figures are kept")
    parser.add_argument("--page", action="store_true", help="fill the table there")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.inside and not in_own_network(sys.argv):
        print("no network namespace: nothing is measured at a rate", file=sys.stderr)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    args.text = text()  # once: somebody may be writing a page
    context = multiprocessing.get_context("spawn")
    out = context.SimpleQueue()
    store = tempfile.mktemp(prefix="castwise-compression-")  # noqa: S306 -- gloo makes it
    ranks = [
        context.Process(target=work, args=(rank, store, args, out))
        for rank in range(NUM_RANKS)
    ]
    for each in ranks:
        each.start()
    while out.empty():  # a rank that fails leaves the other one waiting
        if any(each.exitcode for each in ranks):
            for each in ranks:
                each.kill()
            sys.exit(1)
        time.sleep(0.1)
    found = out.get()
    for each in ranks:
        each.join()
    record = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "settings": {
            key: value
            for key, value in vars(args).items()
            if key not in {"json", "text", "page"}
        },
        "ways": found,
    }
    print(table(record))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.page:
        PAGE.write_text(filled(PAGE.read_text(), {"compression": table(record)}))


if __name__ == "__main__":
    main()
