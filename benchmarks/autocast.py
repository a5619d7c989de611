"""What the operator table costs: step times against torch.autocast, in one process.

A training step (forward, backward, AdamW) of a 4-layer transformer of width 256 runs in
turns under each region. Times are CPU seconds of the process on one thread, as a busy
machine disturbs least; printed are the ratio of medians, the ratio of the fastest
steps, and the quartiles of the ratios of neighbouring turns. Attention is one of

    fused        scaled_dot_product_attention: the same formats in both regions
    written out  a softmax of its own, in fp32 by the table, in bf16 by torch.autocast
    by hand      with `.float()` before the softmax: the same formats in both regions

so that the price of the table is seen apart from the price of more digits. The last
pair is the control: written out under castwise, by hand under torch.autocast, which is
the same work. Large blocks that glibc returns to the system are paged in again at the
next step; `--keep-blocks` makes it keep them, and `faults` counts the pages.

    python benchmarks/autocast.py --json docs/accepted/autocast.json
    python benchmarks/autocast.py --compiled
    python benchmarks/autocast.py --keep-blocks
"""

from __future__ import annotations

import argparse
import ctypes
import datetime as dt
import json
import platform
import resource
import statistics
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 -- its name everywhere
from torch import Tensor, nn

from castwise.autocast import autocast, install, uninstall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

VOCABULARY = 101
WIDTH = 256
NUM_HEADS = 4
NUM_LAYERS = 4


