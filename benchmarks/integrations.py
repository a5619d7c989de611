"""What the integrations cost per step, beside the host's own bf16.

    OMP_NUM_THREADS=1 python benchmarks/integrations.py

Wall time of whole runs over tiny models, so that the overhead shows; median of five
runs, interleaved in one process.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments
from transformers import Trainer as HuggingFaceTrainer

from castwise.integrations.huggingface import CastwiseCallback
from castwise.integrations.lightning import CastwisePrecision
from castwise.policy import preset

NUM_STEPS, RUNS = 300, 5


class Net(LightningModule):
    """Four small layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))

    def training_step(self, batch: Any, _index: int) -> torch.Tensor:
        """Return the loss."""
        loss: torch.Tensor = self.body(batch[0]).float().pow(2).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def lightning(**precision: Any) -> None:
    """Train with Lightning."""
    rows = TensorDataset(torch.randn(8 * NUM_STEPS, 16))
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **precision,
    )
    trainer.fit(Net(), DataLoader(rows, batch_size=8))


def huggingface(*callbacks: Any, **precision: Any) -> None:
    """Train with transformers."""
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=37, n_positions=16)
    row = torch.arange(12)
    with tempfile.TemporaryDirectory() as folder:
        HuggingFaceTrainer(
            GPT2LMHeadModel(config),
            TrainingArguments(
                output_dir=folder,
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
                save_strategy="no",
                logging_strategy="no",
                max_steps=NUM_STEPS,
                **precision,
            ),
            train_dataset=[{"input_ids": row, "labels": row}] * 64,
            callbacks=list(callbacks),
        ).train()


def with_island() -> Any:
    """bf16 with one fp32 island."""
    return preset("bf16-mixed").with_rule(module="body.1", precision="fp32")


CASES: dict[str, Callable[[], None]] = {
    "Lightning 32-true": lambda: lightning(precision="32-true"),
    "Lightning bf16-mixed": lambda: lightning(precision="bf16-mixed"),
    "CastwisePrecision 32-true": lambda: lightning(
        plugins=[CastwisePrecision("32-true")]
    ),
    "CastwisePrecision bf16-mixed": lambda: lightning(
        plugins=[CastwisePrecision("bf16-mixed")]
    ),
    "CastwisePrecision bf16-mixed, one island": lambda: lightning(
        plugins=[CastwisePrecision(with_island())]
    ),
    "transformers.Trainer bf16=True": lambda: huggingface(bf16=True),
    "CastwiseCallback bf16-mixed": lambda: huggingface(CastwiseCallback("bf16-mixed")),
}


def main() -> None:
    """Measure, and print microseconds per step."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {name: [] for name in CASES}
    for run in range(RUNS + 1):
        for name, case in CASES.items():
            _forget_accelerate()
            start = time.process_time()
            case()
            if run:  # the first one warms up
                found[name].append((time.process_time() - start) / NUM_STEPS * 1e6)
    for name, times in found.items():
        print(f"{name:44s} {statistics.median(times):7.0f} us per step")


def _forget_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: PLC0415 -- kept beside its only use

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()  # noqa: SLF001 -- the mixed precision of a process is kept there


if __name__ == "__main__":
    main()
