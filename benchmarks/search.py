"""Measure the search for a precision policy, beside three other ways to search.

    OMP_NUM_THREADS=1 python benchmarks/search.py planted --seeds 0 1 2
    ... planted_trained | planted_stream | exhaustive | exhaustive_stream | refined |
        heldout | heldout_stream | router | time

Rivals in the same run, with the same solver and the same trials behind them:

    leave-one-in   each module alone in bf16, others in fp32: one step a module
    Fisher         squared gradient times squared change of the output, one shot, scaled
                   by one step all in bf16 (the score of ModelOpt's auto_quantize)
    bisection      the first or the last N modules in fp32, N by bisection (polygraphy)

Results are merged into a JSON file, piece by piece.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from search_models import (
    LargeMean,
    NearTie,
    Small,
    Transformer,
    batches,
    large,
    loss_fn,
    trained,
)
from torch import nn

from castwise.islands import module_facts
from castwise.numerics.search import Budget, SearchSettings, search
from castwise.numerics.search.bench import Bench
from castwise.numerics.search.candidates import default_of, parse_candidates
from castwise.numerics.search.problem import Choice, Problem
from castwise.numerics.search.record_file import Record
from castwise.numerics.search.scores import Scores
from castwise.numerics.search.scoring import Scoring, ScoringSettings
from castwise.numerics.search.trials import Trials
from castwise.numerics.untouched import untouched
from castwise.policy.precision import FP32
from castwise.policy.rules import Policy

MARGIN = 0.9
FORMATS = ("bf16", "fp32")
CANDIDATES = parse_candidates(FORMATS)
LIMIT = [math.inf]  # CPU seconds, after which a piece stops and can be gone on with
CACHE = Path(tempfile.gettempdir()) / "castwise-search-benchmark"
OUT = Path(__file__).parents[1] / "docs/accepted/search.json"


class Case:
    """One model on the bench, with its scores."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.bench = Bench(model, batches(0, 1), loss_fn, reference="fp64", seed=0)
        self._path = CACHE / f"{name}.json"
        self._known: dict[str, Any] = {}
        if self._path.exists():
            self._known = json.loads(self._path.read_text())
        self.floor = self._once("floor", self._floor)
        self.record = Record(fingerprint="benchmark")
        self.scores = self.score(8)

    def _once(self, key: str, find: Callable[[], Any]) -> Any:
        """Take a result from the last run, or find it; stop when time is up."""
        if key not in self._known:
            if time.process_time() > LIMIT[0]:
                self.keep()
                raise SystemExit("time is up; run again to go on")
            self._known[key] = find()
        return self._known[key]

    def keep(self) -> None:
        """Keep what was found for the next run of this script."""
        self._path.parent.mkdir(exist_ok=True)
        self._path.write_text(json.dumps(self._known))

    def _floor(self) -> float:
        return self.errors(Policy(name="fp32", default=FP32))["gradient"]

    def score(self, num_probes: int) -> Scores:
        """Take scores with some number of probes, once."""
        found = self._once(f"K={num_probes}", lambda: self._score(num_probes).record())
        return Scores.from_record(json.loads(json.dumps(found)))

    def _score(self, num_probes: int) -> Scores:
        settings = ScoringSettings(
            num_probes=num_probes,
            seed=0,
            grouping="none",
            cost="flops",
            with_outputs=False,
        )
        low = default_of(CANDIDATES)
        scoring = Scoring(
            self.bench, CANDIDATES, low, settings, self.record, lambda *_: None
        )
        floor = {"gradient": self.floor, "output": 0.0, "loss": 0.0}
        return scoring.run([low], floor)

    def errors(self, policy: Policy) -> dict[str, float]:
        """Measure a policy on the first batch."""
        return self.bench.errors(policy, Budget(gradient=1), scale=1.0, at=0)

    def choice_of(self, policy: Policy) -> Choice:
        """Read a choice off its policy."""
        bound = policy.bind(module_facts(self.bench.model))
        return tuple(
            int(bound.precision_of(unit.fqn).compute == "fp32")
            for unit in self.scores.units
        )

    def error_of(self, choice: Choice) -> float:
        """Measure a choice on the first batch, once."""
        problem = Problem(self.scores, Budget(gradient=1))
        key = "".join(map(str, choice))
        found = self._once(key, lambda: self.errors(problem.policy(choice))["gradient"])
        return float(found)

    def alone(self) -> list[float]:
        """The squared error of each unit alone in bf16, and what it is in with it.

        A low module inside of a high one is an island that rounds whatever crosses its
        border; so what contains it is low as well, and its share is taken off.
        """
        fqns = [unit.fqn for unit in self.scores.units]
        lows = [_and_above(fqn, fqns) for fqn in fqns]
        found = []
        for fqn, low in zip(fqns, lows, strict=True):
            both = self.error_of(tuple(int(each not in low) for each in fqns))
            above = low - {fqn}
            rest = self.error_of(tuple(int(each not in above) for each in fqns))
            found.append(max(0.0, both**2 - rest**2))
        return found