class Block(nn.Module):
    """Pre-norm attention and a multilayer perceptron."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2)])
        self.into, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, width)
        """Add attention, then the perceptron."""
        x = x + self.out(self.attend(self.into(self.norms[0](x))))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))

    def attend(self, qkv: Tensor) -> Tensor:
        """Attention of every position to every other."""
        heads = qkv.unflatten(-1, (3, NUM_HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)  # each (batch, head, length, width of a head)
        if self.attention == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = (q @ k.mT) * q.shape[-1] ** -0.5
            by_hand = self.attention == "by hand"
            y = (scores.float() if by_hand else scores).softmax(-1) @ v
        return y.transpose(1, 2).flatten(-2)


def transformer(attention: str) -> nn.Module:
    """Four layers of width 256 between an embedding and a head."""
    blocks = [Block(attention) for _ in range(NUM_LAYERS)]
    return nn.Sequential(
        nn.Embedding(VOCABULARY, WIDTH),
        *blocks,
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, VOCABULARY),
    )


class Step:
    """One model's training step under one region."""

    def __init__(
        self,
        region: Callable[[], AbstractContextManager[Any]],
        shape: tuple[int, int],
        *,
        attention: str,
        compiled: bool,
    ) -> None:
        torch.manual_seed(0)
        self.region = region
        self.model = transformer(attention)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.tokens = torch.randint(VOCABULARY, shape)
        self.run = torch.compile(self.loss) if compiled else self.loss

    def loss(self) -> Tensor:
        """Predict every token from all of them."""
        logits = self.model(self.tokens)
        return F.cross_entropy(logits.flatten(0, 1), self.tokens.flatten())

    def __call__(self) -> float:
        """Run the step; returns its seconds."""
        start = time.process_time()
        with self.region():
            loss = self.run()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - start

    def faults(self) -> int:
        """Pages that the system hands to one step."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        self()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def compare(candidate: Step, reference: Step, num_turns: int) -> dict[str, float]:
    """Median and quartiles of the ratio of step times, in alternating order."""
    for _ in range(5):
        candidate(), reference()
    mine: list[float] = []
    others: list[float] = []
    for turn in range(num_turns):
        for step, times in ((candidate, mine), (reference, others))[
            :: 1 - turn % 2 * 2
        ]:
            times.append(step())
    ratios = [a / b for a, b in zip(mine, others, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    found = {
        "ratio": statistics.median(mine) / statistics.median(others),
        "ratio_of_minima": min(mine) / min(others),
        "lower_quartile": low,
        "upper_quartile": high,
        "milliseconds": 1e3 * statistics.median(mine),
        "reference_milliseconds": 1e3 * statistics.median(others),
    }
    return {
        **{name: round(value, 3) for name, value in found.items()},
        "faults": statistics.median(candidate.faults() for _ in range(5)),
        "reference_faults": statistics.median(reference.faults() for _ in range(5)),
    }


def torch_region() -> AbstractContextManager[Any]:
    """What castwise is compared with."""
    return torch.autocast("cpu", torch.bfloat16)


def castwise_region() -> AbstractContextManager[Any]:
    """The table in force."""
    return autocast("cpu", "bf16")


SHAPES = {"B4 T256": (4, 256), "B1 T64": (1, 64)}
"""Batch and length."""

PAIRS = (
    ("fused", "fused"),
    ("by hand", "by hand"),
    ("written out", "written out"),
    ("written out", "by hand"),
)
"""Attention under castwise, and under torch.autocast."""


def steps(
    shapes: Iterable[str], num_turns: int, *, compiled: bool
) -> dict[str, dict[str, float]]:
    """Every shape and pair of attentions."""
    found = {}
    for name in shapes:
        shape = SHAPES[name]
        for mine, other in PAIRS:
            torch.compiler.reset()  # Dynamo counts recompilations by source line
            candidate = Step(castwise_region, shape, attention=mine, compiled=compiled)
            reference = Step(torch_region, shape, attention=other, compiled=compiled)
            pair = f"{name}, {mine} against {other}"
            found[pair] = compare(candidate, reference, num_turns)
            if mine == other:  # the control: how far equal steps measure apart
                again = Step(torch_region, shape, attention=other, compiled=compiled)
                itself = f"{name}, torch.autocast {other} against itself"
                found[itself] = compare(again, reference, num_turns)
    return found


def keep_blocks() -> None:
    """Make glibc keep freed blocks on its heap; see mallopt(3)."""
    mallopt = ctypes.CDLL(None).mallopt
    assert mallopt(-3, 32 << 20), "M_MMAP_THRESHOLD"
    assert mallopt(-1, (1 << 31) - 1), "M_TRIM_THRESHOLD"


def idle(num_turns: int) -> dict[str, float]:
    """Steps outside of a region with and without kernels in the dispatcher."""
    found = {}
    for name, region in (("fp32", nullcontext), ("torch.autocast", torch_region)):
        step = Step(region, (1, 64), attention="written out", compiled=False)
        ratios = []
        for turn in range(num_turns // 5):
            block = {}
            order = (True, False) if turn % 2 else (False, True)
            for installed in order:
                if installed:
                    install("cpu")
                else:
                    uninstall()
                step()
                block[installed] = statistics.median(step() for _ in range(5))
            ratios.append(block[True] / block[False])
        found[f"installed, step in {name}"] = statistics.median(ratios)
    install("cpu")
    found["microseconds to enter and leave"] = _microseconds(castwise_region)
    found["torch.autocast, microseconds"] = _microseconds(torch_region)
    return found


def _microseconds(region: Callable[[], AbstractContextManager[Any]]) -> float:
    blocks = []
    for _ in range(21):
        start = time.process_time()
        for _ in range(100):
            with region():
                pass
        blocks.append(time.process_time() - start)
    return 1e4 * statistics.median(blocks)


def main() -> int:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=101)
    parser.add_argument("--compiled", action="store_true", help="torch.compile")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--keep-blocks", action="store_true", help="see above")
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    if settings.keep_blocks:
        keep_blocks()
    record: dict[str, Any] = {
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "turns": settings.turns,
        "steps": steps(settings.shapes, settings.turns, compiled=settings.compiled),
    }
    if not settings.compiled:
        record["idle"] = idle(settings.turns)
    print(json.dumps(record, indent=1))
    if settings.json:
        file: Path = settings.json
        kept = json.loads(file.read_text()) if file.exists() else {}
        kind = "compiled" if settings.compiled else "eager"
        kept[kind + (", blocks kept" if settings.keep_blocks else "")] = record
        file.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


def processor() -> str:
    """The name of the processor where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
