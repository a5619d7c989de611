"""The journal of a run: one JSON object per line, and the same for TensorBoard.

    {"event": "train", "step": 40, "time": 1767225600.123, "loss": 1.31, "scale": 65536}

`metrics.jsonl` is the evidence; TensorBoard events are a convenience beside it. Three
rules make it trustworthy:

- JSON has no words for what fp16 produces daily, so nan and both infinities are written
  as the texts "NaN", "Infinity" and "-Infinity", and `read_journal` turns them back.
- Each line is handed to the system whole and at once, so a killed process loses at most
  the line that it was writing. An unterminated last line was never written.
- A resumed run calls `rewind(step)` and no step stands twice: lines after that step
  are dropped, from the events too (`purge_step`).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, final

from castwise.checkpoints.durable import replace_file, storage_error
from castwise.errors import DataError, SettingsError, StorageError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_FIELDS = ("event", "step", "time")
_FLUSH_SECONDS = 10  # how much of the TensorBoard events a killed process may lose

_NOT_IN_JSON = {
    "NaN": math.nan,
    "Infinity": math.inf,
    "-Infinity": -math.inf,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One line of a journal."""

    event: str
    """What happened: "train", "epoch", "skip" ..."""

    step: int
    """After how many steps."""

    time: float
    """Seconds since 1970."""

    values: Mapping[str, Any]
    """What was measured, non-finite numbers restored."""


@final
class Journal:
    """Appends to `metrics.jsonl` and to TensorBoard events in the folder of a run.

    Nothing is created before the first line. A context manager; or `close` it.

    Args:
        folder: Created when needed.
        tensorboard: Whether to write events below `folder/tensorboard` too.
            Default: True.
        writes: Whether anything is written; of several processes only one should.
            Default: True.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        tensorboard: bool = True,
        writes: bool = True,
    ) -> None:
        self._folder = Path(folder)
        self._writes = writes
        self._tensorboard = tensorboard
        self._file: IO[bytes] | None = None
        self._events: SummaryWriter | None = None
        self._purge_step: int | None = None

    @property
    def path(self) -> Path:
        """The file of lines."""
        return self._folder / "metrics.jsonl"

    def __enter__(self) -> Journal:
        """Return the journal."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Write one line.

        Args:
            event: What happened; groups the curves in TensorBoard.
            step: After how many steps.
            values: Numbers, texts, None, scalar tensors, or lists and dicts of those.
                TensorBoard gets the numbers of the top level.

        Raises:
            SettingsError: A value has a name of the journal's own, or is no plain data.
            StorageError: The disk is full or the folder cannot be written.
        """
        if not self._writes:
            return
        plain = {name: _plain(name, value) for name, value in values.items()}
        for name in _FIELDS:
            if name in plain:
                raise SettingsError(
                    f"a journal line has its own {name!r}, got a value of that name in "
                    f"{event!r} at step {step}; rename the value"
                )
        record = {
            "event": event,
            "step": step,
            "time": round(time.time(), 3),
            **{name: _in_json(value) for name, value in plain.items()},
        }
        line = json.dumps(record, allow_nan=False) + "\n"
        try:
            _write_all(self._open_file(), line.encode())
            self._write_events(event, step, plain)
        except OSError as error:
            raise storage_error("write", self.path, error) from error

    def rewind(self, step: int) -> None:
        """Drop every line after a step, and the half-written one, before going on.

        Args:
            step: The step of the checkpoint that the run resumes from.

        Raises:
            DataError: A line in the middle is damaged.
            StorageError: The file cannot be rewritten.
        """
        self.close()
        self._purge_step = step + 1
        if not self._writes or not self.path.exists():
            return
        lines = _whole_lines(self.path)
        kept = [
            line
            for number, line in enumerate(lines, 1)
            if _parse(line, self.path, number).step <= step
        ]
        with replace_file(self.path) as file:
            file.writelines(line + b"\n" for line in kept)

    def close(self) -> None:
        """Write everything out; the next line opens the files again."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._events is not None:
            self._events.close()
            self._events = None

    def _open_file(self) -> IO[bytes]:
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                _cut_half_line(self.path)
            # Unbuffered and appending: a line is one write.
            self._file = self.path.open("ab", buffering=0)
        return self._file

    def _write_events(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        if not self._tensorboard:
            return
        if self._events is None:
            self._events = _summary_writer(
                self._folder / "tensorboard", self._purge_step
            )
        for name, value in values.items():
            if isinstance(value, int | float):
                self._events.add_scalar(f"{event}/{name}", value, step)


def read_journal(path: str | os.PathLike[str]) -> list[Record]:
    """Read a journal back.

    A last line without its end is one that is being written, or was when the process
    was killed, and is left out. Any other line that does not parse is an error.

    Args:
        path: The `metrics.jsonl`, or the folder that holds it.

    Raises:
        DataError: A line is damaged; the message names file and line.
        StorageError: The file is missing or cannot be read.
    """
    source = Path(path)
    source = source / "metrics.jsonl" if source.is_dir() else source
    return [
        _parse(line, source, number)
        for number, line in enumerate(_whole_lines(source), 1)
    ]


def _summary_writer(folder: Path, purge_step: int | None) -> SummaryWriter:
    """Open TensorBoard events; the import takes over a second, hence here."""
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 -- slow to import

    return SummaryWriter(str(folder), purge_step=purge_step, flush_secs=_FLUSH_SECONDS)


def _write_all(file: IO[bytes], line: bytes) -> None:
    """Write a line; a disk that takes a part of it refuses the rest with its error."""
    rest = memoryview(line)
    while rest:
        rest = rest[file.write(rest) :]


def _whole_lines(path: Path) -> list[bytes]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise StorageError(f"there is no journal at {path}; check the path") from error
    except OSError as error:
        raise storage_error("read", path, error) from error
    return raw.split(b"\n")[:-1]


def _cut_half_line(path: Path) -> None:
    """Remove an unterminated last line, else the next would be glued to it."""
    with path.open("rb+") as file:
        raw = file.read()
        file.truncate(raw.rfind(b"\n") + 1)


def _parse(line: bytes, path: Path, number: int) -> Record:
    try:
        return _record(json.loads(line, parse_constant=_refuse_constant))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}:{number} is no line of a journal, need a JSON object with event, "
            "step and time; repair or remove the line"
        ) from error


def _record(values: dict[str, Any]) -> Record:
    event, step, when = (values.pop(name) for name in _FIELDS)
    if type(step) is not int or type(event) is not str:
        raise TypeError("step is a whole number, event a text")
    return Record(event=event, step=step, time=float(when), values=_from_json(values))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _plain(name: str, value: Any) -> Any:
    """Reduce tensors and numpy scalars to Python numbers; refuse what is no data."""
    if hasattr(value, "item"):
        if getattr(value, "ndim", 0):
            raise SettingsError(
                f"a journal value needs to be a scalar, got {name} of shape "
                f"{tuple(value.shape)}; reduce it, or pass a list"
            )
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}.{key}", v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{name}.{i}", v) for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise SettingsError(
        f"a journal value needs to be plain data, got {name} of type "
        f"{type(value).__name__}; write its text or its numbers"
    )


def _in_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_json(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_in_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return "NaN"
        return "Infinity" if value > 0 else "-Infinity"
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_json(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_from_json(v) for v in value]
    return _NOT_IN_JSON.get(value, value) if isinstance(value, str) else value
