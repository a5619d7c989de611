"""A small task that many tests of the hybrid trainer share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from castwise.hybrid import HybridSettings, HybridTrainer

NUM_SAMPLES, NUM_FEATURES, NUM_CLASSES = 251, 13, 5


def classification_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One cross entropy for each sample."""
    inputs, classes = batch
    return functional.cross_entropy(model(inputs), classes, reduction="none")


@dataclass
class SmallTask:
    """A classifier with dropout and a norm that has buffers, and its batches."""

    seed: int = 0
    batch_size: int = 63
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.inputs = torch.randn(NUM_SAMPLES, NUM_FEATURES)
        self.classes = (self.inputs @ torch.randn(NUM_FEATURES, NUM_CLASSES)).argmax(1)
        self.model = nn.Sequential(
            nn.Linear(NUM_FEATURES, 31),
            nn.BatchNorm1d(31),
            nn.Tanh(),
            nn.Dropout(0.1),
            nn.Linear(31, NUM_CLASSES),
        )

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step, a pure function of it."""
        generator = torch.Generator().manual_seed(1000 + step)
        rows = torch.randint(NUM_SAMPLES, (self.batch_size,), generator=generator)
        return self.inputs[rows], self.classes[rows]

    def adamw(self, rate: float = 2e-3) -> torch.optim.AdamW:
        """An optimizer of the model."""
        return torch.optim.AdamW(self.model.parameters(), lr=rate)

    def trainer(self, settings: HybridSettings, **more: Any) -> HybridTrainer:
        """A trainer of the model with AdamW."""
        optimizer = more.pop("optimizer", None) or self.adamw()
        return HybridTrainer(
            self.model, optimizer, classification_loss, settings=settings, **more
        )


def bits_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of everything that training changes in a model and its optimizer."""
    found = {name: value.clone() for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                found[f"state.{index}.{key}"] = value.clone()
    found["random"] = torch.get_rng_state()
    return found


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Every tensor equal, none missing."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
