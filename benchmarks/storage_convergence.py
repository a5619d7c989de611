"""Does it still learn? Every weight storage and 8-bit states against fp32, 3 seeds.

    python benchmarks/storage_convergence.py [--seeds 3] [--steps 300] [--json F]

Two tasks that need no download. `latin` completes Latin squares of four rows in three
alphabets: any cells are hidden, and the loss is the cross-entropy on these (a small
bidirectional transformer of 131,000 weights with two heads that see one row or column).
`text` predicts the next character of the help texts that ship with CPython.

Weights in 16 bits are compared with fp32 weights under the same bf16 operators, 8-bit
states with fp32 states in fp32: the difference is what the storage does, on the same
batches from the same start. An arm holds when the mean over the seeds of its held-out
loss is within 0.01 of its reference. The last arm codes second moments with evenly
spaced numbers and must not hold, or else the measure would notice nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, final
from unittest import mock

import torch
from torch import nn
from torch.nn import functional

import castwise as cw
from castwise.optim import AdamW, SweepSettings
from castwise.optim import states as states_room
from castwise.optim import swept as swept_room
from castwise.optim.states import CODES, StateCode
from castwise.policy import Policy
from castwise.training.schedule import WarmupStableDecay

CLOSE = 0.01
LR, BETAS, DECAY, CLIP = 4e-3, (0.9, 0.95), 0.01, 1.0
HIDDEN_TOKEN, NUM_TOKENS = 34, 35


class Transformer(nn.Module):
    """Three pre-norm blocks of width 64; every head has its own mask."""

    def __init__(self, num_tokens: int, masks: torch.Tensor, num_modes: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(num_tokens, 64)
        self.places = nn.Embedding(masks.shape[-1], 64)
        self.modes = nn.Embedding(num_modes, 64)
        self.blocks = nn.ModuleList(Block(masks) for _ in range(3))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, num_tokens)

    def forward(self, tokens: torch.Tensor, modes: torch.Tensor) -> torch.Tensor:
        """Return logits [B, T, tokens] of tokens [B, T] and modes [B]."""
        x = self.tokens(tokens) + self.places.weight + self.modes(modes)[:, None]
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


class Block(nn.Module):
    """Attention of four heads and a feed-forward of twice the width."""

    def __init__(self, masks: torch.Tensor) -> None:
        super().__init__()
        self.norm, self.other_norm = nn.LayerNorm(64), nn.LayerNorm(64)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, 192), nn.Linear(192, 64)
        self.register_buffer("masks", masks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, T, 64]."""
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, 4, 16).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.masks)
        x = x + self.out(seen.transpose(1, 2).reshape(b, t, 64))
        return x + self.down(functional.gelu(self.up(self.other_norm(x))))


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # tokens, modes, answers


@final
class Latin:
    """Latin squares of four rows in three alphabets, with hidden cells."""

    num_tokens, num_modes, batch_size = NUM_TOKENS, 3, 64

    def __init__(self) -> None:
        rows = list(itertools.permutations(range(4)))
        squares = [
            [*a, *b, *c, *d]
            for a, b, c, d in itertools.product(rows, repeat=4)
            if all(len(set(column)) == 4 for column in zip(a, b, c, d, strict=True))
        ]
        self.squares = torch.tensor(squares)
        place = torch.arange(16)
        same_row = place[:, None] // 4 == place // 4
        same_column = place[:, None] % 4 == place % 4
        every = torch.ones(16, 16, dtype=torch.bool)
        self.masks = torch.stack([same_row, same_column, every, every])

    def batch(self, lot: torch.Generator, size: int) -> Batch:
        """Draw squares, an alphabet each, and cells to hide."""
        squares = self.squares[torch.randint(576, (size,), generator=lot)]
        modes = torch.randint(3, (size,), generator=lot)
        answers = squares + torch.tensor([1, 0, 30])[modes][:, None]
        share = torch.rand(size, 1, generator=lot)
        hidden = torch.rand(size, 16, generator=lot) < share
        tokens = torch.where(hidden, HIDDEN_TOKEN, answers)
        return tokens, modes, torch.where(hidden, answers, -100)

    def held_out(self) -> list[Batch]:
        """Return the masks that every arm is measured on."""
        lot = torch.Generator().manual_seed(10**6)
        return [self.batch(lot, 512) for _ in range(8)]


