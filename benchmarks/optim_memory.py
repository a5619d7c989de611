"""Bytes per parameter at the peak of real training steps, each way in its own process.

    python benchmarks/optim_memory.py [--layers 48] [--width 1024]

A stack of square linear layers is trained for three steps on one row of data, so that
activations weigh nothing. Measured is the growth of the resident memory of the process,
by the high-water mark of Linux, from before the model is made to the peak of the third
step; it includes what torch and the optimizer hold for a moment. `held` is what stays
between the steps, and `counted` adds up the formats of weights, gradients and states: a
scale for each 256 numbers of an 8-bit state is 4 / 256 = 0.016 bytes of it.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from castwise.optim import AdamW, SweepSettings, hold_weights

EIGHT = SweepSettings(states="8bit", check_finite=False)
SPLIT = {"storage": "split", "ours": True}
SCALES = 2 * 4 / 256
WAYS: dict[str, tuple[dict[str, Any], float]] = {
    "fp32, torch AdamW fused": ({}, 16),
    "torch autocast, AdamW fused": ({"autocast": True}, 16),
    "bf16 + fp32 master, torch AdamW fused": ({"storage": "master"}, 16),
    "split, torch AdamW fused": ({"storage": "split"}, 14),
    "split, castwise AdamW": (SPLIT, 14),
    "the same, gradients released": ({**SPLIT, "release": True}, 12),
    "split, castwise AdamW 8-bit": ({**SPLIT, "eight": True}, 8 + SCALES),
    "the same 8-bit, gradients released": (
        {**SPLIT, "eight": True, "release": True},
        6 + SCALES,
    ),
}
"""How to train, and the bytes that follow from the formats."""


def resident(entry: str) -> int:
    """Return an entry of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(entry):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {entry} in /proc/self/status; this benchmark needs Linux")


def train(way: dict[str, Any], layers: int, width: int) -> None:
    """Train one way and print its bytes per parameter, at the peak and held."""
    ctypes.CDLL(None).mallopt(-3, 64 << 10)  # M_MMAP_THRESHOLD: free means free
    torch.set_num_threads(1)
    before = 0
    if layers > 1:
        train(way, 1, width)  # what torch, oneDNN and numba set up once for this width
        before = resident("VmRSS")
    data = torch.randn(1, width)
    model = torch.nn.Sequential(
        *(torch.nn.Linear(width, width, bias=False) for _ in range(layers))
    )
    parameters = list(model.parameters())
    optimizer: torch.optim.Optimizer
    if way.get("ours"):
        settings = EIGHT if way.get("eight") else SweepSettings(check_finite=False)
        optimizer = AdamW(parameters, settings=settings)
    else:
        optimizer = torch.optim.AdamW(parameters, fused=True)
    if "storage" in way:
        release = bool(way.get("release"))
        hold_weights(optimizer, way["storage"], release_gradients=release)
        data = data.bfloat16()
    for step in range(3):
        if step == 2:
            Path("/proc/self/clear_refs").write_text("5")  # restart the high-water mark
        with torch.autocast("cpu", enabled=bool(way.get("autocast"))):
            loss = model(data).float().square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if layers == 1:
        return
    size = layers * width * width
    peak = (resident("VmHWM") - before) / size
    print(f"{peak:8.2f}{(resident('VmRSS') - before) / size:8.2f}")


def main() -> None:
    """Run every way in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--way", default="")
    settings = parser.parse_args()
    if settings.way:
        train(WAYS[settings.way][0], settings.layers, settings.width)
        return
    print(f"torch {torch.__version__}, {settings.layers} x {settings.width}^2")
    print(f"{'bytes per parameter':40}{'counted':>8}{'peak':>8}{'held':>8}")
    for name, (_, counted) in WAYS.items():
        command = [sys.executable, __file__, "--way", name]
        command += ["--layers", str(settings.layers), "--width", str(settings.width)]
        told = subprocess.run(command, check=True, capture_output=True, text=True)
        print(f"{name:40}{counted:8.2f}{told.stdout.rstrip()}")


if __name__ == "__main__":
    main()
