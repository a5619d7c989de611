"""Every method of the race, and how it makes one step.

`plain` is `run.step`, which checks every gradient as all hybrid methods do, and `bare`
the loop without castwise; `null` spends 20 steps in 40 on moving nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from castwise.hybrid.bench.problems import Batch, Problem
from castwise.hybrid.bench.schedule_free import ScheduleFree
from castwise.hybrid.hybrid_trainer import HybridTrainer
from castwise.hybrid.phase_precision import MixedPrecisionConfig
from castwise.hybrid.settings import HybridSettings
from castwise.policy import preset
from castwise.training.step import prepare


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One point of the grid that every method is tuned on."""

    rate: float
    """Learning rate."""

    momentum: float = 0.9
    """Of SGD, or the first beta of AdamW."""

    decay: int = 0
    """Steps of a linear fall of the rate to 5 %; 0 for none."""

    def factor(self, step: int) -> float:
        """Return the factor of the rate at a step."""
        if not self.decay:
            return 1.0
        return max(0.05, 1.0 - 0.95 * step / self.decay)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rider:
    """A method on one problem."""

    optimizer: torch.optim.Optimizer
    """Whose rates follow the schedule."""

    step: Callable[[Batch], Any]
    """Makes one step."""

    backwards: Callable[[int], int]
    """Backward passes after so many steps."""

    where: Callable[[], AbstractContextManager[None]] = nullcontext
    """Holds the weights that the method tells its loss at."""

    trainer: HybridTrainer | None = None
    """The hybrid trainer, if it is one."""


Mount: TypeAlias = Callable[[Problem, Point], Rider]

HYBRID = HybridSettings(
    warmup_steps=20, mixed_precision_config=MixedPrecisionConfig.conservative()
)
OUTER = replace(HYBRID, verification="none", correct_steps=0, max_consecutive=10**6)


def hybrid(settings: HybridSettings) -> Mount:
    """Return a hybrid trainer with these settings."""

    def mount(problem: Problem, point: Point) -> Rider:
        optimizer = problem.optimizer(point.rate, point.momentum)
        given = replace(settings, verification_z=0.0) if problem.is_whole else settings
        trainer = HybridTrainer(problem.model, optimizer, problem.loss, settings=given)
        return Rider(
            optimizer=optimizer,
            step=trainer.step,
            backwards=lambda _: trainer.statistics.backwards,
            trainer=trainer,
        )

    return mount


def plain(problem: Problem, point: Point) -> Rider:
    """Return the tuned plain optimizer in `run.step`."""
    optimizer = problem.optimizer(point.rate, point.momentum)
    run = prepare(problem.model, optimizer, preset("32-true"))

    def step(batch: Batch) -> None:
        with run.step() as open_step:
            open_step.backward(problem.loss(problem.model, batch).mean())

    return Rider(optimizer=optimizer, step=step, backwards=lambda steps: steps)


def bare(problem: Problem, point: Point) -> Rider:
    """Return the same optimizer in a loop without castwise."""
    optimizer = problem.optimizer(point.rate, point.momentum)
    return Rider(
        optimizer=optimizer,
        step=_bare_step(problem, optimizer),
        backwards=lambda steps: steps,
    )


def schedule_free(problem: Problem, point: Point) -> Rider:
    """Return schedule-free AdamW, or SGD where the plain optimizer is SGD."""
    optimizer = ScheduleFree(
        problem.model.parameters(),
        lr=point.rate,
        beta=point.momentum,
        second=None if problem.kind == "sgd" else 0.99,
    )
    return Rider(
        optimizer=optimizer,
        step=_bare_step(problem, optimizer),
        backwards=lambda steps: steps,
        where=optimizer.at_average,
    )


def lbfgs(problem: Problem, point: Point) -> Rider:
    """Return L-BFGS with a line search; its rate is 1 at every point of the grid."""
    del point
    optimizer = torch.optim.LBFGS(
        problem.model.parameters(),
        max_iter=5,
        history_size=20,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    count = [0]

    def step(batch: Batch) -> None:
        def closure() -> Tensor:
            count[0] += 1
            optimizer.zero_grad()
            loss = problem.loss(problem.model, batch).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        optimizer.step(closure)  # type: ignore[no-untyped-call]

    return Rider(optimizer=optimizer, step=step, backwards=lambda _: count[0])


def _bare_step(
    problem: Problem, optimizer: torch.optim.Optimizer
) -> Callable[[Batch], None]:
    def step(batch: Batch) -> None:
        problem.loss(problem.model, batch).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


RIVALS: Mapping[str, Mount] = MappingProxyType(
    {
        "plain": plain,
        "bare": bare,
        "window_line": hybrid(replace(HYBRID, full_steps=10, max_predict_steps=160)),
        "arms": hybrid(
            replace(
                HYBRID, full_steps=10, max_predict_steps=80, phase_length="arms",
                confidence_threshold=0.4,
            )
        ),
        "rna": hybrid(
            replace(
                HYBRID,
                predictor="rna",
                predictor_options={"num_iterates": 10},
                correct_steps=0,
            )
        ),
        "dmd": hybrid(
            replace(HYBRID, predictor="dmd", max_predict_steps=160, correct_steps=0)
        ),
        "adam_hold": hybrid(replace(HYBRID, predictor="adam_hold")),
        "lookahead": hybrid(
            replace(
                OUTER,
                full_steps=10,
                predictor="outer_nesterov",
                predictor_options={"momentum": 0.0, "rate": 0.5},
            )
        ),
        "snoo": hybrid(replace(OUTER, predictor="outer_nesterov")),
        "schedule_free": schedule_free,
        "lbfgs": lbfgs,
        "null": hybrid(
            replace(
                OUTER, predictor="null", mode="stepwise", max_predict_steps=20,
                min_predict_steps=20,
            )
        ),
    }
)  # fmt: skip
"""Every method by its name; `lbfgs` is for problems without noise."""
