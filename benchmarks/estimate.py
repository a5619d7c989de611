"""Estimated memory of a training step beside what a real step takes, and beside rivals.

    python benchmarks/estimate.py                       # about a quarter of an hour
    python benchmarks/estimate.py --only gpt2 --tiny    # seconds

Every row is a process of its own, and in it stand, in this order:

    estimate    castwise.estimate, before anything ran, with the seconds it took
    tracker     torch.distributed._tools.MemTracker, torch's own, under fake tensors; it
                is given the casts of torch.autocast, and knows no 16-bit storage
    accelerate  its rule for Adam: four times the weights
    ledger      unique storages alive in a real step of `prepare`, to the byte
    allocator   what torch's CPU allocator handed out meanwhile, by its profiler: the
                ledger, and what kernels take and give back within one operator
    resident    by how much the kernel's high-water mark rises in a step, and what stood
                there before: blurred by pages, and by what oneDNN keeps

The ledger is the truth that a tensor-level estimate can be right about; the last two
tell what is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from castwise import prepare, preset
from castwise.memory.estimate import estimate
from castwise.memory.estimate_fakes import fake_like, fake_model
from castwise.memory.lifetimes import tensors_within
from castwise.memory.monitor import MemoryMonitor, steady_allocator
from castwise.memory.recompute import recompute
from castwise.optim import AdamW, SweepSettings
from castwise.training.step import Run
from castwise.training.step_memory import watch_step

CASES = ("kenken", "gpt2", "llama", "vit", "conv")
POLICIES = ("32-true", "bf16-mixed", "bf16-true")
KINDS = ("torch", "adamw8bit")
BLOCKS = {
    "kenken": "blocks.*",
    "gpt2": "transformer.h.?",
    "llama": "model.layers.?",
    "vit": "*layer*.?",
    "conv": "stages.?",
}
MB = 1e6


class Residual(nn.Module):
    """Two convolutions beside an identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block."""
        return functional.relu(x + self.body(x))


class ConvNet(nn.Module):
    """A small residual network."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, stride=2)
        self.stages = nn.ModuleList(Residual(width) for _ in range(depth))
        self.head = nn.Linear(width, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


def lm_loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of a language model of transformers."""
    return functional.cross_entropy(output.logits.flatten(0, 1), target.flatten())


def image_loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of an image classifier."""
    logits = getattr(output, "logits", output)
    return functional.cross_entropy(logits, target)


def build(case: str, *, tiny: bool) -> tuple[nn.Module, tuple[Any, ...], Any]:
    """Return a model in training mode, a batch, and a loss."""
    torch.manual_seed(0)
    if case == "kenken":
        return _kenken(tiny=tiny)
    if case == "conv":
        model: nn.Module = ConvNet(16 if tiny else 64, 2 if tiny else 6)
        side, rows = (16, 3) if tiny else (96, 24)
        images = torch.randn(rows, 3, side, side)
        return model, (images, torch.randint(100, (rows,))), image_loss
    model, batch = _transformer(case, tiny=tiny)
    return model.train(), batch, image_loss if case == "vit" else lm_loss


def _kenken(*, tiny: bool) -> tuple[nn.Module, tuple[Any, ...], Any]:
    from castwise.recipes.kenken.dry_run import largest_batches  # noqa: PLC0415 -- numba
    from castwise.recipes.kenken.model import (  # noqa: PLC0415 -- as above
        KenKenModel,
        completion_loss,
        model_settings,
    )
    from castwise.recipes.kenken.settings import settings_of  # noqa: PLC0415 -- as above

    settings = settings_of("tiny" if tiny else "small", {})
    drawn = largest_batches(settings)
    batch = drawn[max(drawn)]
    model = KenKenModel(model_settings(settings.model))
    given = (batch.tokens, batch.alphabet, batch.relations, batch)
    return model, given, completion_loss


def _transformer(case: str, *, tiny: bool) -> tuple[nn.Module, tuple[Any, ...]]:
    import transformers  # noqa: PLC0415 -- only three cases need it

    transformers.logging.set_verbosity_error()
    width, depth, length, rows = (48, 2, 33, 2) if tiny else (384, 6, 256, 8)
    words = 101 if tiny else 8192
    tokens = torch.randint(words, (rows, length))
    common = {"use_cache": False, "bos_token_id": None, "eos_token_id": None}
    if case == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=words,
            n_positions=length,
            n_embd=width,
            n_layer=depth,
            n_head=6,
            **common,
        )
        return transformers.GPT2LMHeadModel(config), (tokens, tokens)
    if case == "llama":
        config = transformers.LlamaConfig(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=depth,
            num_attention_heads=6,
            num_key_value_heads=2,
            **common,
        )
        return transformers.LlamaForCausalLM(config), (tokens, tokens)
    side = 32 if tiny else 112
    config = transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=6,
        intermediate_size=4 * width,
        image_size=side,
        patch_size=8,
        num_labels=100,
    )
    images = torch.randn(rows, 3, side, side)
    return transformers.ViTForImageClassification(config), (
        images,
        torch.randint(100, (rows,)),
    )


