"""Nanoseconds and bytes per parameter of optimizer steps, side by side in one process.

    python benchmarks/optim.py [--sizes 1e6,5e7] [--rounds 15] [--threads 1] [--json F]

Every row steps a model of that many parameters with gradients at hand. The rows take
turns, round after round, so that a slow minute of the machine hits all of them. A
figure is the median over the rounds, `of fused` the median of the ratios to torch's
fused fp32 AdamW in the same round, `least` the shortest round. Bandwidth is measured in
the same turns, by an in-place multiplication of an fp32 array: 8 bytes an element. `of
bandwidth` is the least time of a step over the least time of moving its own bytes once.

Each turn begins with a small operator of torch, so that its threads are as after a
backward: awake, and waiting for more. `--only` takes parts of names, such as
`--only "AdamW, split bf16,"` for the step with and without its check, side by side.

On a GPU the sizes go to 1e9 and the clock is that of CUDA events. Peers that are not
installed are named as missing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from castwise import torch_threads
from castwise.optim import (
    SGD,
    AdamW,
    Lion,
    SweepSettings,
    hold_weights,
)

REFERENCE = "torch AdamW fused, fp32"
BANDWIDTH = "bandwidth (x *= a, fp32)"
EIGHT = SweepSettings(states="8bit")
CLIPPED = SweepSettings(max_norm=1.0)


@dataclass(slots=True)
class Row:
    """One optimizer at one size."""

    name: str
    step: Callable[[], Any]
    bytes_held: float
    bytes_moved: float
    times: list[float] = field(default_factory=list)


Setup = Callable[[int, torch.device], tuple[Callable[[], Any], float, float]]


def _model(
    size: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[torch.nn.Parameter]:
    """Return matrices of 4 Mi elements and what is left over."""
    big = 1 << 22
    sizes = [big] * (size // big) + [size % big] * (size % big > 0)
    lot = torch.Generator(device).manual_seed(0)
    return [
        torch.nn.Parameter(
            torch.randn(n, device=device, generator=lot, dtype=dtype) * 0.02
        )
        for n in sizes
    ]


def _set_gradients(parameters: list[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)


def _state_bytes(optimizer: torch.optim.Optimizer, size: int) -> float:
    total = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )
    return total / size


def _torch_setup(make: Callable[..., Any], dtype: torch.dtype = torch.float32) -> Setup:
    def setup(
        size: int, device: torch.device
    ) -> tuple[Callable[[], Any], float, float]:
        parameters = _model(size, device, dtype)
        _set_gradients(parameters)
        optimizer = make(parameters)
        optimizer.step()
        width, states = dtype.itemsize, _state_bytes(optimizer, size)
        return optimizer.step, width + states, 3 * width + 2 * states

    return setup


def _held_setup(make: Callable[..., Any], storage: str = "split") -> Setup:
    def setup(
        size: int, device: torch.device
    ) -> tuple[Callable[[], Any], float, float]:
        parameters = _model(size, device)
        optimizer = make(parameters)
        held = hold_weights(optimizer, storage)
        _set_gradients(parameters)
        optimizer.step()
        weights, states = held.bytes_per_parameter(), _state_bytes(optimizer, size)
        return optimizer.step, weights + states, 2 + 2 * (weights + states)

    return setup


def _in_a_pool(setup: Setup) -> Setup:
    """Let a row of ours run in threads of Python instead of those of torch."""

    def in_a_pool(
        size: int, device: torch.device
    ) -> tuple[Callable[[], Any], float, float]:
        step, held, moved = setup(size, device)

        def stepped() -> None:
            openmp, torch_threads.openmp = torch_threads.openmp, lambda: None
            try:
                step()
            finally:
                torch_threads.openmp = openmp

        return stepped, held, moved

    return in_a_pool


def _bandwidth(
    size: int, device: torch.device
) -> tuple[Callable[[], Any], float, float]:
    values = torch.ones(size, device=device)
    return lambda: values.mul_(1.0000001), 4.0, 8.0


SETUPS: dict[str, Setup] = {
    BANDWIDTH: _bandwidth,
    REFERENCE: _torch_setup(lambda p: torch.optim.AdamW(p, fused=True)),
    "torch AdamW foreach, fp32": _torch_setup(
        lambda p: torch.optim.AdamW(p, foreach=True)
    ),
    "torch AdamW for-loop, fp32": _torch_setup(
        lambda p: torch.optim.AdamW(p, foreach=False)
    ),
    "torch AdamW fused, bf16 (loses updates)": _torch_setup(
        lambda p: torch.optim.AdamW(p, fused=True), torch.bfloat16
    ),
    "castwise AdamW, split bf16, unchecked": _held_setup(
        lambda p: AdamW(p, settings=SweepSettings(check_finite=False))
    ),
    "castwise AdamW, split bf16, checked": _held_setup(AdamW),
    "castwise AdamW, split bf16, checked, pool": _in_a_pool(_held_setup(AdamW)),
    "castwise AdamW, split bf16, check and clip": _held_setup(
        lambda p: AdamW(p, settings=CLIPPED)
    ),
    "castwise AdamW, split, 8-bit states": _held_setup(
        lambda p: AdamW(p, settings=EIGHT)
    ),
    "castwise SGD momentum, split bf16": _held_setup(lambda p: SGD(p, momentum=0.9)),
    "castwise SGD momentum, split bf16, 8-bit": _held_setup(
        lambda p: SGD(p, momentum=0.9, settings=EIGHT)
    ),
    "castwise Lion, split bf16, 8-bit": _held_setup(lambda p: Lion(p, settings=EIGHT)),
    "torch AdamW fused under split": _held_setup(
        lambda p: torch.optim.AdamW(p, fused=True)
    ),
    "torch AdamW fused under master": _held_setup(
        lambda p: torch.optim.AdamW(p, fused=True), "master"
    ),
    "torch AdamW fused under kahan": _held_setup(
        lambda p: torch.optim.AdamW(p, fused=True), "kahan"
    ),
    "torch AdamW fused under stochastic": _held_setup(
        lambda p: torch.optim.AdamW(p, fused=True), "stochastic"
    ),
}

PEERS = {
    "torchao AdamW8bit, fp32": ("torchao.optim", "AdamW8bit", torch.float32, {}),
    "torchao AdamW8bit, bf16 stochastic": (
        "torchao.optim",
        "AdamW8bit",
        torch.bfloat16,
        {"bf16_stochastic_round": True},
    ),
    "bitsandbytes AdamW8bit, fp32": (
        "bitsandbytes.optim",
        "AdamW8bit",
        torch.float32,
        {},
    ),
    "optimi AdamW, bf16 Kahan": ("optimi", "AdamW", torch.bfloat16, {"lr": 1e-3}),
}


def add_peers() -> list[str]:
    """Add what is installed to the rows; return what is missing."""
    missing = []
    for name, (module, attribute, dtype, keywords) in PEERS.items():
        try:
            kind = getattr(importlib.import_module(module), attribute)
        except ImportError:
            missing.append(name)
            continue
        SETUPS[name] = _torch_setup(
            lambda p, kind=kind, keywords=keywords: kind(p, **keywords), dtype
        )
    return missing


def seconds(step: Callable[[], Any], device: torch.device) -> float:
    """Return how long one step takes."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def measure(size: int, rounds: int, device: torch.device, only: str) -> list[Row]:
    """Time all rows of one size in turns, as many at once as memory holds."""
    wanted = [
        name
        for name in SETUPS
        if not only or name in (BANDWIDTH, REFERENCE) or only in name
    ]
    rows = [Row(name, *SETUPS[name](size, device)) for name in wanted]
    for row in rows:
        seconds(row.step, device)
    awake = torch.ones(1 << 18, device=device)
    for _ in range(rounds):
        for row in rows:
            awake.mul_(1.0)
            row.times.append(seconds(row.step, device))
    return rows


