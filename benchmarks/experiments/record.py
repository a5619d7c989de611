"""The record of the experiments: one JSON file, complete after every trial.

A trial stands in it with what it measured, how long it took, and the number of the run
that made it (date, commit, versions, machine). It is kept as long as the experiment's
digest, a hash over settings and code of its trials, is the same; the runner skips it
then. Checks are judged anew at every run.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numba
import numpy as np
import scipy
import torch

import castwise
from castwise.checkpoints.durable import replace_file
from experiments.contract import THRESHOLDS, Check, Experiment, Results, Trial

ROOT = Path(__file__).parents[2]


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", *words],  # noqa: S607 -- git comes from the path of whoever runs this
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def describe_run() -> dict[str, Any]:
    """Say when, from which commit, with what and on what something runs."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--", "src", "benchmarks")),
        "castwise": castwise.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread a trial",
    }


def describe_thresholds() -> dict[str, Any]:
    """Say when the thresholds were frozen, and whether they are as they were then."""
    path = str(THRESHOLDS.relative_to(ROOT))
    commit, _, date = _git("log", "-1", "--format=%h %cI", "--", path).partition(" ")
    changed = bool(_git("status", "--porcelain", "--", path))
    return {"file": path, "commit": commit, "date": date, "changed": changed}


class RecordFile:
    """Trials on disk.

    Args:
        path: The file; made when the first trial is written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tree: dict[str, Any] = {"thresholds": {}, "runs": [], "experiments": {}}
        if path.exists():
            self._tree = json.loads(path.read_text())
        self._run: int | None = None

    def has(self, experiment: Experiment, trial: Trial) -> bool:
        """Say whether a trial stands here, made by the settings and code of today."""
        kept = self._tree["experiments"].get(experiment.name, {})
        return kept.get("digest") == experiment.digest() and trial.key in kept.get(
            "trials", {}
        )

    def add(
        self,
        experiment: Experiment,
        trial: Trial,
        values: Mapping[str, Any],
        seconds: float,
    ) -> None:
        """Write a trial down; trials of another digest are dropped."""
        entry = self._entry(experiment)
        if self._run is None:
            self._tree["runs"].append(describe_run())
            self._run = len(self._tree["runs"]) - 1
        entry["trials"][trial.key] = {
            "values": dict(values),
            "cpu_seconds": round(seconds, 1),
            "run": self._run,
        }
        self._write()

    def results(self, experiment: Experiment) -> Results:
        """Return what stands here, by arm and seed."""
        found: dict[str, dict[int, Any]] = {arm: {} for arm in experiment.arms}
        for key, trial in self._entry(experiment)["trials"].items():
            arm, _, seed = key.rpartition("/")
            found[arm][int(seed)] = trial["values"]
        return found

    def judged(
        self,
        experiment: Experiment,
        limits: Mapping[str, float],
        checks: Sequence[Check],
    ) -> None:
        """Write down how an experiment came out."""
        entry = self._entry(experiment)
        entry["thresholds"] = dict(limits)
        entry["holds"] = all(check.holds for check in checks)
        entry["checks"] = [asdict(check) for check in checks]
        entry["cpu_seconds"] = round(
            sum(trial["cpu_seconds"] for trial in entry["trials"].values()), 1
        )
        self._tree["thresholds"] = describe_thresholds()
        self._write()

    def entry(self, name: str) -> Mapping[str, Any]:
        """Return everything that stands here of an experiment."""
        found: Mapping[str, Any] = self._tree["experiments"][name]
        return found

    def _entry(self, experiment: Experiment) -> dict[str, Any]:
        """Return an experiment's part; what other settings or code made is dropped."""
        entry = self._tree["experiments"].get(experiment.name)
        if entry is None or entry["digest"] != experiment.digest():
            entry = {
                "question": experiment.question,
                "digest": experiment.digest(),
                "settings": dict(experiment.settings),
                "trials": {},
            }
            self._tree["experiments"][experiment.name] = entry
        return entry

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._forget_unused_runs()
        order = sorted(self._tree["experiments"], key=lambda name: int(name[1:]))
        experiments = {name: self._tree["experiments"][name] for name in order}
        tree = {**self._tree, "experiments": experiments}
        with replace_file(self._path) as file:
            file.write((json.dumps(tree, indent=1) + "\n").encode())

    def _forget_unused_runs(self) -> None:
        """Drop runs that no trial names any more, and number the others anew."""
        trials = [
            trial
            for entry in self._tree["experiments"].values()
            for trial in entry["trials"].values()
        ]
        used = sorted({trial["run"] for trial in trials})
        place = {old: new for new, old in enumerate(used)}
        for trial in trials:
            trial["run"] = place[trial["run"]]
        self._tree["runs"] = [self._tree["runs"][old] for old in used]
        if self._run is not None:
            self._run = place.get(self._run)
