"""The page on the experiments: its tables are written from the record.

`docs/experiments.md` holds the words; between `<!-- A5 -->` and `<!-- end -->` stands
what the record says of an experiment. A test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from experiments.contract import Experiment, Results
from experiments.statistics import over_seeds

_BLOCK = re.compile(r"<!-- (A\d+) -->\n.*?<!-- end -->", re.DOTALL)


def filled(page: str, blocks: Mapping[str, str]) -> str:
    """Return the page with the block of each named experiment replaced."""

    def replaced(found: re.Match[str]) -> str:
        name = found.group(1)
        if name not in blocks:
            return found.group(0)
        return f"<!-- {name} -->\n{blocks[name]}<!-- end -->"

    return _BLOCK.sub(replaced, page)


def block(experiment: Experiment, entry: Mapping[str, Any], results: Results) -> str:
    """Write one experiment as Markdown: its checks, and its arms."""
    verdict = "Holds." if entry["holds"] else "**Does not hold.**"
    minutes = entry["cpu_seconds"] / 60
    parts = [
        f"\n{verdict} {len(entry['trials'])} trials, {minutes:.1f} CPU minutes.\n",
        _checks(entry["checks"]),
    ]
    if experiment.shows:
        parts.append(_arms(experiment, results))
    return "\n".join(parts) + "\n"


def _checks(checks: list[Mapping[str, Any]]) -> str:
    lines = [
        "| measured | value | 95 % interval | of | needs | |",
        "|---|---|---|---|---|---|",
    ]
    for check in checks:
        between = check["interval"]
        shown = f"{between[0]:.3g} to {between[1]:.3g}" if between else ""
        name = f"*control:* {check['name']}" if check["control"] else check["name"]
        verdict = "holds" if check["holds"] else "**missed**"
        lines.append(
            f"| {name} | {check['value']:.3g} | {shown} | {check['num']} | "
            f"{check['need']} | {verdict} |"
        )
    return "\n".join(lines) + "\n"


def _arms(experiment: Experiment, results: Results) -> str:
    heads = list(experiment.shows.values())
    lines = [f"| arm | seeds | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for arm in experiment.arms:
        if not any(
            name in values
            for values in results[arm].values()
            for name in experiment.shows
        ):
            continue
        cells = [_mean(results, arm, name) for name in experiment.shows]
        lines.append(f"| {arm} | {len(results[arm])} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean(results: Results, arm: str, name: str) -> str:
    """Return the mean over the seeds, and the lowest and highest."""
    if not all(name in values for values in results[arm].values()):
        return ""
    found = over_seeds(results, arm, name)
    every = [float(values[name]) for values in results[arm].values()]
    if min(every) == max(every):
        return f"{found.value:.4g}"
    return f"{found.value:.3g} ({min(every):.3g} to {max(every):.3g})"
