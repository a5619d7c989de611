"""The search: the cheapest policy whose measured error keeps within a budget.

    found = search(model, batches, loss_fn, Budget(gradient=1e-2))
    found.policy            what cw.prepare and cw.contract take
    found.summary()         gradient error 8.7e-03 of 0.01 on 4 batches; 9 of 103 ...

1. Score: what the rounding of each module does to the whole gradient, in a dozen steps
   of the model however many modules there are (`scoring`).
2. Solve: a knapsack, the cheapest choice whose predicted error fits (`solve`).
3. Try: the policy is put on the model and run on every batch. The prediction is then
   corrected by what was measured, and solved again, until the cheapest choice that
   really keeps within the budget is found.

Only what was tried and held is ever returned. A budget counts with a margin (0.9), so
that it holds on batches that were not given as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from castwise.errors import SettingsError
from castwise.numerics.over_ranks import first_says, refuse_nobody
from castwise.numerics.search.bench import Bench
from castwise.numerics.search.budget import Budget
from castwise.numerics.search.candidates import default_of, parse_candidates
from castwise.numerics.search.cost import CostModel, check_cost_model
from castwise.numerics.search.found import (
    Found,
    findings_of,
    worst_errors,
)
from castwise.numerics.search.problem import Problem
from castwise.numerics.search.record_file import (
    Record,
    fingerprint_of,
    open_record,
)
from castwise.numerics.search.scores import Scores
from castwise.numerics.search.scoring import Report, Scoring, ScoringSettings
from castwise.numerics.search.trials import Trials
from castwise.numerics.search.units import Grouping
from castwise.numerics.target import checked_batches
from castwise.numerics.untouched import untouched
from castwise.policy.precision import FP32
from castwise.policy.rules import Policy

_FP32 = Policy(name="fp32", default=FP32)
_MATTERS = 0.25  # of the budget, from which on the error of fp32 is looked at closely


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    """How a search goes about it."""

    margin: float = 0.9
    """The share of the budget that must suffice on the batches that are given."""

    num_probes: int = 8
    """K; 4 are nearly as good and cost 4 steps less."""

    max_trials: int = 10
    """How many policies are run at most."""

    seed: int = 0
    """Of the probes, and of what the model draws while it runs."""

    reference: str = "fp64"
    """The format that errors are taken against; `fp32` where a model refuses fp64."""

    num_points: int = 0
    """Points of the Pareto curve that are run for real, beside those that were tried;
    each costs a step a batch."""

    operators: bool = False
    """Whether operators that the operator table holds in fp32, such as norms and
    softmax, may run low where their modules do; each costs up to one step more."""

    over_ranks: bool = False
    """Whether all processes search together, each on its own batches: a policy must
    keep the budget on those of every rank, and all find the same one. Rank 0 scores."""

    def __post_init__(self) -> None:
        if not 0 < self.margin <= 1:
            raise SettingsError(f"margin is above 0 and at most 1, got {self.margin}")
        for name, least in (("num_probes", 1), ("max_trials", 1), ("num_points", 0)):
            got = getattr(self, name)
            if got < least:
                raise SettingsError(f"{name} is at least {least}, got {got}")
        if self.reference not in {"fp64", "fp32"}:
            raise SettingsError(
                f"reference needs one of fp64, fp32, got {self.reference!r}"
            )


def search(
    model: nn.Module,
    batches: Iterable[Sequence[Any]],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    budget: Budget,
    *,
    formats: Iterable[str] = ("bf16", "fp32"),
    cost: CostModel = "flops",
    groups: Grouping = "same_input",
    record: str | Path | None = None,
    settings: SearchSettings | None = None,
    on_progress: Report = lambda *_: None,
) -> Found:
    """Find the cheapest policy that keeps within an error budget.

    The model is unedited, and afterwards what it was: weights, buffers, gradients,
    random states. It runs in the mode, train or eval, that it is in.

    Args:
        model: Any module tree, without a policy on it.
        batches: Tuples of the model's inputs and, last, the target. The first is
            scored; every one is tried. Give four or more where the model takes
            decisions, such as a router.
        loss_fn: From the model's output and the target to a scalar.
        budget: How wrong gradient, output, loss or a measure of your own may be.
        formats: What modules may run in: fp64, fp32, tf32, fp16, bf16, precisions
            such as `c=fp32,o=bf16`, or two of these for forward and backward, such as
            `fp32/bf16`.
        cost: `flops`, `bytes`, `time` (measured here), or a function of a unit and a
            candidate.
        groups: What moves together: modules of one parent that are given the same
            tensor (`same_input`), nothing (`none`), or lists of globs.
        record: A file that keeps scores and trials; a search that finds it goes on
            from there, also with another budget. Of several ranks each needs its own.
        settings: Everything else.
        on_progress: Is told (what, done, of) as the search goes on.

    Raises:
        BudgetError: Nothing keeps within the budget; the message says by how much.
        TargetError: A batch, the loss or the model cannot be used as given.
        ContradictionError: The record is that of another search.
    """
    settings = settings or SearchSettings()
    refuse_nobody("a search", together=settings.over_ranks)
    check_cost_model(cost)
    model = getattr(model, "_orig_mod", model)  # a compiled model runs uncompiled here
    checked = checked_batches(batches, what="a search", at_least=1)
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    begin = time.perf_counter()
    with untouched(model, device):
        run = _Search(
            model,
            checked,
            loss_fn,
            budget,
            formats=tuple(formats),
            cost=cost,
            groups=groups,
            record=None if record is None else Path(record),
            settings=settings,
            report=on_progress,
        )
        return run.found(begin)


class _Search:
    """One search, while it goes on."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Sequence[Any]],
        loss_fn: Callable[[Any, Any], torch.Tensor],
        budget: Budget,
        *,
        formats: tuple[str, ...],
        cost: CostModel,
        groups: Grouping,
        record: Path | None,
        settings: SearchSettings,
        report: Report,
    ) -> None:
        self._budget, self._settings, self._report = budget, settings, report
        self._cost, self._groups = cost, groups
        self._candidates = parse_candidates(formats)
        self._bench = Bench(
            model,
            batches,
            loss_fn,
            reference=settings.reference,
            seed=settings.seed,
        )
        fingerprint = fingerprint_of(
            model,
            batches,
            (
                formats,
                settings.seed,
                settings.num_probes,
                settings.reference,
                settings.operators,
                groups,
                cost if isinstance(cost, str) else "own",
                getattr(loss_fn, "__qualname__", type(loss_fn).__qualname__),
            ),
        )
        self._record: Record = open_record(record, fingerprint)
        self._together = settings.over_ranks
        self._trials = Trials(
            self._bench,
            budget,
            margin=settings.margin,
            most=settings.max_trials,
            record=self._record,
            report=report,
            together=self._together,
        )
        self._scoring_steps = 0

    def found(self, begin: float) -> Found:
        """Score, solve, try; return what was found."""
        floor = worst_errors(self._trials.errors(_FP32, to_the_end=True))
        scores = first_says(lambda: self._scores(floor), together=self._together)
        self._bench.loss_scale = scores.loss_scale
        problem = Problem(scores, self._budget)
        best = self._trials.narrowed(problem)
        best = self._trials.polished(problem, best)
        if self._cost == "time":
            best = self._trials.fastest(problem, best)
        pareto = self._trials.along(problem, self._settings.num_points)
        steps = self._bench.num_steps - self._scoring_steps
        return Found(
            policy=problem.policy(best.choice),
            budget=self._budget,
            margin=self._settings.margin,
            cost=best.cost,
            cost_model=self._cost if isinstance(self._cost, str) else "own cost",
            cost_lowest=problem.cost(problem.cheapest()),
            cost_highest=problem.highest_cost(),
            trials=tuple(self._trials.done),
            best=best,
            floor=floor,
            pareto=pareto,
            units=findings_of(problem, best.choice),
            scores=scores,
            seed=self._settings.seed,
            num_batches=sum(self._trials.num_batches),
            scoring_steps=self._scoring_steps,
            trial_steps=steps,
            seconds=time.perf_counter() - begin,
        )

    def _scores(self, floor: dict[str, float]) -> Scores:
        """Take the scores from the record, if they answer this budget, or score."""
        limits = self._budget.limits
        with_outputs = bool({"output", "measure"} & set(limits))
        near = self._budget.usage(floor) > _MATTERS * self._settings.margin
        names = [each.name for each in self._candidates]
        scored = [
            each
            for each in self._candidates
            if each.least_bits < 32
            or near
            or each.precision.output not in {"fp32", "fp64"}
            or (each.compute == "fp32" and "fp64" in names and near)
        ]
        kept = self._record.scores
        wanted = {each.name for each in scored}
        if (
            kept is not None
            and wanted <= set(kept.scored)
            and (kept.has_outputs or not with_outputs)
            and set(floor) <= set(kept.rest)
        ):
            return kept
        before = self._bench.num_steps
        scoring = Scoring(
            self._bench,
            self._candidates,
            default_of(self._candidates),
            ScoringSettings(
                num_probes=self._settings.num_probes,
                seed=self._settings.seed,
                grouping=self._groups,
                cost=self._cost,
                with_outputs=with_outputs,
                operators=self._settings.operators,
            ),
            self._record,
            self._report,
        )
        scores = scoring.run(scored, floor)
        self._scoring_steps = self._bench.num_steps - before
        self._record.scores = scores
        self._record.save()
        return scores