def _and_above(fqn: str, fqns: list[str]) -> set[str]:
    return {e for e in fqns if not e or e == fqn or fqn.startswith(f"{e}.")}


def with_loads(case: Case, scores: Scores, budget: float, squared: list[float]) -> Any:
    """A problem whose loads come from elsewhere."""
    problem = Problem(scores, Budget(gradient=budget))
    problem.loads = [[value / budget**2, 0.0] for value in squared]
    problem.constant = (case.floor / budget) ** 2
    return problem


def share_high(problem: Problem, choice: Choice) -> float:
    """The share of the work that stays in fp32."""
    lowest, highest = problem.cost((0,) * len(choice)), problem.cost((1,) * len(choice))
    return (problem.cost(choice) - lowest) / (highest - lowest)


class CachedTrials(Trials):
    """Trials whose errors a case remembers from one run of this script to the next."""

    case: Case

    def errors(
        self, policy: Policy, *, to_the_end: bool = False
    ) -> tuple[dict[str, float], ...]:
        """Measure, or remember."""
        del to_the_end
        case = self.case
        return ({"gradient": case.error_of(case.choice_of(policy))},)


def trials_for(case: Case, budget: float, most: int = 10) -> Trials:
    """Trials on the batch of a case."""
    trials = CachedTrials(
        case.bench,
        Budget(gradient=budget),
        margin=MARGIN,
        most=most,
        record=case.record,
        report=lambda *_: None,
    )
    trials.case = case
    return trials


def planted_piece(
    seeds: list[int], *, stream: str = "fp32", is_trained: bool = False
) -> list[dict[str, Any]]:
    """Each way to search, on planted transformers, at five budgets."""
    return [row for seed in seeds for row in planted_rows(seed, stream, is_trained)]


def planted_rows(seed: int, stream: str, is_trained: bool) -> Iterator[dict[str, Any]]:
    """Yield one row for each budget and method."""
    model: nn.Module = large(seed, stream)
    model = trained(model, 25) if is_trained else model
    with untouched(model, torch.device("cpu")):
        case = Case(model, f"large-{stream}-{'trained-' * is_trained}{seed}")
        units = [unit.fqn for unit in case.scores.units]
        planted = {at for at, fqn in enumerate(units) if ".planted" in fqn}
        squared = case.alone()
        all_low = case.error_of((0,) * len(units))
        oracle = case.error_of(
            tuple(1 if at in planted else 0 for at in range(len(units)))
        )
        four = case.score(4)
        fisher = [case.scores.values[fqn]["bf16"].fisher for fqn in units]
        scale = all_low**2 / sum(fisher)
        for factor in (0.6, 1.05, 1.25, 1.5, 3.0):
            budget = factor * oracle / MARGIN
            must = musts(units, squared, budget)
            ways: dict[str, tuple[Any, int]] = {
                "probes K=8": (
                    Problem(case.scores, Budget(gradient=budget)),
                    case.scores.num_steps + 1,
                ),
                "probes K=4": (
                    Problem(four, Budget(gradient=budget)),
                    case.scores.num_steps + 1 - 4,  # its probes are among the others
                ),
                "leave-one-in": (
                    with_loads(case, case.scores, budget, squared),
                    len(units) + 2,
                ),
                "Fisher": (
                    with_loads(case, case.scores, budget, [scale * f for f in fisher]),
                    4,
                ),
            }
            for name, (problem, steps) in ways.items():
                yield {
                    "seed": seed,
                    "factor": factor,
                    "method": name,
                    "steps": steps,
                    "units": len(units),
                    **tried(case, problem, budget, must, planted),
                }
            yield {
                "seed": seed,
                "factor": factor,
                "method": "bisection",
                "units": len(units),
                **bisected(case, budget, must, planted),
            }
            print(f"seed {seed}, budget {budget:.2e} done", flush=True)
            case.keep()


