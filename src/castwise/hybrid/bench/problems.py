"""Problems: a model, its data, and a loss that has to be reached.

Everything follows from the seed. Batches are pure functions of the step, so all methods
see the same ones.
"""

from __future__ import annotations

import itertools
import pydoc_data.topics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Inputs and what is wanted for them."""


def cross_entropies(model: nn.Module, batch: Batch) -> Tensor:
    """One cross entropy for each sample."""
    logits = model(batch[0])
    losses = functional.cross_entropy(
        logits.flatten(0, -2), batch[1].flatten(), reduction="none"
    )
    return losses.reshape(len(batch[1]), -1).mean(1)


def perceptron(*widths: int) -> nn.Sequential:
    """Return linear layers with tanh between."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Problem(ABC):
    """What is to be trained, and when it is done."""

    rates: Sequence[float]
    """The grid of learning rates."""

    momenta: Sequence[float] = (0.9,)
    """The grid of momenta, where the optimizer has one."""

    decays: Sequence[int] = (0,)
    """The grid of schedules: steps of a linear fall to 5 %, or 0 for none."""

    max_steps: int
    evaluate_every: int = 1
    average_decay: float = 0.95
    latest_every: int = 5
    has_target: bool = True
    is_whole: bool = False
    """Whether every batch is all of the data, so that nothing is noise."""

    kind: str = "adam"
    """Of the plain optimizer: adam or sgd."""

    tuning_seeds: Sequence[int] = (100, 101)
    target: float
    target_is: str = ""
    """Where it depends on the seed: what it is, in words."""

    model: nn.Module

    def __init__(self, seed: int) -> None:
        self.seed = seed
        torch.manual_seed(seed)
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Make data, model and `self.target`, from the seed alone."""

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """Return the batch of a step."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return one loss for each sample."""

    @abstractmethod
    def evaluate(self) -> float:
        """Return the loss that is compared with the target."""

    def optimizer(self, rate: float, momentum: float) -> torch.optim.Optimizer:
        """Return the plain optimizer."""
        parameters = self.model.parameters()
        if self.kind == "sgd":
            return torch.optim.SGD(
                parameters, lr=rate, momentum=momentum, nesterov=True
            )
        return torch.optim.AdamW(parameters, lr=rate, betas=(momentum, 0.99))


class WholeBatch(Problem):
    """A problem whose batch is all of its data."""

    is_whole = True
    data: Batch

    def batch(self, step: int) -> Batch:
        """Return everything."""
        del step
        return self.data

    def evaluate(self) -> float:
        """Return the mean loss."""
        with torch.no_grad():
            return float(self.loss(self.model, self.data).mean())


class Softmax(WholeBatch):
    """Softmax regression on ill-conditioned features, all data in every batch."""

    kind = "sgd"
    rates: Sequence[float] = (4.0, 5.5, 7.0, 8.0, 9.0)
    tuning_seeds: Sequence[int] = range(
        5
    )  # some data sets are unstable where others are fastest
    max_steps = 900
    target_is = "1e-4 above the minimum"
    evaluate_every = 3
    num_samples = 1200
    gap = 1e-4
    decay = 1e-4
    minima: ClassVar[dict[tuple[str, int], float]] = {}

    def prepare(self) -> None:
        """Draw ten noisy classes whose features have a spectrum of 1 to 1/500."""
        num, features, classes = self.num_samples, 64, 10
        centres = torch.randn(classes, features)
        labels = torch.randint(classes, (num,))
        inputs = centres[labels] + 1.5 * torch.randn(num, features)
        spectrum = torch.arange(1, features + 1).float() ** -1.5
        turned = torch.linalg.qr(torch.randn(features, features))[0]
        inputs = (inputs * spectrum) @ turned
        largest = torch.linalg.svdvals(inputs)[0] / num**0.5  # sets the largest rate
        self.data = (inputs / largest, labels)
        self.model = nn.Linear(features, classes)
        for parameter in self.model.parameters():
            nn.init.zeros_(parameter)
        key = type(self).__name__, self.seed
        if key not in self.minima:
            self.minima[key] = self._minimum()
        self.target = self.minima[key] + self.gap

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Add the square of the weights to every sample."""
        square = torch.stack([(p * p).sum() for p in model.parameters()]).sum()
        return cross_entropies(model, (batch[0], batch[1][:, None])) + (
            self.decay / 2 * square
        )

    def _minimum(self) -> float:
        """Solve the problem in fp64 by L-BFGS."""
        model, data = nn.Linear(64, 10).double(), (self.data[0].double(), self.data[1])
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        solver = torch.optim.LBFGS(
            model.parameters(),
            max_iter=2000,
            tolerance_grad=1e-10,
            tolerance_change=1e-14,
            history_size=50,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            solver.zero_grad()
            loss = self.loss(model, data).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        solver.step(closure)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            return float(self.loss(model, data).mean())


class Curve(WholeBatch):
    """A perceptron fits a curve at 128 points, all of them in every batch."""

    rates = (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
    decays = (0, 800)
    max_steps = 2000
    evaluate_every = 10
    target = 1e-4

    def prepare(self) -> None:
        """Draw a curve of four waves, and a student of two hidden layers."""
        places = torch.linspace(-1, 1, 128)[:, None]
        waves = 3.0 * torch.arange(1, 5) * places + 6.28 * torch.rand(4)
        self.data = (places, (waves.sin() / torch.arange(1, 5)).sum(1, keepdim=True))
        self.model = perceptron(1, 48, 48, 1)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return one square for each point."""
        squares: Tensor = (model(batch[0]) - batch[1]).square()
        return squares.squeeze(1)


