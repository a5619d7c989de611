"""The KenKen recipe's work for the trainer: batches, the loss, quick measures.

A batch is a pure function of (seed, step). Every epoch ends with a quick measure: the
solved rate on validation puzzles shown without any hint, decoded most certain first.
The whole table by size, mode and fill is measured once, at the end of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from typing import Any, final

import torch
from torch import nn

from castwise.recipes.kenken.alphabets import parse_mode
from castwise.recipes.kenken.batches import Fill, Mixture, PuzzleBatch, draw_batch
from castwise.recipes.kenken.curricula import (
    LOSS,
    SOLVED,
    STAGE_LOSS,
    STAGE_SOLVED,
    mixture_in_force,
)
from castwise.recipes.kenken.decoding import predictor_of
from castwise.recipes.kenken.evaluation import EvaluationSettings, evaluate
from castwise.recipes.kenken.measures import Measures
from castwise.recipes.kenken.model import (
    KenKenModel,
    completion_loss,
    puzzle_losses,
)
from castwise.recipes.kenken.puzzle_set import Kind, PuzzleSet
from castwise.recipes.kenken.settings import KenKenSettings
from castwise.recipes.kenken.supply import Supply
from castwise.training.curriculum import Curriculum, Transition
from castwise.training.prefetch import Prefetch
from castwise.training.step import Run
from castwise.training.strategy import Strategy
from castwise.training.trainer import BatchLoss, Task

SCORE = SOLVED
EMPTY_GRID = (0.0, 0.0)


def mixture_of(settings: KenKenSettings) -> Mixture:
    """Return what batches are made of."""
    modes = tuple(parse_mode(name) for name in settings.modes)
    return Mixture(
        sizes=settings.sizes,
        size_shares=settings.size_shares,
        modes=modes,
        mode_shares=settings.mode_shares,
        latin_share=settings.latin_share,
        fills=(
            Fill(empty_share=settings.empty_share, reveal=(0.0, settings.max_reveal)),
        ),
        cells_per_step=settings.cells_per_step,
    )


@final
class KenKenTask(Task):
    """Puzzles in, loss and solved rates out.

    Args:
        run: The prepared model.
        model: The same model, with its own type.
        supply: Puzzle sets.
        settings: Of the run.
        device: Where batches go.
        curriculum: Stages to walk through; without dimensions nothing changes.
        strategy: How the run is spread over processes. Default: one process.
        num_ahead: Batches that a thread draws ahead. Default: two for a GPU, none for
            a CPU, which has no time to spare.
    """

    unit = "cells"

    def __init__(
        self,
        *,
        run: Run,
        model: KenKenModel,
        supply: Supply,
        settings: KenKenSettings,
        device: torch.device,
        curriculum: Curriculum | None = None,
        strategy: Strategy | None = None,
        num_ahead: int | None = None,
    ) -> None:
        self._run = run
        self._model = model
        self._strategy = strategy or Strategy()
        self._forward = self._strategy.forward_of(model, run)
        self._supply = supply
        self._settings = settings
        self._curriculum = curriculum or Curriculum(())
        self._mixture = mixture_of(settings)
        self._device = device
        if num_ahead is None:
            num_ahead = 2 if device.type == "cuda" else 0
        self._draws = Prefetch(
            self._draw, num_steps=settings.num_steps, depth=num_ahead
        )

    def batch(self, step: int) -> PuzzleBatch:
        """Draw the batch of a step, and keep the puzzles of this process."""
        mixture = mixture_in_force(self._mixture, self._curriculum)
        return self._draws.batch(step, mixture).to(self._device)

    def _draw(self, step: int, mixture: Mixture) -> PuzzleBatch:
        drawn = draw_batch(
            self._supply.train, mixture, seed=self._settings.seed, step=step
        ).part(self._strategy.ranks)
        return drawn.pinned() if self._device.type == "cuda" else drawn

    def loss(self, batch: PuzzleBatch) -> BatchLoss:
        """Return the cross-entropy over hidden cells and loops."""
        return self._loss(self._forward, batch)

    def loss_alone(self, batch: PuzzleBatch) -> BatchLoss:
        """Return the same, without a word to other processes."""
        return self._loss(self._model, batch)

    def _loss(self, forward: nn.Module, batch: PuzzleBatch) -> BatchLoss:
        logits = forward(batch.tokens, batch.alphabet, batch.relations)
        with torch.no_grad():
            right = (logits[-1].argmax(dim=-1) == batch.answers) & batch.hidden
            accuracy = right.sum() / batch.hidden.sum().clamp(min=1)
        value = completion_loss(logits, batch)
        if batch.share != 1.0:
            value, accuracy = value * batch.share, accuracy * batch.share
        return BatchLoss(
            value=value,
            measures={"accuracy": accuracy},
            num_units=batch.tokens.numel(),
            samples=None if torch.is_grad_enabled() else puzzle_losses(logits, batch),
        )

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Measure the share of validation puzzles solved from the empty grid."""
        del step
        sets = [s for s in self._supply.validation.values() if s.kind is Kind.KENKEN]
        rows = self.measure(sets, num_puzzles=self._settings.num_quick)
        by_size = {
            size: fmean(row.valid.value for row in rows if row.size == size)
            for size in self._settings.sizes
        }
        return {
            SCORE: fmean(by_size.values()),
            **{f"solved_{size}": rate for size, rate in by_size.items()},
            LOSS: fmean(row.cross_entropy or 0.0 for row in rows),
            **self._stage_measures(),
        }

    def _stage_measures(self) -> dict[str, float]:
        """Measure on what the stages in force draw from; nothing without a stage."""
        if not self._curriculum.dimensions:
            return {}
        mixture = mixture_in_force(self._mixture, self._curriculum)
        sets = [
            self._supply.validation[size, mode, Kind.KENKEN]
            for size in mixture.sizes
            for mode in mixture.modes
        ]
        fills = tuple(dict.fromkeys(fill.reveal for fill in mixture.fills))
        empty = any(fill.empty_share for fill in mixture.fills)
        rows = self.measure(
            sets,
            num_puzzles=self._settings.num_quick,
            fills=(*fills, EMPTY_GRID) if empty else fills,
        )
        return {
            STAGE_SOLVED: fmean(row.valid.value for row in rows),
            STAGE_LOSS: fmean(row.cross_entropy or 0.0 for row in rows),
        }

    def rate_factor(self, step: int) -> float:
        """Let the learning rate rise anew after a change of stage."""
        return self._curriculum.rate_factor(step)

    def end_epoch(
        self, step: int, measures: Mapping[str, float]
    ) -> tuple[Transition, ...]:
        """Let the curriculum stay, advance or go back."""
        return self._curriculum.observe(step, measures)

    def state_dict(self) -> dict[str, Any]:
        """Where the curriculum stands, with its history."""
        return self._curriculum.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the curriculum stood."""
        self._curriculum.load_state_dict(state)

    @property
    def model(self) -> KenKenModel:
        """The model that is trained."""
        return self._model

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Hold the model in evaluation mode and in the precision of the run."""
        self._model.eval()
        try:
            with self._run.inference():
                yield
        finally:
            self._model.train()

    def measure(
        self,
        sets: list[PuzzleSet],
        *,
        num_puzzles: int,
        fills: tuple[tuple[float, float], ...] = (EMPTY_GRID,),
    ) -> tuple[Measures, ...]:
        """Measure the model on some sets, in the precision of the run."""
        smallest = min(len(puzzles) for puzzles in sets)
        settings = EvaluationSettings(
            num_puzzles=min(num_puzzles, smallest), fills=fills
        )
        predict = predictor_of(self._model, self._settings.num_loops)
        with self.inference():
            return evaluate(predict, sets, settings, device=self._device)