def report(size: int, rows: list[Row]) -> list[dict[str, Any]]:
    """Print the rows of one size and return them as records."""
    by_name = {row.name: row for row in rows}
    reference, bandwidth = by_name[REFERENCE], by_name[BANDWIDTH]
    byte = min(bandwidth.times) / (size * bandwidth.bytes_moved)
    print(f"\n{size:,} parameters, {1e-9 / byte:.1f} GB/s")
    print(
        f"{'':44}{'ns':>8}{'least':>8}{'of fused':>10}{'of bandwidth':>14}{'bytes':>8}"
    )
    records = []
    for row in rows:
        time_of, least = statistics.median(row.times), min(row.times)
        pairs = zip(row.times, reference.times, strict=True)
        record = {
            "size": size,
            "name": row.name,
            "ns": time_of / size * 1e9,
            "least_ns": least / size * 1e9,
            "of_fused": statistics.median(mine / theirs for mine, theirs in pairs),
            "of_bandwidth": least / (size * row.bytes_moved * byte),
            "bytes_held": row.bytes_held,
        }
        records.append(record)
        print(
            f"{row.name:44}{record['ns']:8.3f}"
            f"{record['least_ns']:8.3f}{record['of_fused']:10.2f}"
            f"{record['of_bandwidth']:14.2f}{row.bytes_held:8.2f}"
        )
    return records


def main() -> None:
    """Measure, print, and write records where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    sizes = "1e6,1e7,1e8,1e9" if gpu else "1e6,1e7,5e7"
    parser.add_argument("--sizes", default=sizes)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--only", default="", help="part of the names of the rows")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = torch.device("cuda" if gpu else "cpu")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{torch.cuda.get_device_name() if gpu else platform.processor() or 'CPU'}"
    )
    for missing in add_peers():
        print(f"not installed: {missing}")
    records = []
    for size in settings.sizes.split(","):
        rows = measure(int(float(size)), settings.rounds, device, settings.only)
        records += report(int(float(size)), rows)
    if settings.json:
        settings.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