def optimizer_of(kind: str) -> Callable[[Any], torch.optim.Optimizer]:
    """Return what builds an optimizer over parameters."""
    if kind == "torch":
        return lambda weights: torch.optim.AdamW(weights, lr=1e-4)
    settings = SweepSettings(states="8bit", check_finite=False)
    return lambda weights: AdamW(weights, lr=1e-4, settings=settings)


def row(case: str, policy: str, kind: str, *, again: bool, tiny: bool) -> dict:
    """Measure one case in this process."""
    steady_allocator()
    model, batch, loss_fn = build(case, tiny=tiny)
    make = optimizer_of(kind)
    chosen = (BLOCKS[case],) if again else ()
    settings = {"optimizer": make, "recompute": chosen}
    estimate(model, batch, loss_fn, preset(policy), **settings)  # first calls load code
    start = time.perf_counter()
    told = estimate(model, batch, loss_fn, preset(policy), **settings)
    seconds = time.perf_counter() - start
    rule = None
    with contextlib.suppress(ImportError):
        from accelerate.utils import (  # noqa: PLC0415 -- an optional rival
            calculate_maximum_sizes,
        )

        rule = 4 * calculate_maximum_sizes(model)[0]
    rival = None
    if kind == "torch" and policy != "bf16-true":
        rival = tracked(model, batch, loss_fn, chosen, low=policy == "bf16-mixed")
    standing = told.standing_bytes
    if chosen:
        recompute(model, modules=chosen)
    run = prepare(model, make(list(model.parameters())), preset(policy))
    for _ in range(2):
        step(run, batch, loss_fn)
    lifetimes = watch_step(run, batch, loss_fn)
    return {
        "case": case,
        "policy": policy,
        "optimizer": kind,
        "recompute": again,
        "num_parameters": told.num_parameters,
        "estimate": told.peak_bytes,
        "estimate_saved": told.saved_bytes,
        "estimate_seconds": seconds,
        "tracker": rival,
        "accelerate": rule,
        "ledger": lifetimes.peak()[1],
        "ledger_saved": lifetimes.saved_bytes(),
        "allocator": standing + allocated(run, batch, loss_fn),
        "resident": standing + resident(run, batch, loss_fn),
        "peak": f"{told.peak.stage} {told.peak.op} of {told.peak.module}",
    }


def step(run: Run, batch: Sequence[Any], loss_fn: Any) -> None:
    """Make one step as a plain loop does."""
    with run.step() as open_step:
        open_step.backward(loss_fn(run.model(*batch[:-1]), batch[-1]))


