"""Runs tests as a measurement: how many requirements were checked, how many held."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree as ET

from experiments.contract import Check, Results

ROOT = Path(__file__).parents[2]


def run_tests(*paths: str) -> dict[str, Any]:
    """Run test files and count what passed."""
    with TemporaryDirectory() as folder:
        told = Path(folder) / "told.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        subprocess.run(
            [*command, f"--junit-xml={told}", *paths],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
            capture_output=True,
        )
        # our own pytest wrote this file a moment ago
        suites = ET.parse(told).getroot()  # noqa: S314 -- see above
        counts = [
            {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors")}
            for suite in suites.iter("testsuite")
        ]
    total = {name: sum(each[name] for each in counts) for name in counts[0]}
    return {**total, "files": list(paths)}


def judge_tests(results: Results, arm: str) -> Check:
    """Ask that every test passed."""
    values = next(iter(results[arm].values()))
    missed = values["failures"] + values["errors"]
    return Check(
        name=f"tests that pass: {', '.join(values['files'])}",
        value=float(values["tests"] - missed),
        num=values["tests"],
        need="all",
        holds=missed == 0 and values["tests"] > 0,
    )
