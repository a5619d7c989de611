"""A report as JSON, and back.

Each record is an object that names its class under "record"; tuples are arrays. JSON
has no words for nan and the infinities: they are {"record": "float", "value": "nan"}.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castwise.checkpoints.durable import storage_error
from castwise.errors import CastwiseError, DataError
from castwise.report import records

if TYPE_CHECKING:
    import os

_RECORDS = {
    name: value
    for name, value in vars(records).items()
    if dataclasses.is_dataclass(value) and isinstance(value, type)
}


def to_json(report: records.Report) -> str:
    """Write a report as JSON text."""
    return json.dumps(_encode(report), ensure_ascii=False, allow_nan=False, indent=1)


def from_json(text: str, where: object = "the text") -> records.Report:
    """Read a report back.

    Args:
        text: What `to_json` wrote.
        where: Its place, for the message. Default: "the text".

    Raises:
        DataError: The text is no report.
    """
    try:
        report = _decode(json.loads(text))
        if isinstance(report, records.Report):
            return report
        reason = "it is another record"
    except (ValueError, KeyError, TypeError, RecursionError, CastwiseError) as error:
        reason = str(error)
    raise DataError(f"{where} is no report of castwise: {reason}; write it again")


def read_report(path: str | os.PathLike[str]) -> records.Report:
    """Read a `report.json`.

    Raises:
        DataError: It is no report.
        StorageError: It is missing or cannot be read.
    """
    source = Path(path)
    try:
        text = source.read_text(encoding="utf-8")
    except OSError as error:
        raise storage_error("read", source, error) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is no report of castwise: no UTF-8") from error
    return from_json(text, source)


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {
            "record": type(value).__name__,
            **{f.name: _encode(getattr(value, f.name)) for f in fields},
        }
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"record": "float", "value": repr(value)}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    fields = {name: _decode(item) for name, item in value.items()}
    name = fields.pop("record")
    return float(fields["value"]) if name == "float" else _RECORDS[name](**fields)