def allocated(run: Run, batch: Sequence[Any], loss_fn: Any) -> int:
    """The most that the CPU allocator handed out within a step."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step(run, batch, loss_fn)
    results = profile.profiler.kineto_results
    events = [each for each in results.events() if each.name() == "[memory]"]
    held = most = 0
    for each in sorted(events, key=lambda event: event.start_ns()):
        held += each.nbytes()
        most = max(most, held)
    return most


def resident(run: Run, batch: Sequence[Any], loss_fn: Any) -> int:
    """By how much the resident set rises within a step; the median of five."""
    monitor, rises = MemoryMonitor("cpu"), []
    for _ in range(5):
        before = monitor.now_bytes()
        with monitor.span("step"):
            step(run, batch, loss_fn)
        rises.append(monitor.readings[-1].peak_bytes - before)
    return sorted(rises)[2]


def tracked(
    model: nn.Module, batch: Any, loss_fn: Any, chosen: tuple[str, ...], *, low: bool
) -> int | None:
    """What torch's own tracker foretells; none where it fails."""
    from torch.distributed._tools.mem_tracker import (  # noqa: PLC0415 -- the rival
        MemTracker,
    )

    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            here = torch.device("cpu")
            twin, given = fake_model(model, here).module, fake_like(batch, here)
            if chosen:
                recompute(twin, modules=chosen)
            optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-4)
            tracker = MemTracker()
            inputs = {id(each): each for each in tensors_within(given)}
            tracker.track_external(twin, optimizer, *inputs.values())
            with tracker:
                for turn in range(2):
                    with torch.autocast("cpu", torch.bfloat16, enabled=low):
                        loss = loss_fn(twin(*given[:-1]), given[-1])
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    if not turn:
                        tracker.reset_mod_stats()
            peak = tracker.get_tracker_snapshot("peak")
    except (RuntimeError, AttributeError, ValueError, AssertionError) as error:
        print(f"tracker failed: {type(error).__name__}: {error}"[:160], file=sys.stderr)
        return None
    return int(next(iter(peak.values()))["Total"])


def main() -> None:
    """Run every row in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.row:
        case, policy, kind, again = flags.row
        warnings.simplefilter("ignore")
        print(json.dumps(row(case, policy, kind, again=again == "1", tiny=flags.tiny)))
        return
    rows = [found for found in _rows(flags.only, tiny=flags.tiny) if found]
    if flags.json:
        flags.json.write_text(json.dumps(rows, indent=1) + "\n")
    _sum_up(rows)


def _rows(only: str | None, *, tiny: bool) -> Iterator[dict]:
    columns = "case policy optimizer again estimate tracker accel. ledger allocator"
    print(columns, "resident MB | peak off, saved off, seconds")
    for case in CASES if only is None else (only,):
        kinds = [(policy, "torch") for policy in POLICIES] + [("bf16-true", KINDS[1])]
        for policy, kind in kinds:
            for again in ("0", "1"):
                words = ("--row", case, policy, kind, again)
                command = [sys.executable, __file__, *words, *["--tiny"] * tiny]
                done = subprocess.run(
                    command, capture_output=True, text=True, check=False
                )
                if done.returncode:
                    print(case, policy, kind, again, "failed:", done.stderr[-800:])
                    continue
                yield _told(json.loads(done.stdout.splitlines()[-1]))


def _told(found: dict) -> dict:
    sizes = [
        "-" if found[name] is None else f"{found[name] / MB:.1f}"
        for name in (
            "estimate",
            "tracker",
            "accelerate",
            "ledger",
            "allocator",
            "resident",
        )
    ]
    off = found["estimate"] / found["ledger"] - 1
    saved = found["estimate_saved"] - found["ledger_saved"]
    print(
        f"{found['case']:7} {found['policy']:10} {found['optimizer']:9} "
        f"{'yes' if found['recompute'] else 'no':3}",
        *(f"{size:>8}" for size in sizes),
        f"| {off:+.3%} {saved:+} B {found['estimate_seconds']:.2f} s",
        flush=True,
    )
    return found


def _sum_up(rows: list[dict]) -> None:
    if not rows:
        return
    worst = max(abs(each["estimate"] / each["ledger"] - 1) for each in rows)
    wrong = sum(each["estimate_saved"] != each["ledger_saved"] for each in rows)
    alike = [each for each in rows if each["tracker"] is not None]
    rival = max(
        (abs(each["tracker"] / each["ledger"] - 1) for each in alike), default=0.0
    )
    print(
        f"{len(rows)} rows: peak off by at most {worst:.3%} (torch's tracker: "
        f"{rival:.2%} on its {len(alike)}); saved bytes differ in {wrong}"
    )


if __name__ == "__main__":
    main()
