"""The report of a search: the policy, the Pareto curve, the trials, every module."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import castwise
from castwise.numerics.search.found import worst_errors
from castwise.report import (
    Bars,
    Column,
    DataTable,
    Fact,
    Facts,
    Lines,
    Marker,
    Measured,
    Note,
    Report,
    Section,
    Series,
    Tile,
    Verdict,
)
from castwise.report.records import Cell

if TYPE_CHECKING:
    from castwise.numerics.search import Found

_MOST_BARS = 25
_LONGEST_BAR = 2.0  # times the budget; longer ones would flatten all others


def report_of(found: Found, target: str) -> Report:
    """Arrange what was found for a reader."""
    modules = [unit for unit in found.units if not unit.is_operator]
    high = [unit for unit in modules if unit.chosen != found.scores.default]
    saved = 1 - found.cost / found.cost_highest if found.cost_highest else 0.0
    return Report(
        title=f"Search: {target}",
        subtitle=f"{found.budget}, formats {', '.join(found.scores.candidates)}, "
        f"cost by {found.cost_model}",
        verdict=Verdict(
            text=f"{len(modules) - len(high)} of {len(modules)} modules can "
            f"run in {found.scores.default}; {len(high)} cannot.",
            mark="good",
            because=f"The policy was run on {found.num_batches} batches and used at "
            f"most {found.best.usage:.0%} of the budget.",
        ),
        tiles=_tiles(found, saved),
        sections=(
            _policy_section(found),
            _pareto_section(found),
            _unit_section(found),
            _evidence_section(found),
        ),
        footer=f"castwise {castwise.__version__}, seed {found.seed}, "
        f"{found.scoring_steps} steps for scores and {found.trial_steps} for trials, "
        f"{found.seconds:.1f} s",
    )


def _tiles(found: Found, saved: float) -> tuple[Tile, ...]:
    worst = worst_errors(found.best.errors)
    errors = tuple(
        Tile(
            name=f"{kind} error",
            value=f"{worst[kind]:.2e}",
            detail=f"allowed {limit:g}; all in fp32 {found.floor[kind]:.1e}",
            mark="good",
        )
        for kind, limit in found.budget.limits.items()
    )
    return (
        *errors,
        Tile(
            name=f"{found.cost_model} saved",
            value=f"{saved:.1%}",
            detail="against every module in the format with the most digits",
        ),
        Tile(
            name="Steps",
            value=str(found.scoring_steps + found.trial_steps),
            detail=f"{found.scoring_steps} for scores, {len(found.trials)} policies "
            "tried",
        ),
    )


def _policy_section(found: Found) -> Section:
    """The rules with their reasons, and what must be known about them."""
    rows: list[tuple[Cell, ...]] = [
        (
            rule.module or f"operator {rule.op}",
            rule.stage or "",
            rule.value,
            rule.because,
        )
        for rule in found.policy.rules
    ]
    notes: list[Note] = []
    if found.unstable:
        named = ", ".join(
            f"{fqn or 'the model itself'} ({op})" for fqn, op in found.unstable.items()
        )
        notes.append(
            Note(
                text=f"Decisions that turn over under rounding noise: {named}. These "
                "modules are held high, and the error on other batches than the "
                f"{found.num_batches} that were tried can jump whatever the policy "
                "says; validate on many.",
                mark="warning",
            )
        )
    if found.scores.never_called:
        notes.append(
            Note(
                text="Never called by any batch, so they run in the default without "
                f"evidence: {', '.join(found.scores.never_called)}.",
                mark="warning",
            )
        )
    table = DataTable(
        title=f"Rules over the default {found.policy.default}",
        columns=(
            Column(name="module", spelling="text"),
            Column(name="stage", spelling="text"),
            Column(name="precision", spelling="text"),
            Column(name="because", spelling="text"),
        ),
        rows=tuple(rows),
        caption="The first rule that matches wins; a rule holds for what is inside.",
    )
    return Section(title="Policy", blocks=(*notes, table))


def _pareto_section(found: Found) -> Section:
    """Cost against error: predicted for all budgets, measured where it was tried."""
    whole = found.cost_highest or 1.0
    points = sorted(found.pareto, key=lambda point: point.cost)
    tried = sorted(
        (trial for trial in found.trials if math.isfinite(trial.usage)),
        key=lambda trial: trial.cost,
    )
    costs = [100 * point.cost / whole for point in points]
    ends = (min(costs, default=0.0), max(costs, default=100.0))
    curve = Lines(
        title="Cost against error",
        series=(
            Series(
                name="predicted, corrected by the trials",
                xs=tuple(costs),
                ys=tuple(point.usage for point in points),
            ),
            Series(
                name="measured in trials",
                xs=tuple(100 * trial.cost / whole for trial in tried),
                ys=tuple(trial.usage for trial in tried),
            ),
            *_run_points(found, whole),
            Series(name="the budget", xs=ends, ys=(1.0, 1.0)),
        ),
        x_label=f"{found.cost_model}, percent of the most precise policy",
        y_label="error, as a share of the budget",
        log_y=True,
        markers=(Marker(name="the policy", x=100 * found.cost / whole),),
        caption=f"What is below the budget is good enough; {found.margin:.0%} of it "
        "had to suffice. Other budgets are solved from the same scores.",
    )
    return Section(title="Pareto curve", blocks=(curve, _trial_table(found)))


def _run_points(found: Found, whole: float) -> tuple[Series, ...]:
    """Points of the curve that were run, in the order of their costs."""
    run = sorted(
        (point.cost, point.measured)
        for point in found.pareto
        if point.measured is not None and math.isfinite(point.measured)
    )
    if not run:
        return ()
    return (
        Series(
            name="measured on the curve",
            xs=tuple(100 * cost / whole for cost, _ in run),
            ys=tuple(measured for _, measured in run),
        ),
    )


def _trial_table(found: Found) -> DataTable:
    kinds = tuple(found.budget.limits)
    return DataTable(
        title="Policies that were run",
        columns=(
            Column(name="cost", spelling="percent", digits=1),
            Column(name="predicted", spelling="percent", digits=1),
            Column(name="measured", spelling="percent", digits=1),
            *(Column(name=f"{kind} error") for kind in kinds),
            Column(name="batches"),
            Column(name="holds", spelling="text"),
        ),
        rows=tuple(
            (
                trial.cost / found.cost_highest if found.cost_highest else None,
                trial.predicted,
                trial.usage,
                *(worst_errors(trial.errors)[kind] for kind in kinds),
                len(trial.errors),
                ("chosen" if trial == found.best else "yes") if trial.holds else "no",
            )
            for trial in found.trials
        ),
        caption="Predicted and measured use of the budget. A trial ends with the first "
        "batch that breaks it.",
    )


def _unit_section(found: Found) -> Section:
    """Every module: what it was given and what it would do in each format."""
    names = found.scores.candidates
    low = found.scores.default
    ranked = sorted(found.units, key=lambda unit: -unit.errors[low])
    bars = Bars(
        title=f"What {low} alone would use of the budget",
        names=tuple(
            f"{unit.fqn or '(model)'} in {unit.chosen}{_beyond(unit.errors[low])}"
            for unit in ranked[:_MOST_BARS]
        ),
        values=tuple(
            Measured(
                value=min(unit.errors[low], _LONGEST_BAR),
                mark="none" if unit.chosen == low else "warning",
            )
            for unit in ranked[:_MOST_BARS]
        ),
        spelling="percent",
        caption=f"The {min(len(ranked), _MOST_BARS)} modules with the largest share; "
        f"the squares add up. Bars end at {_LONGEST_BAR:.0%}.",
    )
    table = DataTable(
        title="All modules",
        columns=(
            Column(name="module", spelling="text"),
            Column(name="type", spelling="text"),
            Column(name="runs in", spelling="text"),
            *(Column(name=f"error in {name}", spelling="percent") for name in names),
            Column(name="cost", spelling="percent", digits=2),
            Column(name="because", spelling="text"),
        ),
        rows=tuple(
            (
                unit.fqn or "(model)",
                unit.type,
                unit.chosen,
                *(_share(unit.errors[name]) for name in names),
                unit.costs[unit.chosen] / found.cost if found.cost else None,
                unit.because,
            )
            for unit in found.units
        ),
        caption="Errors as shares of the budget, of the rounding of the module alone. "
        "0 stands for formats that were not scored, because all of the model in fp32 "
        "uses up little of the budget.",
        folded=len(found.units) > _MOST_BARS,
    )
    return Section(title="Modules", blocks=(bars, table))


def _evidence_section(found: Found) -> Section:
    """What was measured, against what, and with which noise floor."""
    rows = tuple(
        (at, *(errors[kind] for kind in errors))
        for at, errors in enumerate(found.best.errors)
    )
    kinds = tuple(found.best.errors[0])
    return Section(
        title="Evidence",
        blocks=(
            DataTable(
                title="The policy on each batch",
                columns=(
                    Column(name="batch"),
                    *(Column(name=f"{kind} error") for kind in kinds),
                ),
                rows=rows,
            ),
            Facts(
                title="How it was found",
                facts=(
                    *(
                        Fact(
                            name=f"Noise floor, {kind}",
                            value=error,
                            because="the error of the whole model in fp32",
                        )
                        for kind, error in found.floor.items()
                    ),
                    Fact(
                        name="Steps for scores",
                        value=found.scoring_steps,
                        because="forward and backward runs, replays included; they do "
                        "not grow with the number of modules",
                    ),
                    Fact(
                        name="Steps for trials",
                        value=found.trial_steps,
                        because="references, noise floor and policies, batch by batch",
                    ),
                    Fact(name="Seed", value=found.seed),
                    Fact(name="Fingerprint", value=found.scores.fingerprint[:16]),
                ),
            ),
        ),
    )


def _share(value: float) -> float | str:
    return value if math.isfinite(value) else "not finite"


def _beyond(value: float) -> str:
    """What a bar that is cut stands for."""
    if value <= _LONGEST_BAR:
        return ""
    return f" ({value:.3g} times)" if math.isfinite(value) else " (not finite)"