def musts(units: list[str], squared: list[float], budget: float) -> list[set[int]]:
    """What must not all run low: units that alone break the budget.

    A plant's error may need two of its units in bf16 at once, one that hands out bf16
    and one that goes on with it; either of them high mends it, so a plant counts once.
    """
    found = {}
    for at, value in enumerate(squared):
        if value > budget**2:
            plant, is_planted, _ = units[at].partition(".planted")
            name = plant + is_planted
            found[name] = {
                each
                for each, fqn in enumerate(units)
                if each == at or (is_planted and fqn.startswith(name))
            }
    return list(found.values())


def tried(
    case: Case, problem: Problem, budget: float, must: list[set[int]], planted: set[int]
) -> dict[str, Any]:
    """The first policy of a way to search, and the one it ends with."""
    first = problem.solve(MARGIN)
    trials = trials_for(case, budget)
    best = trials.narrowed(problem)
    best = trials.polished(problem, best)
    first = first if first is not None else problem.safest()
    high = {at for at, one in enumerate(first) if one == 1}
    final = {at for at, one in enumerate(best.choice) if one == 1}
    return {
        "must": len(must),
        "must_found": sum(bool(each & high) for each in must),
        "first_usage": case.error_of(first) / budget,
        "share": share_high(problem, best.choice),
        "trials": len(trials.done),
        "usage": best.usage,
        "num_high": len(final),
        "planted_high": len(final & planted),
    }


def bisected(
    case: Case, budget: float, must: list[set[int]], planted: set[int]
) -> dict[str, Any]:
    """The fewest first or last modules in fp32 that keep the budget."""
    num = len(case.scores.groups)
    problem = Problem(case.scores, Budget(gradient=budget))
    runs, best = 0, (1,) * num
    for forward in (True, False):
        low, high = 0, num
        while low < high:
            middle = (low + high) // 2
            runs += 1
            if case.error_of(_ends(num, middle, forward)) <= MARGIN * budget:
                high = middle
            else:
                low = middle + 1
        choice = _ends(num, high, forward)
        best = min(best, choice, key=problem.cost)
    high_set = {at for at, one in enumerate(best) if one == 1}
    return {
        "steps": runs,
        "must": len(must),
        "must_found": sum(bool(each & high_set) for each in must),
        "first_usage": case.error_of(best) / budget,
        "share": share_high(problem, best),
        "trials": 0,
        "usage": case.error_of(best) / budget,
        "num_high": len(high_set),
        "planted_high": len(high_set & planted),
    }


def _ends(num: int, count: int, forward: bool) -> Choice:
    return tuple(
        1 if (at < count if forward else at >= num - count) else 0 for at in range(num)
    )


def exhaustive_piece(seeds: list[int], *, stream: str = "fp32") -> list[dict[str, Any]]:
    """The search against every policy there is, on models of about ten units."""
    rows = []
    for seed in seeds:
        model = Small(seed, stream)
        with untouched(model, torch.device("cpu")):
            case = Case(model, f"small-{stream}-{seed}")
            num = len(case.scores.groups)
            problem = Problem(case.scores, Budget(gradient=1))
            table = {
                choice: case.error_of(choice)
                for choice in itertools.product((0, 1), repeat=num)
            }
            alone = case.alone()
            case.keep()
            errors = sorted(table.values())
            for quantile in (0.02, 0.1, 0.3, 0.6):
                budget = errors[int(quantile * len(errors))] * 1.01 / MARGIN
                feasible = [c for c, e in table.items() if e <= MARGIN * budget]
                optimum = min(share_high(problem, c) for c in feasible)
                row = {"seed": seed, "units": num, "quantile": quantile}
                ways = {
                    "probes": Problem(case.scores, Budget(gradient=budget)),
                    "leave-one-in": with_loads(case, case.scores, budget, alone),
                }
                for name, each in ways.items():
                    trials = trials_for(case, budget)
                    best = trials.polished(each, trials.narrowed(each))
                    share = share_high(problem, best.choice)
                    row[name] = share / optimum - 1 if optimum else share
                    row[f"{name} trials"] = len(trials.done)
                rows.append(row)
            print(f"seed {seed}: {num} units done", flush=True)
    return rows


