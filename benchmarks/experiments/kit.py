"""The task of the curriculum experiments: fill Latin squares in three alphabets.

The recipe's own model counts in ranks, so that an alphabet cannot confuse it where
there are no cages. To ask what a curriculum over alphabets does, a model must be able
to fail there. This one reads and writes the 35 tokens of all alphabets, is told size
and mode, and learns the rest: a pre-norm transformer that sees all cells, with two
heads that see one row and one column. Squares, masks, stages and batches are those of
the recipe.

What is measured is exact where it can be: all 576 and 161,280 squares of four and five
rows are known, so the Kullback-Leibler divergence from what the hints allow to what
the model says has no sampling noise but that of the masks. It counts all 35 tokens:
chances given to another alphabet are lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import cos, pi
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import castwise as cw
from castwise.policy import Policy
from castwise.recipes.kenken import posterior
from castwise.recipes.kenken.alphabets import EMPTY, VOCABULARY_SIZE, Mode
from castwise.recipes.kenken.batches import Fill, Mixture, PuzzleBatch, draw_batch
from castwise.recipes.kenken.curricula import mixture_in_force
from castwise.recipes.kenken.dataset import generate_puzzle_set
from castwise.recipes.kenken.evaluation import evaluation_batch
from castwise.recipes.kenken.measures import Rate, hidden_accuracy, is_valid
from castwise.recipes.kenken.puzzle_set import Kind, PuzzleSet, Split
from castwise.training.curriculum import Curriculum
from castwise.training.schedule import WarmupStableDecay

NUM_MADE = 4096
NUM_MEASURED = 1024
LARGEST = 5
UNIFORM = (Fill(empty_share=0.0, reveal=(0.0, 1.0)),)

Key = tuple[int, Mode, Kind]


@dataclass(frozen=True, kw_only=True, slots=True)
class KitSettings:
    """One training on squares."""

    sizes: tuple[int, ...] = (4,)
    """Rows of the squares, each as often."""

    modes: tuple[str, ...] = ("standard", "zero", "negative")
    """Alphabets, each as often."""

    fills: tuple[Fill, ...] = UNIFORM
    """How much is shown."""

    width: int = 64
    """Channels."""

    num_layers: int = 3
    """Blocks."""

    cells_per_step: int = 1024
    """Cells of a batch: 64 squares of four rows."""

    num_steps: int = 450
    """Updates."""

    num_epochs: int = 30
    """Ends of epochs, at which a curriculum may move."""

    learning_rate: float = 4e-3
    """Peak of the schedule."""

    num_warmup: int = 50
    """Updates of the linear rise; at most a quarter of the run."""

    decay: Literal["late", "cosine"] = "late"
    """The rate falls linearly over the last quarter, or as a cosine to a tenth."""

    sees_mode: bool = True
    """Whether the model is told the alphabet."""

    def mixture(self) -> Mixture:
        """What batches are made of without a curriculum."""
        modes = tuple(Mode(name) for name in self.modes)
        return Mixture(
            sizes=self.sizes,
            size_shares=(1 / len(self.sizes),) * len(self.sizes),
            modes=modes,
            mode_shares=(1 / len(modes),) * len(modes),
            latin_share=1.0,
            latin_empty_share=0.1,
            fills=self.fills,
            cells_per_step=self.cells_per_step,
        )

    def rate(self, step: int) -> float:
        """Return the learning rate of an update."""
        num_warmup = min(self.num_warmup, self.num_steps // 4)
        if self.decay == "late":
            schedule = WarmupStableDecay(
                num_steps=self.num_steps, num_warmup=num_warmup, decay_share=0.25
            )
            return self.learning_rate * schedule.factor(step)
        rise = min(1.0, (step + 1) / (num_warmup + 1))
        fallen = 0.55 + 0.45 * cos(pi * step / self.num_steps)
        return self.learning_rate * min(rise, fallen)


# --- the model


class Block(nn.Module):
    """Attention of four heads and a feed-forward of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.other_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Return [B, L, width] of x [B, L, width]; seen is bool [4, L, L]."""
        b, t, width = x.shape
        parts = self.qkv(self.norm(x)).view(b, t, 3, 4, width // 4)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        heard = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.out(heard.transpose(1, 2).reshape(b, t, width))
        return x + self.down(functional.gelu(self.up(self.other_norm(x))))


class SquareModel(nn.Module):
    """From tokens, size and mode to logits of all 35 tokens."""

    def __init__(self, settings: KitSettings) -> None:
        super().__init__()
        width = settings.width
        self.sees_mode = settings.sees_mode
        self.tokens = nn.Embedding(VOCABULARY_SIZE, width)
        self.rows, self.columns = (
            nn.Embedding(LARGEST, width),
            nn.Embedding(LARGEST, width),
        )
        self.sizes = nn.Embedding(LARGEST + 1, width)
        self.modes = nn.Embedding(len(Mode), width)
        blocks = [Block(width) for _ in range(settings.num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY_SIZE)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.1)
        last = [part for block in blocks for part in (block.out, block.down)]
        for linear in (*last, self.head):  # blocks begin as the identity
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, tokens: Tensor, modes: Tensor, size: int) -> Tensor:
        """Return logits [B, L, 35] of tokens [B, L] and modes [B]."""
        place = torch.arange(size * size)
        x = self.tokens(tokens) + self.rows(place // size) + self.columns(place % size)
        x = x + self.sizes.weight[size]
        if self.sees_mode:
            x = x + self.modes(modes)[:, None]
        seen = _seen(size)
        for block in self.blocks:
            x = block(x, seen)
        logits: Tensor = self.head(self.norm(x))
        return logits


@cache
def _seen(size: int) -> Tensor:
    """Say which cells each head sees: its row, its column, and twice all."""
    place = torch.arange(size * size)
    same_row = place[:, None] // size == place // size
    same_column = place[:, None] % size == place % size
    every = torch.ones_like(same_row)
    return torch.stack([same_row, same_column, every, every])


# --- data


@cache
def squares(size: int, mode: Mode, split: Split) -> PuzzleSet:
    """Make the squares of one size and mode, the same in every process."""
    count = NUM_MADE if split is Split.TRAIN else NUM_MEASURED
    return generate_puzzle_set(size, mode, count, 0, split, kind=Kind.LATIN, workers=1)


def training_sets(mixture: Mixture) -> dict[Key, PuzzleSet]:
    """Collect what a mixture draws from."""
    return {
        (size, mode, Kind.LATIN): squares(size, mode, Split.TRAIN)
        for size in mixture.sizes
        for mode in mixture.modes
    }


# --- training


@dataclass(kw_only=True, slots=True)
class Trained:
    """What a training left behind."""

    settings: KitSettings
    """Of the training."""

    model: SquareModel
    """With its last weights."""

    run: cw.Run
    """The policy in force on it."""

    curriculum: Curriculum
    """Where it ended, with its history."""

    losses: list[float]
    """Of every update."""


Observe = Callable[["Trained", int], Mapping[str, float]]
"""From a training and an epoch to measures for its curriculum."""

MakeOptimizer = Callable[[Any, float], torch.optim.Optimizer]
"""From parameters and a learning rate to an optimizer."""


def plain_adamw(parameters: Any, rate: float) -> torch.optim.Optimizer:
    """Return torch's AdamW."""
    return torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )


