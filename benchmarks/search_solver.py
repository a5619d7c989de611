"""How far the knapsack of the search is from an integer program, and how long it takes.

    python benchmarks/search_solver.py

Random instances of 100 groups and 3 formats, loads over six decades as scores are, at
capacities from tight to loose, beside scipy's `milp` (HiGHS) in the same run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import numpy as np
from scipy.optimize import LinearConstraint, milp

from castwise.numerics.search.solve import solve

OUT = Path(__file__).parents[1] / "docs/accepted/search_solver.json"


def instance(seed: int) -> tuple[list[list[float]], list[list[float]], float]:
    """Costs, loads and a capacity."""
    chance = random.Random(seed)
    sizes = [chance.choice([1, 1, 4, 16, 16, 64]) for _ in range(100)]
    costs = [[size * 0.5, size * 1.0, size * 2.0] for size in sizes]
    loads = []
    for _ in sizes:
        low = 10 ** chance.uniform(-6, 0)
        loads.append([low, low * 1e-6, low * 1e-14])
    total = sum(load[0] for load in loads)
    return costs, loads, total * 10 ** chance.uniform(-7, -0.1)


def optimum(
    costs: list[list[float]], loads: list[list[float]], capacity: float
) -> float:
    """The least cost, by integer programming."""
    flat_costs, flat_loads = np.ravel(costs), np.ravel(loads) / capacity
    num, width = len(costs), len(costs[0])
    choose = np.kron(np.eye(num), np.ones(width))
    found = milp(
        flat_costs,
        constraints=[
            LinearConstraint(choose, 1, 1),
            LinearConstraint(flat_loads[None], -np.inf, 1),
        ],
        integrality=np.ones(num * width),
        options={"mip_rel_gap": 1e-9},
    )
    return float(found.fun)


def main() -> None:
    """Compare on many instances."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--instances", type=int, default=60)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    gaps, seconds, theirs = [], [], []
    for seed in range(options.instances):
        costs, loads, capacity = instance(seed)
        begin = time.process_time()
        choice = solve(costs, loads, capacity)
        seconds.append(time.process_time() - begin)
        begin = time.process_time()
        best = optimum(costs, loads, capacity)
        theirs.append(time.process_time() - begin)
        assert choice is not None
        cost = sum(row[one] for row, one in zip(costs, choice, strict=True))
        gaps.append(cost / best - 1)
    result = {
        "instances": options.instances,
        "mean_gap": statistics.mean(gaps),
        "worst_gap": max(gaps),
        "median_ms": 1e3 * statistics.median(seconds),
        "milp_median_ms": 1e3 * statistics.median(theirs),
    }
    print(json.dumps(result, indent=1))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
