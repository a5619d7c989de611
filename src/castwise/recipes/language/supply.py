"""Documents to token files, made once per text and tokenizer and then reused.

    supply = open_supply(settings.text, folder)
    supply.train, supply.validation     streams of tokens, mapped into memory

Files are named by what they are made of (documents, split, tokenizer), so that runs
share them and another text never meets an old file. `supply.json` beside them holds the
tokenizer and the digests, which are checked each time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castwise.checkpoints.durable import replace_file, storage_error
from castwise.recipes.language.documents import read_documents, split_documents
from castwise.recipes.language.settings import TextSettings
from castwise.recipes.language.token_file import (
    Stream,
    digest_of,
    open_token_file,
    write_token_file,
)
from castwise.recipes.language.tokenizer import (
    Tokenizer,
    learn_tokenizer,
    tokenizer_of,
)

_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSupply:
    """What a run reads."""

    tokenizer: Tokenizer
    """Learned from the training text."""

    train: Stream
    """Tokens to learn from."""

    validation: Stream
    """Tokens to be measured on."""

    bytes_per_token: float
    """Bytes of UTF-8 per token of the validation text, ends of documents counted."""

    digests: Mapping[str, str]
    """SHA-256 of both token files, and of the tokenizer."""


def default_folder() -> Path:
    """Return the user's cache folder for tokens."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "castwise" / "text"


def open_supply(
    settings: TextSettings, folder: Path, *, tokenizer: Tokenizer | None = None
) -> TokenSupply:
    """Open the tokens of a text, or make them.

    Args:
        settings: Which text, tokenizer and split.
        folder: Where token files stand.
        tokenizer: That of a checkpoint. Default: one that is learned here.

    Raises:
        DataError: The text is unusable or too small.
        StorageError: Something cannot be read or written.
        MissingExtraError: The tokenizer or a dataset needs a package.
    """
    split = split_documents(read_documents(settings.paths), settings.validation_share)
    asked = f"{settings.tokenizer} {settings.vocab_size}"
    if tokenizer is not None:
        asked = tokenizer.digest
    key = hashlib.sha256(f"{_VERSION} {split.digest} {asked}".encode()).hexdigest()[:16]
    place = folder / key
    record = _read_record(place)
    if record is None or not _is_whole(place, record["digests"]):
        learned = tokenizer or learn_tokenizer(
            settings.tokenizer, split.train, settings.vocab_size
        )
        digests = {"tokenizer": learned.digest}
        sizes: dict[str, int] = {}
        for side in ("train", "validation"):
            sizes[side], digests[side] = write_token_file(
                place / f"{side}.npy", getattr(split, side), learned
            )
        num_bytes = sum(
            len(text.encode("utf-8", "surrogatepass")) for text in split.validation
        )
        record = {
            "tokenizer": learned.describe(),
            "digests": digests,
            "bytes_per_token": num_bytes / sizes["validation"],
        }
        _write_record(place, record)
    return TokenSupply(
        tokenizer=tokenizer or tokenizer_of(record["tokenizer"]),
        train=open_token_file(place / "train.npy"),
        validation=open_token_file(place / "validation.npy"),
        bytes_per_token=float(record["bytes_per_token"]),
        digests=dict(record["digests"]),
    )


def _is_whole(place: Path, digests: Mapping[str, str]) -> bool:
    files = {side: place / f"{side}.npy" for side in ("train", "validation")}
    return all(
        path.is_file() and digest_of(path) == digests.get(side)
        for side, path in files.items()
    )


def _read_record(place: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads((place / "supply.json").read_text())
    except (OSError, ValueError):
        return None
    expected = {"tokenizer", "digests", "bytes_per_token"}
    return record if expected == record.keys() else None


def _write_record(place: Path, record: Mapping[str, Any]) -> None:
    path = place / "supply.json"
    try:
        with replace_file(path) as file:
            file.write(json.dumps(record, sort_keys=True).encode())
    except OSError as error:
        raise storage_error("write", path, error) from error
