"""Memory of the savings together, each arm in a process of its own.

    castwise bench hybrid stacking

Every arm trains the same transformer for some steps through every phase and reports the
peak of each phase above what the process held before the model was built. What is added
from arm to arm is named; the last one has everything at once.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from castwise.hybrid.hybrid_trainer import HybridTrainer
from castwise.hybrid.phase_precision import MixedPrecisionConfig
from castwise.hybrid.resting_states import Place
from castwise.hybrid.settings import HybridSettings
from castwise.memory.monitor import MemoryMonitor, steady_allocator
from castwise.optim import AdamW, SweepSettings
from castwise.policy import PHASES, Policy, preset

NUM_STEPS = 18
NUM_SAMPLES, LENGTH, VOCABULARY = 16, 48, 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Savings:
    """What one arm saves."""

    hybrid: bool = True
    """Phases, with a predictor and its trials."""

    low: bool = False
    """bf16 compute in every phase."""

    split: bool = False
    """Weights and gradients in bf16, over exact split storage."""

    states: Literal["fp32", "8bit"] = "fp32"
    """Optimizer states."""

    num_parts: int = 1
    """Parts of a batch whose gradients are accumulated."""

    predict_states: Place = "stay"
    """Where optimizer states are in predict."""


ARMS: Mapping[str, Savings] = MappingProxyType(
    {
        "vanilla fp32": Savings(hybrid=False),
        "hybrid": Savings(),
        "hybrid, on disk": Savings(predict_states="disk"),
        "+ bf16 compute": Savings(low=True),
        "+ accumulation": Savings(low=True, num_parts=4),
        "+ split weights": Savings(low=True, num_parts=4, split=True),
        "+ 8-bit states": Savings(low=True, num_parts=4, split=True, states="8bit"),
        "+ states on disk": Savings(
            low=True, num_parts=4, split=True, states="8bit", predict_states="disk"
        ),
    }
)
"""Every arm with a + has what the arms with a + before it have."""


def stacking(width: int = 256, depth: int = 3) -> dict[str, Any]:
    """Measure every arm in a process of its own."""
    found = {}
    for name in ARMS:
        made = subprocess.run(  # noqa: S603 -- our own interpreter and module
            [sys.executable, "-m", __name__, name, str(width), str(depth)],
            check=True,
            capture_output=True,
            text=True,
        )
        found[name] = json.loads(made.stdout.splitlines()[-1])
    return found


def table_of(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return MiB by phase and the peak of each arm, beside the first."""
    first = max(found[next(iter(found))]["phases"].values())
    phases = (*PHASES, "peak")
    lines = [" ".join([" " * 18, *(f"{phase:>8s}" for phase in phases)])]
    for name, record in found.items():
        peaks = record["phases"]
        peak = max(peaks.values())
        cells = [
            f"{peaks[phase] / 2**20:8.1f}" if phase in peaks else f"{'-':>8s}"
            for phase in PHASES
        ]
        lines.append(
            f"{name:18s} {' '.join(cells)} {peak / 2**20:8.1f}  x{peak / first:.2f}"
        )
    return "\n".join(lines)


def measure(arm: str, width: int, depth: int) -> dict[str, Any]:
    """Train one arm in this process; return its peaks by phase, in bytes."""
    torch.set_num_threads(1)
    steady_allocator()
    savings = ARMS[arm]
    _train(savings, 128, 1, None)  # what code and kernels hold is there from now on
    gc.collect()
    monitor = MemoryMonitor("cpu")
    before = monitor.now_bytes()
    trainer = _train(savings, width, depth, monitor)
    trainer.meter.read_memory()
    found = trainer.statistics
    return {
        "num_parameters": sum(p.numel() for p in trainer.run.model.parameters()),
        "phases": {
            phase: max(0, count.peak_bytes - before)
            for phase, count in found.phases.items()
            if count.steps
        },
        "resting_bytes": found.resting_bytes,
        "resting_seconds": found.resting_seconds,
        "accepts": found.accepts,
    }


def _train(
    savings: Savings, width: int, depth: int, monitor: MemoryMonitor | None
) -> HybridTrainer:
    torch.manual_seed(0)
    model = _Transformer(width, depth)
    optimizer = AdamW(
        model.parameters(), lr=1e-3, settings=SweepSettings(states=savings.states)
    )
    trainer = HybridTrainer(
        model,
        optimizer,
        _loss,
        settings=_settings(savings),
        policy=_policy(savings),
        monitor=monitor,
    )
    for step in range(NUM_STEPS):
        trainer.step(*_batch(step).chunk(savings.num_parts))
    return trainer


def _settings(savings: Savings) -> HybridSettings:
    """Short phases; every proposal lands, so that every phase is there to measure."""
    config = MixedPrecisionConfig.conservative()
    if savings.low:
        config = MixedPrecisionConfig.aggressive()
    settings = HybridSettings(
        warmup_steps=4,
        full_steps=4,
        correct_steps=2,
        predictor="window_line",
        confidence_threshold=0.01,
        verification_z=0.0,
        divergence_threshold=1e6,
        mixed_precision_config=config,
        predict_states=savings.predict_states,
    )
    return settings if savings.hybrid else replace(settings, warmup_steps=10**6)


def _policy(savings: Savings) -> Policy:
    config = _settings(savings).mixed_precision_config
    return config.policy(over=preset("bf16-true") if savings.split else None)


class _Transformer(nn.Module):
    """Pre-norm blocks of causal attention, to have the usual shares of memory."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 8, 4 * width, 0.0, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def _batch(step: int) -> Tensor:
    """A cycle of tokens with some noise, so that there is something to learn."""
    lot = torch.Generator().manual_seed(step)
    starts = torch.randint(VOCABULARY, (NUM_SAMPLES, 1), generator=lot)
    return (starts + torch.arange(LENGTH + 1)) % VOCABULARY


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids[:, :-1]).float()
    losses = functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return losses.reshape(len(ids), -1).mean(1)


if __name__ == "__main__":
    record = measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.write(json.dumps(record) + "\n")
