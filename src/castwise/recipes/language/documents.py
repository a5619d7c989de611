"""Where text comes from: CPython's language reference, files, or a local dataset.

A document is the unit that is never cut between training and validation: a topic of the
reference, a file, a row of a dataset, or a piece of a long file cut at blank lines. To
which of the two it belongs is a hash of its text, so that neither order nor other
documents matter, and a text that occurs twice is never on both sides.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castwise.errors import DataError, MissingExtraError, StorageError

PIECE_CHARS = 16_384
"""A file of more than four times this is cut at blank lines into pieces as long."""

_TEXT_KEY = "text"


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Documents for training and for validation."""

    train: tuple[str, ...]
    """What the model learns from."""

    validation: tuple[str, ...]
    """What it is measured on."""

    digest: str
    """SHA-256 over both, in their order."""


def reference_documents() -> list[str]:
    """Return the topics of the language reference that ships inside CPython."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return [topics[name] for name in sorted(topics)]


def read_documents(paths: Sequence[str | Path]) -> list[str]:
    """Return the documents of files and folders; none: the language reference.

    A folder stands for all files of text in it, `.txt`, `.md`, `.rst`, `.py` and
    `.jsonl`, or for a dataset of Hugging Face if it holds `.parquet` or `.arrow` files.

    Raises:
        StorageError: Something cannot be read.
        DataError: A file is not UTF-8, or a row has no text.
        MissingExtraError: A dataset needs the package datasets.
    """
    if not paths:
        return reference_documents()
    found: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += _of_folder(path)
        else:
            found += _of_file(path)
    return [document for document in found if document.strip()]


def split_documents(documents: Sequence[str], validation_share: float) -> Split:
    """Divide documents by a hash of their text.

    Raises:
        DataError: One of the two sides would be empty.
    """
    sides: tuple[list[str], list[str]] = ([], [])
    total = hashlib.sha256()
    for document in documents:
        digest = hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        sides[place < validation_share].append(document)
        total.update(digest)
    train, validation = sides
    if not train or not validation:
        raise DataError(
            f"a split needs documents on both sides, and {len(documents)} documents "
            f"gave {len(train)} for training and {len(validation)} for validation; "
            "give more text, or another text.validation_share"
        )
    total.update(repr(validation_share).encode())
    return Split(
        train=tuple(train), validation=tuple(validation), digest=total.hexdigest()
    )


_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")


def _of_folder(folder: Path) -> list[str]:
    rows = sorted(p for p in folder.rglob("*") if p.suffix in {".parquet", ".arrow"})
    if rows:
        return list(_rows_of_dataset(folder, rows))
    files = sorted(p for p in folder.rglob("*") if p.suffix in _SUFFIXES)
    if not files:
        raise StorageError(
            f"{folder} holds no text; it needs files that end in "
            f"{', '.join(_SUFFIXES)}, .parquet or .arrow"
        )
    return [document for path in files for document in _of_file(path)]


def _of_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read as text: {error.strerror or error}; check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} needs to be UTF-8, and byte {error.start} is not; convert it"
        ) from error
    if path.suffix == ".jsonl":
        return list(_rows_of_lines(path, text))
    return cut(text)


def cut(text: str) -> list[str]:
    """Cut a long text at blank lines into pieces; a short one is one document."""
    if len(text) <= 4 * PIECE_CHARS:
        return [text]
    pieces: list[str] = []
    at = 0
    while at < len(text):
        end = text.find("\n\n", at + PIECE_CHARS)
        end = len(text) if end < 0 else end + 2
        pieces.append(text[at:end])
        at = end
    return pieces


def _rows_of_lines(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield _text_of(json.loads(line), f"{path}:{number}")
        except ValueError as error:
            raise DataError(
                f"{path}:{number} is no JSON; each line holds one object"
            ) from error


def _rows_of_dataset(folder: Path, files: Sequence[Path]) -> Iterator[str]:
    """Read rows by the builders of `datasets`, which run no script of the folder."""
    if importlib.util.find_spec("datasets") is None:
        raise MissingExtraError(
            f"{folder} is a dataset, and the package datasets, which reads it, is not "
            "installed; run `pip install datasets`, or give files of text"
        )
    dataset: Any = importlib.import_module("datasets").Dataset
    for path in files:
        read = dataset.from_parquet if path.suffix == ".parquet" else dataset.from_file
        for number, row in enumerate(read(str(path)), 1):
            yield _text_of(row, f"{path}, row {number}")


def _text_of(row: Any, where: str) -> str:
    text = row.get(_TEXT_KEY) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise DataError(
            f"{where} has no {_TEXT_KEY!r}; each row holds its document under that name"
        )
    return text