def train(
    settings: KitSettings,
    seed: int,
    *,
    curriculum: Curriculum | None = None,
    observe: Observe | None = None,
    policy: Policy | None = None,
    make_optimizer: MakeOptimizer = plain_adamw,
    loss_scale: Any = None,
) -> Trained:
    """Train one model.

    Args:
        settings: Of the training.
        seed: Of the weights, the data order and the masks.
        curriculum: Stages to walk through. Default: none.
        observe: Measures for the curriculum at the end of each epoch. Default: none,
            so that stages end by their longest stay alone.
        policy: What computes in which format. Default: fp32.
        make_optimizer: Builds the optimizer.
        loss_scale: Default: what the policy needs.

    Returns:
        The model, and how it went.
    """
    torch.manual_seed(seed)
    model = SquareModel(settings)
    run = cw.prepare(
        model,
        make_optimizer(model.parameters(), settings.learning_rate),
        policy or cw.preset("32-true"),
        clip_norm=1.0,
        loss_scale=loss_scale,
    )
    done = Trained(
        settings=settings,
        model=model,
        run=run,
        curriculum=curriculum or Curriculum(()),
        losses=[],
    )
    mixture = settings.mixture()
    sets = training_sets(mixture)
    ends = {
        round((k + 1) * settings.num_steps / settings.num_epochs): k + 1
        for k in range(settings.num_epochs)
    }
    for number in range(settings.num_steps):
        for group in run.optimizer.param_groups:
            group["lr"] = settings.rate(number) * done.curriculum.rate_factor(number)
        now = mixture_in_force(mixture, done.curriculum)
        batch = draw_batch(sets, now, seed=seed, step=number)
        with run.step() as step:
            loss = cell_loss(model, batch)
            step.backward(loss)
        done.losses.append(float(loss.detach()))
        if number + 1 in ends:
            measures = observe(done, ends[number + 1]) if observe else {}
            done.curriculum.observe(number + 1, measures)
    return done


