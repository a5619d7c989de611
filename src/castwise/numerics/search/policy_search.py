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

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from castwise.errors import BudgetError, SettingsError
from castwise.numerics.search.bench import Bench
from castwise.numerics.search.budget import Budget
from castwise.numerics.search.candidates import default_of, parse_candidates
from castwise.numerics.search.cost import CostModel, check_cost_model
from castwise.numerics.search.found import (
    Choice,
    Found,
    Problem,
    Trial,
    findings_of,
    pareto_of,
    worst_errors,
)
from castwise.numerics.search.record_file import (
    Record,
    digest_of,
    fingerprint_of,
    open_record,
)
from castwise.numerics.search.scores import Scores
from castwise.numerics.search.scoring import Report, Scoring, ScoringSettings
from castwise.numerics.search.units import Grouping
from castwise.numerics.target import checked_batches
from castwise.numerics.untouched import untouched
from castwise.policy.precision import FP32
from castwise.policy.rules import Policy

_FP32 = Policy(name="fp32", default=FP32)
_MATTERS = 0.25  # of the budget, from which on the error of fp32 is looked at closely
_HOPEFUL = 1.3  # times the budget: what may be predicted for a choice worth a trial
_WIDEST_STEP = 16.0  # by which one trial may change what is predicted


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

    def __post_init__(self) -> None:
        if not 0 < self.margin <= 1:
            raise SettingsError(f"margin is above 0 and at most 1, got {self.margin}")
        for name in ("num_probes", "max_trials"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is at least 1, got {getattr(self, name)}")
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
        formats: What modules may run in: fp64, fp32, tf32, fp16, bf16, or precisions
            such as `c=fp32,o=bf16`.
        cost: `flops`, `bytes`, `time` (measured here), or a function of a unit and a
            candidate.
        groups: What moves together: modules of one parent that are given the same
            tensor (`same_input`), nothing (`none`), or lists of globs.
        record: A file that keeps scores and trials; a search that finds it goes on
            from there, also with another budget.
        settings: Everything else.
        on_progress: Is told (what, done, of) as the search goes on.

    Raises:
        BudgetError: Nothing keeps within the budget; the message says by how much.
        TargetError: A batch, the loss or the model cannot be used as given.
        ContradictionError: The record is that of another search.
    """
    settings = settings or SearchSettings()
    check_cost_model(cost)
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
                groups,
                cost if isinstance(cost, str) else "own",
                getattr(loss_fn, "__qualname__", type(loss_fn).__qualname__),
            ),
        )
        self._record: Record = open_record(record, fingerprint)
        self._trials: list[Trial] = []
        self._scoring_steps = 0

    def found(self, begin: float) -> Found:
        """Score, solve, try; return what was found."""
        floor = worst_errors(self._errors(_FP32))
        scores = self._scores(floor)
        self._bench.loss_scale = scores.loss_scale
        problem = Problem(scores, self._budget)
        best = self._narrowed(problem)
        best = self._polished(problem, best)
        steps = self._bench.num_steps - self._scoring_steps
        return Found(
            policy=problem.policy(best.choice),
            budget=self._budget,
            margin=self._settings.margin,
            cost=best.cost,
            cost_model=self._cost if isinstance(self._cost, str) else "own cost",
            cost_lowest=problem.cost(problem.cheapest()),
            cost_highest=problem.cost(problem.safest()),
            trials=tuple(self._trials),
            best=best,
            floor=floor,
            pareto=pareto_of(problem, self._trials),
            units=findings_of(problem, best.choice),
            scores=scores,
            seed=self._settings.seed,
            num_batches=len(self._bench.batches),
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
            if each.bits < 32
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
            ),
            self._record,
            self._report,
        )
        scores = scoring.run(scored, floor)
        self._scoring_steps = self._bench.num_steps - before
        self._record.scores = scores
        self._record.save()
        return scores

    def _errors(self, policy: Policy) -> tuple[dict[str, float], ...]:
        """Run a policy batch by batch, until one breaks the budget; see the record."""
        found: list[dict[str, float]] = []
        digest = digest_of(f"{policy.to_yaml()} {self._bench.loss_scale}")
        for at in range(len(self._bench.batches)):
            key = f"{digest} {at}"
            measure = self._budget.measure
            known = self._record.trials.get(key)
            if known is None or (measure is not None and "measure" not in known):
                known = self._bench.errors(
                    policy, self._budget, scale=self._bench.loss_scale, at=at
                )
                self._record.trials[key] = known
                self._record.save()
            found.append(known)
            broken = self._budget.usage(known) > self._settings.margin
            if broken and policy is not _FP32:
                break
        return tuple(found)

    def _try(self, problem: Problem, choice: Choice) -> Trial:
        """Run a choice for real."""
        for trial in self._trials:
            if trial.choice == choice:
                return trial
        self._report("trials", len(self._trials), self._settings.max_trials)
        errors = self._errors(problem.policy(choice, name="candidate"))
        usage = max(map(self._budget.usage, errors))
        trial = Trial(
            choice=choice,
            predicted=problem.predicted(choice),
            usage=usage,
            errors=errors,
            cost=problem.cost(choice),
            holds=usage <= self._settings.margin,
        )
        self._trials.append(trial)
        return trial

    def _narrowed(self, problem: Problem) -> Trial:
        """Search the budget to predict with, by trials that bracket it."""
        margin = self._settings.margin
        cheapest = problem.cheapest()
        low, high = 0.0, math.inf  # predictions that held, and that did not
        best: Trial | None = None
        aim = margin
        for _ in range(4 * self._settings.max_trials):
            if len(self._trials) >= max(1, self._settings.max_trials * 7 // 10):
                break
            choice = problem.solve(aim)
            if choice is None:
                choice = problem.safest()
                aim = problem.predicted(choice)
            trial = self._try(problem, choice)
            if trial.holds:
                best = trial if best is None or trial.cost < best.cost else best
                low = max(low, aim)
                if choice == cheapest:
                    break
            else:
                high = min(high, aim)
                if choice == problem.safest():
                    break
            wanted = aim * _correction(margin, trial.usage)
            aim = _within(wanted, low, high)
            if high < math.inf and low > 0 and high / low < 1.02:
                break
        if best is None:
            best = self._safest(problem)
        return best

    def _safest(self, problem: Problem) -> Trial:
        trial = self._try(problem, problem.safest())
        if not trial.holds:
            raise BudgetError(self._infeasible(problem, trial))
        return trial

    def _infeasible(self, problem: Problem, trial: Trial) -> str:
        worst = worst_errors(trial.errors)
        limits = self._budget.limits
        kind = max(limits, key=lambda each: worst[each] / limits[each])
        used = problem.unit_usage()
        names = problem.scores.candidates
        chosen = {
            problem.scores.units[at].fqn: names[one]
            for group, one in zip(problem.scores.groups, trial.choice, strict=True)
            for at in group
        }
        ranked = sorted(
            chosen,
            key=lambda fqn: (-used[fqn][chosen[fqn]], -min(used[fqn].values())),
        )
        if not any(used[fqn][chosen[fqn]] for fqn in ranked):
            ranked = sorted(chosen, key=lambda fqn: -max(used[fqn].values()))
        most = ", ".join(fqn or "(the model itself)" for fqn in ranked[:3])
        return (
            f"nothing keeps within {self._budget} times the margin of "
            f"{self._settings.margin:g}: with the most digits everywhere the {kind} "
            f"error is {worst[kind]:.3g}, {worst[kind] / limits[kind]:.3g} times the "
            f"budget, most of it from {most}; allow "
            f"{'a wider format' if 'fp64' not in names else 'more'}, or change these "
            "modules"
        )

    def _polished(self, problem: Problem, best: Trial) -> Trial:
        """Spend the trials that are left on making the best choice cheaper."""
        refused: set[Choice] = {t.choice for t in self._trials if not t.holds}
        while len(self._trials) < self._settings.max_trials:
            choice = _cheaper(problem, best, refused)
            if choice is None:
                return best
            trial = self._try(problem, choice)
            if trial.holds:
                best = trial
            else:
                refused.add(choice)
        return best


def _correction(margin: float, usage: float) -> float:
    """By what a trial says the prediction was off, at most 16 either way."""
    if not math.isfinite(usage):
        return 1 / _WIDEST_STEP
    if usage == 0:
        return _WIDEST_STEP
    return min(_WIDEST_STEP, max(1 / _WIDEST_STEP, margin / usage))


def _within(wanted: float, low: float, high: float) -> float:
    """The wanted value if it lies inside of the bracket, or else its middle."""
    if low < wanted < high:
        return wanted
    if high == math.inf:
        return max(wanted, 2 * low)
    return math.sqrt(low * high) if low > 0 else min(wanted, high / 2)


def _cheaper(problem: Problem, best: Trial, refused: set[Choice]) -> Choice | None:
    """The likeliest choice that is cheaper than the best by one group's change."""
    # a choice that is likely to fail by much is not worth a trial
    most = _HOPEFUL * max(1.0, best.predicted / best.usage if best.usage else 1.0)
    options = []
    for at, one in enumerate(best.choice):
        for other in range(len(problem.candidates)):
            saved = problem.costs[at][one] - problem.costs[at][other]
            load = problem.loads[at][other]
            if saved <= 0 or math.isinf(load):
                continue
            choice = (*best.choice[:at], other, *best.choice[at + 1 :])
            predicted = problem.predicted(choice)
            if choice not in refused and predicted <= most:
                options.append((predicted, -saved, choice))
    return min(options)[2] if options else None
