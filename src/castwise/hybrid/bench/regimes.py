"""Regimes in which prediction might pay, each tuned in rate, momentum and schedule.

Steps take milliseconds here, so that what a method costs beside its passes is small,
as it is in a run that anybody would want to speed up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from castwise.hybrid.bench.problems import (
    Batch,
    Minibatch,
    Problem,
    Softmax,
    WholeBatch,
    perceptron,
)


class FullBatch(Softmax):
    """Softmax regression on all of 6,000 samples, with the momentum tuned too."""

    rates = (2.0, 4.0, 5.5, 7.0, 9.0)
    momenta = (0.9, 0.95, 0.98)
    tuning_seeds = (100, 101)
    num_samples = 6000
    max_steps = 600


class LargeBatch(Minibatch):
    """A perceptron in batches of 1,024 of 4,096 samples."""

    rates = (1.6e-2, 3.2e-2, 6.4e-2, 0.128)
    decays = (0, 300)
    num_samples, num_in_batch = 4096, 1024
    max_steps = 600
    evaluate_every = 10
    target = 0.02


class FineTuning(Problem):
    """A trained perceptron is tuned to a teacher a little off, in batches of 512."""

    rates = (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
    decays = (0, 200)
    max_steps = 400
    evaluate_every = 5
    target = 0.002
    num_samples, num_in_batch = 2048, 512
    trained: ClassVar[dict[tuple[str, int], dict[str, Tensor]]] = {}

    def prepare(self) -> None:
        """Train on one teacher; then turn it by a tenth."""
        inputs = torch.randn(self.num_samples, 64)
        first, second = torch.randn(64, 32), torch.randn(32, 10)
        self.data = (inputs, _classes(inputs, first, second))
        self.model = perceptron(64, 128, 128, 10)
        off = torch.randn(64, 32)
        key = type(self).__name__, self.seed
        if key not in self.trained:
            self.pretrain()
            state = self.model.state_dict().items()
            self.trained[key] = {name: value.clone() for name, value in state}
        self.model.load_state_dict(self.trained[key])
        self.data = (inputs, _classes(inputs, first + 0.1 * off, second))

    def pretrain(self) -> None:
        """Take 400 steps on everything."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=4e-3)
        for _ in range(400):
            self.loss(self.model, self.data).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return one cross entropy for each sample."""
        logits: Tensor = model(batch[0])
        return nn.functional.cross_entropy(logits, batch[1], reduction="none")

    def batch(self, step: int) -> Batch:
        """Return samples drawn with replacement."""
        lot = torch.Generator().manual_seed(1_000_000 * self.seed + step)
        rows = torch.randint(self.num_samples, (self.num_in_batch,), generator=lot)
        return self.data[0][rows], self.data[1][rows]

    def evaluate(self) -> float:
        """Return the loss of all samples."""
        with torch.no_grad():
            return float(self.loss(self.model, self.data).mean())


class LateTraining(FineTuning):
    """The end of a run: small steps in batches of 128, down to a loss once halved."""

    rates = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
    decays = (0, 300)
    max_steps = 500
    evaluate_every = 10
    target_is = "half of the loss at the beginning"
    num_samples, num_in_batch = 4096, 128
    trained: ClassVar[dict[tuple[str, int], dict[str, Tensor]]] = {}

    def prepare(self) -> None:
        """Train on a teacher whose answers are noisy, and go on with the same."""
        inputs = torch.randn(self.num_samples, 64)
        logits = torch.tanh(inputs @ torch.randn(64, 32) / 8) @ torch.randn(32, 10)
        labels = (logits + torch.randn_like(logits)).argmax(1)
        self.data = (inputs, labels)
        self.model = perceptron(64, 128, 128, 10)
        key = type(self).__name__, self.seed
        if key not in self.trained:
            self.pretrain()
            state = self.model.state_dict().items()
            self.trained[key] = {name: value.clone() for name, value in state}
        self.model.load_state_dict(self.trained[key])
        self.target = 0.5 * self.evaluate()

    def pretrain(self) -> None:
        """Take 300 steps in batches at a rate that is too large to end with."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=4e-3)
        for step in range(300):
            batch = self.batch(10**6 + step)
            self.loss(self.model, batch).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()


class Physics(WholeBatch):
    """A physics-informed network: u'' = f on an interval, with u given at its ends."""

    rates: Sequence[float] = (2e-3, 4e-3, 8e-3, 1.6e-2)
    decays = (0, 1000)
    max_steps = 1500
    evaluate_every = 10
    target = 1e-2
    num_points = 256

    def prepare(self) -> None:
        """Draw a solution of four waves; f is its second derivative."""
        places = torch.linspace(-1, 1, self.num_points)[:, None]
        rates, shifts = 2.0 * torch.arange(1, 5), 6.28 * torch.rand(4)
        heights = 1.0 / torch.arange(1, 5) ** 2
        self.ends = (heights * (rates * places[[0, -1]] + shifts).sin()).sum(1)
        forces = -(heights * rates**2 * (rates * places + shifts).sin()).sum(1)
        self.data = (places, forces)
        self.model = perceptron(1, 64, 64, 1)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the squared residual at each point, with that of the ends."""
        places, forces = batch
        value, second = _value_and_curvature(model, places)
        ends = (value[[0, -1], 0] - self.ends).square().sum()
        return (second[:, 0] - forces).square() + 100.0 * ends


def _classes(inputs: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return (torch.tanh(inputs @ first / 8) @ second).argmax(1)


def _value_and_curvature(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run value and derivatives forward through linear layers with tanh."""
    value, first, second = x, torch.ones_like(x), torch.zeros_like(x)
    for layer in model:
        if isinstance(layer, nn.Linear):
            value = layer(value)
            first, second = first @ layer.weight.mT, second @ layer.weight.mT
            continue
        bent = torch.tanh(value)
        slope = 1 - bent * bent
        second = slope * second - 2 * bent * slope * first * first
        value, first = bent, slope * first
    return value, second