def cell_loss(model: SquareModel, batch: PuzzleBatch) -> Tensor:
    """Return the cross-entropy of hidden cells, in nats."""
    logits = model(batch.tokens, batch.modes, batch.size).float()
    wanted = batch.answer_tokens.masked_fill(~batch.hidden, -100)
    total = functional.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), reduction="sum"
    )
    return total / batch.hidden.sum().clamp(min=1)


# --- measures


def _rated(trained: Trained, batch: PuzzleBatch) -> Tensor:
    """Return log-probabilities fp64 [B, L, 35] in the precision of the training."""
    with trained.run.inference(), torch.no_grad():
        logits = trained.model(batch.tokens, batch.modes, batch.size)
    return logits.double().log_softmax(dim=-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """What a model says about hidden cells."""

    excess: float
    """Kullback-Leibler divergence from the exact posterior, nats per hidden cell."""

    accuracy: float
    """Hidden cells whose likeliest token is the answer."""

    def values(self, name: str) -> dict[str, float]:
        """Plain values under a name."""
        return {f"excess_{name}": self.excess, f"accuracy_{name}": self.accuracy}


def tell(
    trained: Trained,
    size: int,
    mode: Mode,
    *,
    num: int = 512,
    fill: tuple[float, float] = (0.0, 1.0),
) -> Told:
    """Measure a model on fixed squares under fixed masks."""
    made = squares(size, mode, Split.VALIDATION)
    batch = evaluation_batch(made, fill, np.arange(num), seed=1)
    return tell_batch(trained, batch)


def tell_batch(trained: Trained, batch: PuzzleBatch) -> Told:
    """Measure a model on one batch."""
    rated = _rated(trained, batch)
    of_rank = rated.gather(2, batch.alphabet[:, None].expand(-1, rated.shape[1], -1))
    hidden = batch.hidden
    chances = exact_chances(batch)[hidden]
    crossed = -torch.where(chances > 0, chances * of_rank[hidden], 0.0).sum(dim=-1)
    excess = float((crossed - posterior.entropy(chances)).mean())
    grid = torch.where(hidden, rated.argmax(dim=-1), batch.tokens)
    return Told(excess=excess, accuracy=hidden_accuracy(grid, batch).value)


_KNOWN: dict[bytes, Tensor] = {}


def exact_chances(batch: PuzzleBatch) -> Tensor:
    """Return the exact posterior, kept from one measure of a batch to the next."""
    key = batch.tokens.numpy().tobytes() + batch.alphabet.numpy().tobytes()
    if key not in _KNOWN:
        _KNOWN[key] = posterior.posterior(batch)
    return _KNOWN[key]


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """Squares that a model made from nothing."""

    valid: Rate
    """Those whose rows and columns hold their alphabet."""

    distinct: int
    """Different ones among the valid."""

    def values(self, name: str) -> dict[str, Any]:
        """Plain values under a name."""
        return {
            f"valid_{name}": self.valid.value,
            f"counts_{name}": [self.valid.hits, self.valid.num],
            f"distinct_{name}": self.distinct / self.valid.num,
        }


def make_from_nothing(
    trained: Trained, size: int, mode: Mode, *, num: int = 1000, seed: int = 1
) -> Made:
    """Fill empty squares: cells in random order, tokens drawn at temperature 1.

    Nothing is masked and nothing is searched: one forward for each cell, and each
    token is the model's own choice out of all 35.
    """
    made = squares(size, mode, Split.VALIDATION)
    batch = evaluation_batch(made, (0.0, 0.0), np.arange(num), seed=seed)
    lot = torch.Generator().manual_seed(seed)
    tokens = torch.full_like(batch.tokens, EMPTY)
    order = torch.rand(tokens.shape, generator=lot).argsort(dim=1)
    for cells in order.T:
        rated = _rated(trained, batch.with_tokens(tokens))
        chances = rated[torch.arange(num), cells].exp()
        drawn = torch.multinomial(chances, 1, generator=lot).squeeze(1)
        tokens = tokens.scatter(1, cells[:, None], drawn[:, None])
    valid = is_valid(tokens, batch)
    return Made(
        valid=Rate(hits=int(valid.sum()), num=num),
        distinct=len(torch.unique(tokens[valid], dim=0)),
    )
