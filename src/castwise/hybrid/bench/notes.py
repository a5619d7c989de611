"""What a bench has measured so far, on disk, so that it can be stopped and go on.

    notes = Notes(Path("hybrid.json"), "physics", header)
    point = notes.once("tuned plain", lambda: tuned(...))     # measured, or read
    notes.finish(record)                                      # joins hybrid.json

Every bench writes a file of its own below `hybrid.parts`, so that benches may run in
several processes at a time; when one is finished, all that are finished are joined. A
part that was measured under another header (seeds, target, grid) is not read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from castwise.errors import StorageError


class Notes:
    """The notes of one bench; without a file they are kept in memory alone.

    Args:
        out: The file that all benches join; None for none.
        bench: Which one.
        header: What its figures depend on.

    Raises:
        StorageError: There is such a file, and it is no JSON.
    """

    def __init__(
        self, out: Path | None = None, bench: str = "", header: Any = None
    ) -> None:
        self._out, self._bench = out, bench
        self._tree: dict[str, Any] = {"header": plain_of(header), "parts": {}}
        self._path = None if out is None else parts_of(out) / f"{bench}.json"
        if self._path is not None and self._path.exists():
            found = read_notes(self._path)
            if found.get("header") == self._tree["header"]:
                self._tree = found

    @property
    def record(self) -> Any:
        """What was given to `finish`, once; None before."""
        return self._tree.get("record")

    def once(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return what was measured under a key, now or before, as plain data."""
        parts = self._tree["parts"]
        if key not in parts:
            parts[key] = plain_of(measure())
            self._write()
        return parts[key]

    def finish(self, record: Any) -> None:
        """Note the whole record, and join all that is finished."""
        self._tree["record"] = plain_of(record)
        self._write()
        if self._out is not None:
            joined = read_notes(self._out) if self._out.exists() else {}
            for path in sorted(parts_of(self._out).glob("*.json")):
                part = read_notes(path)
                if "record" in part:
                    joined[path.stem] = {
                        "header": part["header"],
                        "record": part["record"],
                    }
            _replace(self._out, joined)

    def _write(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _replace(self._path, self._tree)


def parts_of(out: Path) -> Path:
    """Return the folder of the benches that a file joins."""
    return out.with_suffix(".parts")


def read_notes(path: Path) -> dict[str, Any]:
    """Read a file of notes.

    Raises:
        StorageError: It is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{path} cannot be read as the JSON of a bench ({error}); move it away, or "
            "name another file by --out"
        ) from error
    if not isinstance(found, dict):
        raise StorageError(f"{path} needs one object of benches by name")
    return found


def plain_of(value: Any) -> Any:
    """Return JSON of a value; what is infinite was never reached and becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): plain_of(each) for name, each in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain_of(each) for each in value]
    return value


def _replace(path: Path, tree: Any) -> None:
    """Write a file whole, or leave it as it was."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.write_text(f"{json.dumps(tree, indent=1)}\n", encoding="utf-8")
    new.replace(path)
