"""The recipe's own model on KenKen puzzles, trained for seconds.

The model, the loss, the batches, the stages and the measure are the recipe's; what is
small is the budget: two sizes, half of the cells a step, and so few steps that what is
learnt still depends on how they are spent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

import castwise as cw
from castwise.recipes.kenken.alphabets import Mode
from castwise.recipes.kenken.batches import Mixture, draw_batch
from castwise.recipes.kenken.curricula import mixture_in_force
from castwise.recipes.kenken.dataset import generate_puzzle_set
from castwise.recipes.kenken.decoding import predictor_of
from castwise.recipes.kenken.evaluation import EvaluationSettings, evaluate
from castwise.recipes.kenken.measures import Rate
from castwise.recipes.kenken.model import KenKenModel, completion_loss, model_settings
from castwise.recipes.kenken.puzzle_set import Kind, PuzzleSet, Split
from castwise.training.curriculum import Curriculum
from castwise.training.schedule import WarmupStableDecay

NUM_MADE, NUM_MEASURED = 4096, 250
EMPTY_GRID = ((0.0, 0.0),)


@dataclass(frozen=True, kw_only=True, slots=True)
class PuzzleSettings:
    """One training on puzzles."""

    sizes: tuple[int, ...] = (4, 5)
    """Rows of the puzzles, each as often."""

    modes: tuple[str, ...] = ("standard", "zero", "negative")
    """Alphabets, each as often."""

    cells_per_step: int = 576
    """Cells of a batch."""

    num_steps: int = 40
    """Updates."""

    num_epochs: int = 30
    """Ends of epochs, at which a curriculum moves."""

    learning_rate: float = 8e-3
    """Peak of the schedule, as in the preset `small`."""

    num_warmup: int = 10
    """Updates of the linear rise."""

    def mixture(self) -> Mixture:
        """What batches are made of without a curriculum."""
        modes = tuple(Mode(name) for name in self.modes)
        return Mixture(
            sizes=self.sizes,
            size_shares=(1 / len(self.sizes),) * len(self.sizes),
            modes=modes,
            mode_shares=(1 / len(modes),) * len(modes),
            latin_share=0.0,
            cells_per_step=self.cells_per_step,
        )


@cache
def puzzles(size: int, mode: Mode, split: Split) -> PuzzleSet:
    """Make the puzzles of one size and mode, the same in every process."""
    count = NUM_MADE if split is Split.TRAIN else NUM_MEASURED
    return generate_puzzle_set(size, mode, count, 0, split, workers=1)


def train(
    settings: PuzzleSettings, seed: int, curriculum: Curriculum | None = None
) -> KenKenModel:
    """Train the model of `small` in fp32; stages end by their longest stay."""
    torch.manual_seed(seed)
    model = KenKenModel(model_settings("small"))
    run = cw.prepare(
        model,
        torch.optim.AdamW(
            model.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.01,
            fused=True,
        ),
        cw.preset("32-true"),
        clip_norm=1.0,
    )
    walked, mixture = curriculum or Curriculum(()), settings.mixture()
    sets = {
        (size, mode, Kind.KENKEN): puzzles(size, mode, Split.TRAIN)
        for size in mixture.sizes
        for mode in mixture.modes
    }
    schedule = WarmupStableDecay(
        num_steps=settings.num_steps,
        num_warmup=min(settings.num_warmup, settings.num_steps // 4),
        decay_share=0.5,
    )
    length = settings.num_steps / settings.num_epochs
    ends = {round((k + 1) * length) for k in range(settings.num_epochs)}
    for number in range(settings.num_steps):
        for group in run.optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule.factor(number)
        now = mixture_in_force(mixture, walked)
        batch = draw_batch(sets, now, seed=seed, step=number)
        with run.step() as step:
            logits = model(batch.tokens, batch.alphabet, batch.relations)
            step.backward(completion_loss(logits, batch))
        if number + 1 in ends:
            walked.observe(number + 1, {})
    return model.eval()


def solved(
    model: KenKenModel, sizes: tuple[int, ...], mode: Mode
) -> tuple[Rate, float]:
    """Return the share solved from the empty grid, and nats per hidden cell."""
    sets = [puzzles(size, mode, Split.VALIDATION) for size in sizes]
    asked = EvaluationSettings(num_puzzles=NUM_MEASURED, fills=EMPTY_GRID)
    with torch.no_grad():
        rows = evaluate(predictor_of(model), sets, asked)
    rate = Rate(
        hits=sum(row.valid.hits for row in rows), num=sum(row.valid.num for row in rows)
    )
    return rate, sum(row.cross_entropy or 0.0 for row in rows) / len(rows)