@final
class Text:
    """The help topics of CPython, character by character."""

    num_modes, batch_size = 1, 8

    def __init__(self) -> None:
        text = "\n".join(topics[name] for name in sorted(topics))
        letters = sorted(set(text))
        place = {letter: at for at, letter in enumerate(letters)}
        self.codes = torch.tensor([place[letter] for letter in text])
        self.num_tokens = len(letters)
        self.masks = torch.ones(4, 64, 64, dtype=torch.bool).tril()
        self.cut = int(0.9 * len(self.codes))

    def batch(self, lot: torch.Generator, size: int) -> Batch:
        """Draw windows of the first nine tenths."""
        return self._windows(torch.randint(self.cut - 65, (size,), generator=lot))

    def held_out(self) -> list[Batch]:
        """Return windows of the last tenth."""
        starts = torch.arange(self.cut, len(self.codes) - 65, 65)[:256]
        return [self._windows(some) for some in starts.split(128)]

    def _windows(self, starts: torch.Tensor) -> Batch:
        windows = self.codes[starts[:, None] + torch.arange(65)]
        modes = torch.zeros(len(starts), dtype=torch.int64)
        return windows[:, :-1], modes, windows[:, 1:]


class EvenlySpaced(StateCode):
    """Second moments by evenly spaced codes: the negative control."""

    name, dtype = "quartic", torch.uint8

    def encode_ratio(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return round(255 x / scale)."""
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        return (values * inverse * 255 + 0.5).to(torch.uint8)

    def decode_ratio(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return scale c / 255."""
        return codes.float() * (scale * (1 / 255))


@contextmanager
def evenly_spaced() -> Iterator[None]:
    """Let the twin code second moments so."""
    codes = {**CODES, "quartic": EvenlySpaced()}
    with (
        mock.patch.object(swept_room, "CODES", codes),
        mock.patch.object(states_room, "CODES", codes),
    ):
        yield


def torchs(parameters: Any) -> torch.optim.Optimizer:
    """Return torch's fused AdamW."""
    return torch.optim.AdamW(
        parameters, lr=LR, betas=BETAS, weight_decay=DECAY, fused=True
    )


def ours(backend: str = "auto") -> Callable[[Any], torch.optim.Optimizer]:
    """Return castwise's AdamW with all moments in 8 bits."""
    settings = SweepSettings(
        states="8bit",
        min_8bit_size=0,
        check_finite=False,
        backend=backend,  # type: ignore[arg-type]
    )

    def make(parameters: Any) -> torch.optim.Optimizer:
        return AdamW(
            parameters, lr=LR, betas=BETAS, weight_decay=DECAY, settings=settings
        )

    return make


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to train."""

    policy: Policy
    """What computes and is stored how."""

    make: Callable[[Any], torch.optim.Optimizer] = torchs
    """The optimizer."""

    reference: str
    """The arm that it is compared with."""

    must_hold: bool | None = True
    """What is expected; None for what is only shown."""


EXACT, MIXED, LOW = cw.preset("32-true"), cw.preset("bf16-mixed"), Policy(name="low")
LOW = LOW.with_default("bf16")
CONTROL = "control: evenly spaced second moment"
ARMS = {
    "fp32": Arm(policy=EXACT, reference="fp32"),
    "bf16 operators, fp32 weights": Arm(policy=MIXED, reference="fp32"),
    **{
        name: Arm(
            policy=LOW.with_storage(name),
            reference="bf16 operators, fp32 weights",
            must_hold=None if name == "plain" else True,
        )
        for name in ("master", "split", "split8", "kahan", "stochastic", "plain")
    },
    "8-bit states": Arm(policy=EXACT, make=ours(), reference="fp32"),
    "split, 8-bit states": Arm(
        policy=LOW.with_storage("split"),
        make=ours(),
        reference="bf16 operators, fp32 weights",
    ),
    CONTROL: Arm(policy=EXACT, make=ours("twin"), reference="fp32", must_hold=False),
}


def train(task: Latin | Text, arm: Arm, seed: int, num_steps: int) -> dict[str, float]:
    """Train one arm and return its held-out loss, and whether all was finite."""
    torch.manual_seed(seed)
    model = Transformer(task.num_tokens, task.masks, task.num_modes)
    run = cw.prepare(model, arm.make(model.parameters()), arm.policy, clip_norm=CLIP)
    schedule = WarmupStableDecay(num_steps=num_steps, num_warmup=50, decay_share=0.25)
    lot = torch.Generator().manual_seed(seed)

    def loss_of(batch: Batch) -> torch.Tensor:
        tokens, modes, answers = batch
        logits = model(tokens, modes).float().flatten(0, 1)
        return functional.cross_entropy(logits, answers.flatten())

    began = time.perf_counter()
    for number in range(num_steps):
        for group in run.optimizer.param_groups:
            group["lr"] = LR * schedule.factor(number)
        with run.step() as step:
            step.backward(loss_of(task.batch(lot, task.batch_size)))
    seconds = time.perf_counter() - began
    with run.inference():
        held_out = statistics.fmean(float(loss_of(b)) for b in task.held_out())
    return {"loss": held_out, "skipped": run.num_skipped, "seconds": seconds}


TASKS: dict[str, Callable[[], Latin | Text]] = {"latin": Latin, "text": Text}


def main() -> None:
    """Train every arm on every task and print what holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--only", default="", help="part of the names of the arms")
    parser.add_argument("--json", type=Path, help="kept up to date, seed by seed")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"tasks": {}}
    if settings.json and settings.json.exists():
        record = json.loads(settings.json.read_text())
    as_expected = True
    for name in settings.tasks.split(","):
        told: dict[str, Any] = {"arms": {}}
        for told in measured(name, settings):
            record["tasks"][name] = told
            if settings.json:
                settings.json.parent.mkdir(parents=True, exist_ok=True)
                settings.json.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\n{name}: held-out loss after {settings.steps} steps")
        for arm, row in told["arms"].items():
            losses = " ".join(f"{loss:9.4f}" for loss in row["losses"])
            print(f"{arm:40}{losses}{row['apart']:+10.4f}  {row['holds']}")
            must_hold = ARMS[arm].must_hold
            as_expected &= must_hold is None or row["holds"] is must_hold
    print("as expected" if as_expected else "NOT as expected")
    raise SystemExit(not as_expected)


