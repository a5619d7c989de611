"""Many random programs against float64, by shards, in a record that can be resumed.

    python benchmarks/graph.py --random 2000 --shard 0/2 --json RECORD &
    python benchmarks/graph.py --random 2000 --shard 1/2 --json RECORD
    python benchmarks/graph.py --seed 137           one program, its text and its error

Each program is one seed; `tests/graph/test_random.py` says what it is held against.
Errors are in units of what a program may have: 1 and more is wrong. Every few programs
the record is read, added to and written again, under a lock, so that shards share it,
and a run that was broken off goes on where it stopped. The record keeps a hash of the
planner and of the programs; where either changed, it is begun anew.
"""

from __future__ import annotations

import datetime as dt
import fcntl
import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
EVERY = 20
"""How many programs run between two writings of the record."""

_LOOK_ON = ("gradient", "drawing", "measure")  # rooms that plan nothing
_PER_ROW = 20
_ROWS = "errors, rows from seed"


def code_digest() -> str:
    """A hash of everything that decides what a program comes to."""
    rooms = sorted((ROOT / "src/castwise/graph").glob("*.py"))
    files = [
        *(room for room in rooms if not room.stem.startswith(_LOOK_ON)),
        ROOT / "tests/random_nets.py",
        ROOT / "tests/graph/test_random.py",
    ]
    text = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(text).hexdigest()[:16]


def run_shard(number: int, first: int, shard: str, file: Path | None) -> dict[str, Any]:
    """Run the seeds of a shard that the record has not; return what all came to."""
    outcome_of = _outcome_of()
    at, of = map(int, shard.split("/"))
    record = Record(file)
    mine = (seed for seed in range(first, first + number) if seed % of == at)
    todo = [seed for seed in mine if seed not in record.errors]
    for done, seed in enumerate(todo, 1):
        start = time.process_time()
        try:
            outcome = outcome_of(seed)
            error, told = outcome.error, list(outcome.fallbacks)
        except Exception as problem:  # noqa: BLE001 -- whatever a program raises is a finding
            error, told = math.inf, [f"{type(problem).__name__}: {problem}"]
        record.note(seed, error, told, time.process_time() - start)
        if not error < 1:
            _say(f"seed {seed}: {error:.3g} {told}")
        if done % EVERY == 0 or seed == todo[-1]:
            record.write()
            _say(f"{done} of {len(todo)}")
    return record.summary()


def show(seed: int) -> dict[str, Any]:
    """One program: its text, and what it comes to with each inner compiler."""
    outcome_of = _outcome_of()
    from random_nets import RandomNet  # noqa: PLC0415 -- of the tests

    print(RandomNet(seed, with_breaks=seed % 4 == 0).source)
    outcomes = {inner: outcome_of(seed, inner) for inner in ("eager", "aot_eager")}
    return {
        inner: {"error": outcome.error, "fallbacks": outcome.fallbacks}
        for inner, outcome in outcomes.items()
    }


class Record:
    """What every program came to, in a file that shards share."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._new: dict[str, Any] = _empty()
        self._all: dict[str, Any] = _empty()
        if file is not None and file.exists():
            self._all = _parsed(file.read_text())

    @property
    def errors(self) -> dict[int, float]:
        """Seed -> error."""
        return {**self._all["errors"], **self._new["errors"]}

    def note(self, seed: int, error: float, told: list[str], seconds: float) -> None:
        """Keep what a program came to until the next writing."""
        self._new["errors"][seed] = float(f"{error:.3g}")
        self._new["seconds"] += seconds
        if told:
            self._new["fallbacks"][str(seed)] = told

    def write(self) -> None:
        """Add what is new to the file, beside what other shards wrote there."""
        if self._file is None:
            self._all = _joined(self._all, self._new)
        else:
            with self._file.open("a+") as kept:
                fcntl.flock(kept, fcntl.LOCK_EX)
                kept.seek(0)
                self._all = _joined(_parsed(kept.read()), self._new)
                kept.truncate(0)
                kept.write(_text(self._all))
        self._new = _empty()

    def summary(self) -> dict[str, Any]:
        """What all programs came to together."""
        return _summary(_joined(self._all, self._new))


def _empty() -> dict[str, Any]:
    return {"code": code_digest(), "errors": {}, "fallbacks": {}, "seconds": 0.0}


def _joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {
        "code": one["code"],
        "errors": {**one["errors"], **other["errors"]},
        "fallbacks": {**one["fallbacks"], **other["fallbacks"]},
        "seconds": one["seconds"] + other["seconds"],
    }


def _summary(kept: dict[str, Any]) -> dict[str, Any]:
    errors: dict[int, float] = kept["errors"]
    worst = max(errors, key=lambda seed: errors[seed], default=None)
    return {
        "programs": len(errors),
        "wrong": sorted(seed for seed, error in errors.items() if not error < 1),
        "worst error, in units of what the format may have": errors.get(worst or 0),
        "worst seed": worst,
        "programs with fallbacks": len(kept["fallbacks"]),
        "CPU seconds": round(kept["seconds"]),
    }


def _parsed(text: str) -> dict[str, Any]:
    kept = json.loads(text) if text else {"code": None}
    if kept["code"] != code_digest():
        return _empty()
    rows = kept[_ROWS]
    errors = {
        int(start) + at: error
        for start, row in rows.items()
        for at, error in enumerate(row)
        if error is not None
    }
    return {
        **_empty(),
        **{k: kept[k] for k in ("fallbacks", "seconds")},
        "errors": errors,
    }


def _text(kept: dict[str, Any]) -> str:
    """JSON, with one line for each row of errors."""
    errors = kept["errors"]
    starts = sorted({seed - seed % _PER_ROW for seed in errors})
    rows = ",\n".join(
        f'  "{start}": {json.dumps([errors.get(start + n) for n in range(_PER_ROW)])}'
        for start in starts
    )
    head = {
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "torch": torch.__version__,
        **_summary(kept),
        **{key: kept[key] for key in ("code", "fallbacks", "seconds")},
        _ROWS: None,
    }
    return (
        json.dumps(head, indent=1).replace(
            f'"{_ROWS}": null', f'"{_ROWS}": {{\n{rows}\n }}'
        )
        + "\n"
    )


def _outcome_of() -> Any:
    sys.path[:1] = [str(ROOT / "tests")]  # not this folder, whose `graph` is a file
    from graph.test_random import outcome_of  # noqa: PLC0415 -- only here

    return outcome_of


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
