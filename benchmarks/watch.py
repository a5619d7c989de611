"""What a watch costs: idle steps, and steps that are looked at.

    python benchmarks/watch.py

Two models, each trained by `castwise.prepare` in bf16-mixed with AdamW. Steps without a
watch, idle steps under one, sampled steps (a window each), and steps that a sentinel
guards without and with a probe of every module take turns in one process; ratios of
medians of CPU time, and the quartiles of the paired ratios. The rival is what a loop
does that asks the same of every whole tensor: hooks on the same modules, and `bincount`
of the exponents of weights, gradients, outputs and gradients of outputs in full.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import castwise as cw
from castwise.numerics.watch import WatchSchedule, watch
from castwise.numerics.watch.exponents import NUM_BINS, exponent_bins

Loss = Callable[[], torch.Tensor]


def language_model() -> tuple[nn.Module, Loss]:
    """Four layers of width 256, four rows of 256 tokens."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    body = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    model = nn.Sequential(nn.Embedding(500, 256), body, nn.Linear(256, 500))
    tokens = torch.randint(500, (4, 257))

    def loss() -> torch.Tensor:
        logits = model(tokens[:, :-1])
        return functional.cross_entropy(logits.mT, tokens[:, 1:])

    return model, loss


def conv_net() -> tuple[nn.Module, Loss]:
    """Eight convolutions with batch norm, 16 images of 32 x 32."""
    widths = (3, 32, 32, 64, 64, 64, 64, 128, 128)
    blocks = [
        nn.Sequential(
            nn.Conv2d(a, b, 3, 1 + (i in {2, 6}), 1, bias=False),
            nn.BatchNorm2d(b),
            nn.ReLU(),
        )
        for i, (a, b) in enumerate(pairwise(widths))
    ]
    model = nn.Sequential(
        *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)
    )
    images, labels = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    return model, lambda: functional.cross_entropy(model(images), labels)


class InFull:
    """The rival: hooks on every module, histograms of every whole tensor."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.hooks: list[Any] = []

    def begins(self) -> None:
        """Hook the modules that a watch hooks."""
        for fqn, module in self.model.named_modules():
            if not fqn or not any(True for _ in module.children()):
                self.hooks.append(module.register_forward_hook(self.see))

    def see(self, module: nn.Module, given: Any, output: Any) -> None:
        """Count an output, and later its gradient."""
        del module, given
        count(output)
        if output.requires_grad:
            output.register_hook(count)

    def gradients_ready(self, scale: float) -> None:
        """Count weights and gradients."""
        del scale
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        for weight in self.model.parameters():
            count(weight)
            count(weight.grad)

    def ends(self, *, stepped: bool) -> None:
        """Nothing is left to do."""


def count(tensor: torch.Tensor | None) -> None:
    """Count the exponents of a whole tensor."""
    if tensor is not None:
        bins = exponent_bins(tensor.detach().reshape(-1))
        torch.bincount(bins, minlength=NUM_BINS)


def seconds(run: cw.Run, loss: Loss) -> float:
    """CPU time of one step."""
    start = time.process_time()
    with run.step() as step:
        step.backward(loss())
    return time.process_time() - start


def guarded_seconds(guard: cw.Sentinel, loss: Loss) -> float:
    """CPU time of one step that a sentinel guards."""
    start = time.process_time()
    guard.step(loss)
    return time.process_time() - start


def ratios(name: str, plain: list[float], other: list[float]) -> str:
    """Ratio of medians, and quartiles of the paired ratios."""
    pairs = [b / a for a, b in zip(plain, other, strict=True)]
    low, _, high = statistics.quantiles(pairs, n=4)
    ratio = statistics.median(other) / statistics.median(plain)
    return f"{name} {ratio:.4f} [{low:.4f}, {high:.4f}]"


def idle_microseconds(run: cw.Run) -> float:
    """What an idle watch is told in one step: begin, gradients, end."""
    with watch(run, schedule=WatchSchedule(every=10**9, first=10**8)) as watching:
        start = time.process_time()
        for _ in range(10_000):
            watching.begins()
            watching.gradients_ready(1.0)
            watching.ends(stepped=True)
        return (time.process_time() - start) * 1e6 / 10_000


def main() -> None:
    """Print one row for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15, help="Steps of each kind.")
    num_turns = parser.parse_args().turns
    for build in (language_model, conv_net):
        torch.manual_seed(0)
        model, loss = build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        run = cw.prepare(model, optimizer, cw.preset("bf16-mixed"))
        kinds = ("none", "idle", "look", "full", "guarded", "probed")
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        guard = cw.Sentinel(run, cw.SentinelSettings(probe_every=0))
        probing = cw.Sentinel(run, cw.SentinelSettings(probe_every=1))
        guarded_seconds(guard, loss)  # the copies are made once
        guarded_seconds(probing, loss)
        for _ in range(3):
            seconds(run, loss)
        for _ in range(num_turns):
            times["none"].append(seconds(run, loss))
            with watch(run, schedule=WatchSchedule(every=10**9, first=10**8)):
                times["idle"].append(seconds(run, loss))
            with watch(run, schedule=WatchSchedule(every=1)) as watching:
                seconds(run, loss)  # the table is made on the first look
                times["look"].append(seconds(run, loss))
            run.watchers.append(InFull(model))
            times["full"].append(seconds(run, loss))
            run.watchers.clear()
            times["guarded"].append(guarded_seconds(guard, loss))
            times["probed"].append(guarded_seconds(probing, loss))
        told = len(watching.windows[-1].tensors)
        step = statistics.median(times["none"])
        idle = idle_microseconds(run)
        print(
            f"{build.__name__}: step {1e3 * step:.1f} ms, {told} tensors; "
            f"{ratios('idle', times['none'], times['idle'])} "
            f"(told in {idle:.1f} us, {1e-4 * idle / step:.4f} % of a step); "
            f"{ratios('sampled', times['none'], times['look'])}; "
            f"{ratios('in full', times['none'], times['full'])}; "
            f"{ratios('guarded', times['none'], times['guarded'])}; "
            f"{ratios('probed', times['none'], times['probed'])}"
        )


if __name__ == "__main__":
    main()