class Minibatch(Problem):
    """A perceptron on 1,000 samples of a teacher, in batches of 64."""

    rates: Sequence[float] = (8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128)
    decays = (0, 400)
    max_steps = 2000
    evaluate_every = 20
    target = 0.01
    num_samples, num_in_batch = 1000, 64
    widths: Sequence[int] = (32, 96, 96, 8)

    def prepare(self) -> None:
        """Draw a teacher of one hidden layer, and a student of two."""
        inputs = torch.randn(self.num_samples, 32)
        teacher = torch.tanh(inputs @ torch.randn(32, 16)) @ torch.randn(16, 8)
        self.data = (inputs, teacher.argmax(1))
        self.model = perceptron(*self.widths)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return one cross entropy for each sample."""
        return cross_entropies(model, (batch[0], batch[1][:, None]))

    def batch(self, step: int) -> Batch:
        """Return samples drawn with replacement."""
        lot = torch.Generator().manual_seed(1_000_000 * self.seed + step)
        rows = torch.randint(self.num_samples, (self.num_in_batch,), generator=lot)
        return self.data[0][rows], self.data[1][rows]

    def evaluate(self) -> float:
        """Return the loss of all samples."""
        with torch.no_grad():
            return float(self.loss(self.model, self.data).mean())


class Language(Problem):
    """A transformer of one layer on the characters of Python's help texts."""

    rates = (2e-3, 4e-3, 8e-3, 1.6e-2)
    max_steps = 1500
    evaluate_every = 50
    tuning_seeds = (100,)
    target_is = "none: the loss after the last step"
    has_target = False  # trained to the last step; the final loss is compared
    num_in_batch, length, width, depth = 16, 64, 48, 1

    def prepare(self) -> None:
        """Cut the text into a training and a validation part."""
        topics = pydoc_data.topics.topics
        text = "".join(topics[name] for name in sorted(topics))
        alphabet = sorted(set(text))
        ids = torch.tensor([alphabet.index(each) for each in text[:200_000]])
        self.train, self.valid = ids[:180_000], ids[180_000:]
        self.model = CharTransformer(len(alphabet), self.width, self.length, self.depth)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return one cross entropy for each window."""
        return cross_entropies(model, batch)

    def batch(self, step: int) -> Batch:
        """Return random windows of the text."""
        return self.windows(self.train, 1_000_000 * self.seed + step, self.num_in_batch)

    def windows(self, ids: Tensor, seed: int, num: int) -> Batch:
        """Return windows and what comes after each character."""
        lot = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(ids) - self.length - 1, (num, 1), generator=lot)
        rows = ids[starts + torch.arange(self.length + 1)]
        return rows[:, :-1], rows[:, 1:]

    def evaluate(self) -> float:
        """Return the loss of fixed windows of the validation part."""
        with torch.no_grad():
            batch = self.windows(self.valid, 0, 128)
            return float(self.loss(self.model, batch).mean())


class TwoLayers(Language):
    """The same with two layers and 117 thousand weights."""

    width, depth = 64, 2


class CharTransformer(nn.Module):
    """Pre-norm blocks of causal attention and a perceptron."""

    def __init__(self, vocabulary: int, width: int, length: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of the next character at every place."""
        x = self.blocks(self.tokens(ids) + self.places[: ids.shape[1]])
        logits: Tensor = self.head(self.norm(x))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.into(self.norms[0](x)).unflatten(-1, (3, 4, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        mixed: Tensor = x + self.down(functional.gelu(self.up(self.norms[1](x))))
        return mixed