def refined_piece(seeds: list[int]) -> list[dict[str, Any]]:
    """What stages and operators save beyond modules, on planted transformers.

    Costs count what operators of the table cost in fp32 in all three ways, and are
    shares of the model all in fp32.
    """
    rows = []
    ways = {
        "modules": (FORMATS, False),
        "and stages": ((*FORMATS, "fp32/bf16"), False),
        "and operators": ((*FORMATS, "fp32/bf16"), True),
    }
    for seed, factor in itertools.product(seeds, (0.6, 1.25, 3.0)):
        case = Case(large(seed), f"large-fp32-{seed}")
        fqns = [unit.fqn for unit in case.scores.units]
        oracle = case.error_of(tuple(int(".planted" in fqn) for fqn in fqns))
        row: dict[str, Any] = {"seed": seed, "factor": factor}
        found = {
            name: search(
                large(seed),
                batches(0, 1),
                loss_fn,
                Budget(gradient=factor * oracle / MARGIN),
                formats=formats,
                cost="bytes",
                settings=SearchSettings(operators=operators),
            )
            for name, (formats, operators) in ways.items()
        }
        last = found["and operators"]
        table = sum(u.costs["fp32"] for u in last.units if u.is_operator)
        for name, each in found.items():
            whole = each.cost if ways[name][1] else each.cost + table
            row[name] = whole / each.cost_highest
            row[f"{name} steps"] = each.scoring_steps
            row[f"{name} usage"] = each.best.usage
        row["staged"] = sum(u.chosen == "fp32/bf16" for u in last.units)
        row["low operators"] = [
            u.fqn for u in last.units if u.is_operator and u.chosen == "bf16"
        ]
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def heldout_piece(
    seeds: list[int], *, router: bool = False, stream: str = "fp32"
) -> list[dict[str, Any]]:
    """Whether the budget is kept on batches that the search has not seen.

    A seed stands for a model, random (0, 1, 4, 5, ...) or trained (2, 3, 6, 7, ...),
    and a budget of 2.5e-3 (even) or 4e-3 (odd), which bind; ten times that for routers.
    """
    rows = []
    for seed in seeds:
        is_trained, gradient = bool(seed & 2), 4e-3 if seed & 1 else 2.5e-3
        gradient *= 10 if router else 1
        torch.manual_seed(seed // 4)
        plant = NearTie(64) if router else LargeMean(64)
        model: nn.Module = Transformer(64, 10, {5: plant}, stream)
        model = trained(model, 25) if is_trained else model
        begin = time.process_time()
        found = search(
            model,
            batches(seed, 4),
            loss_fn,
            Budget(gradient=gradient),
            settings=SearchSettings(max_trials=6),
        )
        seconds = time.process_time() - begin
        usages = list(used_by(model, found.policy, gradient, seed))
        rows.append(
            {
                "seed": seed,
                "kind": "trained" if is_trained else "random",
                "budget": gradient,
                "kept": sum(each <= 1 for each in usages),
                "batches": len(usages),
                "worst": max(usages),
                "saved": 1 - found.cost / found.cost_highest,
                "high": [u.fqn for u in found.units if u.chosen == "fp32"],
                "unstable": sorted(found.unstable),
                "steps": found.scoring_steps + found.trial_steps,
                "trials": len(found.trials),
                "seconds": seconds,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def used_by(
    model: nn.Module, policy: Policy, gradient: float, seed: int
) -> Iterator[float]:
    """How much of the budget a policy uses on 16 other batches."""
    with untouched(model, torch.device("cpu")):
        bench = Bench(model, batches(seed + 50, 16), loss_fn, reference="fp64", seed=1)
        for at in range(16):
            errors = bench.errors(policy, Budget(gradient=gradient), scale=1.0, at=at)
            yield errors["gradient"] / gradient


def time_piece(seeds: list[int]) -> list[dict[str, Any]]:
    """Policies by counted and by measured cost, and what a step takes under each.

    A seed stands for a size: 0 is so small that casts decide, at 1 products do.
    """
    rows = []
    for seed in seeds:
        torch.manual_seed(seed)
        width, depth, size, length = ((64, 4, 8, 64), (256, 2, 8, 256))[seed]
        model = Transformer(width, depth, {1: LargeMean(width)})
        given = batches(seed, 2, size, length)
        policies = {"fp32": Policy(name="fp32", default=FP32)}
        high: dict[str, list[str]] = {}
        for cost in ("flops", "time"):
            found = search(
                model,
                given,
                loss_fn,
                Budget(gradient=5e-2),
                cost=cost,
                settings=SearchSettings(max_trials=5),
            )
            policies[f"by {cost}"] = found.policy
            high[f"high by {cost}"] = [
                unit.fqn for unit in found.units if unit.chosen == "fp32"
            ]
        low = CANDIDATES[0].precision
        policies["all bf16"] = Policy(name="low", default=low)
        rows.append({"seed": seed, **step_times(model, given, policies), **high})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def step_times(
    model: nn.Module, given: list[Any], policies: dict[str, Policy]
) -> dict[str, float]:
    """Median CPU milliseconds of a step under each policy, in turns."""
    with untouched(model, torch.device("cpu")):
        bench = Bench(model, given[:1], loss_fn, reference="fp64", seed=0)
        runs: dict[str, list[float]] = {name: [] for name in policies}
        for _ in range(9):
            for name, policy in policies.items():
                with bench.under(policy) as region:
                    bench.step(region, bench.batches[0])
                    begin = time.process_time()
                    bench.step(region, bench.batches[0])
                    runs[name].append(1e3 * (time.process_time() - begin))
    return {name: statistics.median(each) for name, each in runs.items()}


PIECES: dict[str, Callable[[list[int]], list[dict[str, Any]]]] = {
    "planted": planted_piece,
    "planted_trained": lambda seeds: planted_piece(seeds, is_trained=True),
    "planted_stream": lambda seeds: planted_piece(seeds, stream="bf16"),
    "exhaustive": exhaustive_piece,
    "exhaustive_stream": lambda seeds: exhaustive_piece(seeds, stream="bf16"),
    "refined": refined_piece,
    "heldout": heldout_piece,
    "heldout_stream": lambda seeds: heldout_piece(seeds, stream="bf16"),
    "router": lambda seeds: heldout_piece(seeds, router=True),
    "time": time_piece,
}


def summary(rows: list[dict[str, Any]]) -> None:
    """Print the planted piece as a table."""
    print("\nmethod        steps  must-keep  share  1st over  p90 1st  planted  trials")
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        near = [row for row in own if 1 < row["factor"] < 2]
        first = sorted(row["first_usage"] for row in own)
        found, must = (sum(r[key] for r in own) for key in ("must_found", "must"))
        precision = sum(r["planted_high"] for r in near) / max(
            1, sum(r["num_high"] for r in near)
        )
        print(
            f"{name:13} {statistics.mean(r['steps'] for r in own):5.0f} "
            f"{found:5}/{must:<4} {statistics.mean(r['share'] for r in own):6.3f} "
            f"{sum(u > 1 for u in first) / len(first):8.0%} "
            f"{first[math.ceil(0.9 * len(first)) - 1]:8.2f} {precision:8.2f} "
            f"{statistics.mean(r['trials'] for r in own):7.1f}"
        )


def gaps(piece: str, rows: list[dict[str, Any]]) -> None:
    """Print how far each way is above the optimum."""
    print(f"\n{piece}: gap to the optimum in fp32 work")
    for name in ("probes", "leave-one-in"):
        found = [row[name] for row in rows]
        print(
            f"{name:13} mean {statistics.mean(found):.1%}  worst {max(found):.0%}  "
            f"optimal {sum(gap < 1e-9 for gap in found)}/{len(found)}  trials "
            f"{statistics.mean(row[f'{name} trials'] for row in rows):.1f}"
        )


@contextmanager
def merged(path: Path) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Read the results so far, and write them back with what was added."""
    results = json.loads(path.read_text()) if path.exists() else {}
    yield results
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    """Run one piece and merge its rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("piece", choices=[*PIECES, "summary"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seconds", type=float, default=math.inf)
    options = parser.parse_args()
    LIMIT[0] = options.seconds
    torch.set_num_threads(1)
    rows = []
    if options.piece != "summary":
        rows = PIECES[options.piece](options.seeds)
    with merged(options.out) as results:
        kept = results.setdefault(options.piece, [])
        kept[:] = [r for r in kept if r["seed"] not in options.seeds] + rows
        results.pop("summary", None)
        for piece in ("planted", "planted_trained", "planted_stream"):
            if results.get(piece):
                print(f"\n{piece}", end="")
                summary(results[piece])
        for piece in ("exhaustive", "exhaustive_stream"):
            if results.get(piece):
                gaps(piece, results[piece])


if __name__ == "__main__":
    main()
