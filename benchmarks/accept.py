"""Run the experiments A1 to A10 and hold them against thresholds frozen before.

    python benchmarks/accept.py                      # all that is not recorded yet
    python benchmarks/accept.py --only A5,A6         # some
    python benchmarks/accept.py --list               # what there is, and what is left
    python benchmarks/accept.py --judge              # only look at what is recorded

One process a core, one thread a process: two trials run side by side on two cores and
disturb each other little. The record is complete after each trial, and a run that is
stopped goes on where it was. Exits with 1 when a threshold is missed or something is
left to run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: one thread a process

import torch
from experiments.contract import Experiment, Trial, frozen_thresholds
from experiments.page import block, filled
from experiments.record import RecordFile
from experiments.registry import EXPERIMENTS

PAGE = Path(__file__).parents[1] / "docs" / "experiments.md"
RECORD = Path(__file__).parents[1] / "docs" / "accepted" / "experiments.json"


def run_trial(trial: Trial) -> tuple[dict[str, Any], float]:
    """Run one trial in this process; return its values and its CPU seconds."""
    torch.set_num_threads(1)
    began = _cpu_seconds()
    values = EXPERIMENTS[trial.experiment].run(trial.arm, trial.seed)
    return values, _cpu_seconds() - began


def _cpu_seconds() -> float:
    """CPU time of this process and of the children that it has waited for."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def run_all(trials: Sequence[Trial], record: RecordFile, num_jobs: int) -> int:
    """Run trials side by side and record each as it ends; return how many failed."""
    context = multiprocessing.get_context("spawn")
    failed = 0
    num_jobs = min(num_jobs, len(trials))
    with ProcessPoolExecutor(num_jobs, mp_context=context) as pool:
        waiting = {pool.submit(run_trial, trial): trial for trial in trials}
        for place, done in enumerate(as_completed(waiting), 1):
            trial = waiting[done]
            name = f"{trial.experiment} {trial.key}"
            try:
                values, seconds = done.result()
            except Exception:  # noqa: BLE001 -- one broken trial must not lose the others
                failed += 1
                print(f"{name} FAILED\n{traceback.format_exc()}", flush=True)
                continue
            record.add(EXPERIMENTS[trial.experiment], trial, values, seconds)
            print(f"[{place}/{len(trials)}] {name}: {seconds:.1f} s", flush=True)
    return failed


def judge(experiment: Experiment, record: RecordFile) -> bool:
    """Judge what is recorded of one experiment; say whether everything holds."""
    limits = frozen_thresholds()[experiment.name]
    results = record.results(experiment)
    print(f"\n{experiment.name}  {experiment.question}")
    missing = [arm for arm in experiment.arms if not results[arm]]
    if missing:
        print(f"  not run yet: {', '.join(missing)}")
        return False
    checks = experiment.judge(results, limits)
    record.judged(experiment, limits, checks)
    for check in checks:
        print(f"  {check}")
    return all(check.holds for check in checks)


def write_page(judged: Sequence[Experiment], record: RecordFile) -> None:
    """Write the tables of the page anew from the record."""
    blocks = {
        each.name: block(each, record.entry(each.name), record.results(each))
        for each in judged
    }
    PAGE.write_text(filled(PAGE.read_text(), blocks))


def main() -> int:
    """Run what is not recorded, then judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names with commas between, such as A5,A6")
    parser.add_argument("--arms", help="arms with commas between")
    parser.add_argument("--seeds", type=int, help="fewer or more seeds than planned")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, default=RECORD)
    parser.add_argument("--fresh", action="store_true", help="run recorded ones again")
    parser.add_argument("--judge", action="store_true", help="run nothing")
    parser.add_argument("--list", action="store_true", help="say what is left")
    flags = parser.parse_args()
    names = flags.only.split(",") if flags.only else list(EXPERIMENTS)
    chosen = [EXPERIMENTS[name] for name in names]
    record = RecordFile(flags.json)
    arms = flags.arms.split(",") if flags.arms else None
    trials = [
        trial
        for experiment in chosen
        for trial in experiment.trials(flags.seeds)
        if (arms is None or trial.arm in arms)
        and (flags.fresh or not record.has(experiment, trial))
    ]
    if flags.list:
        for trial in trials:
            print(f"{trial.experiment} {trial.key}")
        print(f"{len(trials)} trials left")
        return 0
    began = time.perf_counter()
    failed = 0 if flags.judge or not trials else run_all(trials, record, flags.jobs)
    held = [judge(experiment, record) for experiment in chosen]
    if flags.json == RECORD:
        write_page(
            [each for each in chosen if all(record.results(each).values())], record
        )
    seconds = time.perf_counter() - began
    print(f"\n{sum(held)} of {len(held)} experiments hold; {seconds:.0f} s")
    return 0 if all(held) and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
