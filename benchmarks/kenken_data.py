"""Rates of the KenKen data side on one core: squares, unique puzzles, exact solving.

    OMP_NUM_THREADS=1 python benchmarks/kenken_data.py [--sizes 4,6,9] [--seconds 2]

Each figure is the median of five rounds after a first one that compiles; the last
lines say how long the first and the second start take in a fresh process.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

from castwise.recipes.kenken import cages
from castwise.recipes.kenken.alphabets import Mode, digits
from castwise.recipes.kenken.exact import solve_many
from castwise.recipes.kenken.latin import BLOCK, latin_squares
from castwise.recipes.kenken.streams import stream_key

ROUNDS = 5
EVERYTHING = np.array([0, 1, 1])

START = """
import time
begin = time.perf_counter()
from castwise.recipes.kenken.alphabets import Mode
from castwise.recipes.kenken.dataset import generate_puzzle_set
generate_puzzle_set(6, Mode.STANDARD, 1, 0, "train", workers=1)
print(time.perf_counter() - begin)
"""


class Round:
    """Arrays that `make_unique` fills, and what it found in them."""

    def __init__(self, n: int, mode: Mode, count: int) -> None:
        self.mode = mode
        self.n, self.count, self.kept = n, count, 0
        self.cage_id = np.zeros((count, n, n), np.uint8)
        self.cage_op = np.zeros((count, n * n), np.uint8)
        self.cage_target = np.zeros((count, n * n), np.int32)
        self.num_cages = np.zeros(count, np.int16)
        self.nodes = np.zeros(count, np.int32)
        self.tally = np.zeros(4, np.int64)

    def make(self, start: int) -> None:
        """Make squares and cage them, one thread."""
        squares = latin_squares(self.n, self.count, 1, start=start, workers=1)
        self.tally[:] = 0
        self.kept = cages.make_unique(
            digits(self.n, self.mode),
            squares,
            stream_key(1, "benchmark", self.n),
            start,
            EVERYTHING,
            self.cage_id,
            self.cage_op,
            self.cage_target,
            self.num_cages,
            self.nodes,
            np.zeros(self.count, np.uint64),
            np.zeros(self.count, np.int64),
            self.tally,
        )

    def solve(self) -> None:
        """Solve what was kept afresh, one thread."""
        kept = slice(self.kept)
        solve_many(
            self.mode,
            self.cage_id[kept],
            self.cage_op[kept],
            self.cage_target[kept],
            self.num_cages[kept],
            workers=1,
        )


def rate(work: Callable[[int], int], seconds: float) -> float:
    """Return the median number of things per second over the rounds."""
    rates = []
    place = 0
    for _ in range(ROUNDS):
        begin, done = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds / ROUNDS:
            done += work(place)
            place += 1
        rates.append(done / (time.perf_counter() - begin))
    return statistics.median(rates)


def measure_squares(n: int, seconds: float) -> float:
    """Measure Latin squares per second."""

    def work(place: int) -> int:
        return len(latin_squares(n, 4 * BLOCK, 1, start=4 * BLOCK * place, workers=1))

    work(0)
    return rate(work, seconds)


def measure_puzzles(n: int, mode: Mode, seconds: float) -> str:
    """Measure unique puzzles per second, and describe them."""
    count = BLOCK if n < 8 else 64 if n < 10 else 4
    made = Round(n, mode, count)
    tally = np.zeros(4, np.int64)
    nodes: list[int] = []

    def work(place: int) -> int:
        made.make(place * count)
        tally[:] += made.tally
        nodes.extend(made.nodes[: made.kept].tolist())
        return made.kept

    speed = rate(work, seconds)
    made.make(0)
    begin = time.perf_counter()
    made.solve()
    solving = made.kept / (time.perf_counter() - begin) if made.kept else 0.0
    easy = float(np.mean([count == 0 for count in nodes])) if nodes else 0.0
    half, most = np.quantile(nodes or [0], [0.5, 0.99])
    unique, unknown = tally[1] / tally.sum(), tally[3] / tally.sum()
    return (
        f"{n:>4} {mode.value:<9} {speed:>10,.0f} {solving:>10,.0f} {unique:>8.3f} "
        f"{unknown:>8.4f} {easy:>8.3f} {half:>7.0f} {most:>7.0f}"
    )


def measure_start() -> tuple[float, float]:
    """Measure import and first puzzle in fresh processes: cold cache, then warm."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"NUMBA_CACHE_DIR": folder}
        times = [
            float(
                subprocess.run(
                    [sys.executable, "-c", START],
                    env=environment,
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
            )
            for _ in range(2)
        ]
    return times[0], times[1]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="3,4,5,6,7,8,9")
    parser.add_argument("--square-sizes", default="3,4,5,6,7,8,9,10,12,14,16")
    parser.add_argument("--seconds", type=float, default=3.0)
    settings = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, one thread, load "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    print("\n   n    squares/s")
    for n in map(int, settings.square_sizes.split(",")):
        print(f"{n:>4} {measure_squares(n, settings.seconds):>12,.0f}", flush=True)
    print(
        "\n   n mode       unique/s   solved/s   unique  unknown  nodes=0  median"
        "    99 %"
    )
    for n in map(int, settings.sizes.split(",")):
        for mode in Mode:
            print(measure_puzzles(n, mode, settings.seconds), flush=True)
    cold, warm = measure_start()
    print(
        f"\nfirst puzzle of a fresh process: {cold:.1f} s compiling, {warm:.1f} s "
        "with kept kernels"
    )


if __name__ == "__main__":
    main()