def measured(name: str, settings: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train all arms of one task, and yield the record after each seed."""
    task = TASKS[name]()
    rows: dict[str, Any] = {}
    wanted = [arm for arm in ARMS if settings.only in arm or arm == "fp32"]
    for seed in range(settings.seeds):
        for arm in wanted:
            with evenly_spaced() if arm == CONTROL else nullcontext():
                told = train(task, ARMS[arm], seed, settings.steps)
            rows.setdefault(arm, []).append(told)
            print(f"  {name} {seed} {arm:38} {told['loss']:.4f}", flush=True)
        yield {
            "torch": str(torch.__version__),
            "machine": platform.processor() or platform.machine(),
            "steps": settings.steps,
            "close": CLOSE,
            "arms": judged(rows),
        }


def judged(rows: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Compare every arm with its reference, seed by seed."""
    told = {}
    for arm, runs in rows.items():
        losses = [each["loss"] for each in runs]
        others = rows.get(ARMS[arm].reference, rows["fp32"])
        apart = statistics.fmean(
            mine - other["loss"] for mine, other in zip(losses, others, strict=True)
        )
        told[arm] = {
            "losses": losses,
            "apart": apart,
            "reference": ARMS[arm].reference,
            "holds": math.isfinite(apart) and abs(apart) <= CLOSE,
            "skipped": sum(each["skipped"] for each in runs),
            "seconds": statistics.fmean(each["seconds"] for each in runs),
        }
    return told


if __name__ == "__main__":
    main()
