"""The record of a search: scores and trials in one JSON file, to stop and go on.

A record carries the fingerprint of everything that its numbers depend on: weights,
buffers, batches, formats, seed, number of probes. A record of something else is
refused; nothing is ever mixed. Products of probes are written as they come, so that a
search that was killed goes on with the next probe, and trials so that none runs twice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from castwise.errors import ContradictionError, StorageError
from castwise.numerics.search.scores import Scores
from castwise.numerics.search.structure import floating_in
from castwise.numerics.target import Batch

VERSION = 2
"""Of the file format."""


@dataclass(kw_only=True, slots=True)
class Record:
    """What a search has learnt so far, and the file that keeps it, if there is one."""

    fingerprint: str
    """Of what the numbers depend on."""

    path: Path | None = None
    """Where it is kept."""

    probes: dict[str, Any] = field(default_factory=dict)
    """Number of a probe, as text -> its products."""

    scores: Scores | None = None
    """Once all probes are done."""

    trials: dict[str, dict[str, float]] = field(default_factory=dict)
    """Digest of a policy and batch -> errors."""

    def save(self) -> None:
        """Write the file whole, or not at all."""
        if self.path is None:
            return
        record = {
            "castwise_search": VERSION,
            "fingerprint": self.fingerprint,
            "probes": self.probes,
            "scores": None if self.scores is None else self.scores.record(),
            "trials": self.trials,
        }
        temporary = self.path.with_name(f".{self.path.name}.part")
        try:
            temporary.write_text(json.dumps(record) + "\n")
            temporary.replace(self.path)
        except OSError as error:
            raise StorageError(
                f"the record of a search needs a file that can be written, and "
                f"{self.path} cannot be: {error.strerror or error}; name another one"
            ) from error


def open_record(path: Path | None, fingerprint: str) -> Record:
    """Read a record, or begin one.

    Raises:
        StorageError: The file is there and is no record.
        ContradictionError: It is the record of another search.
    """
    if path is None or not path.exists():
        return Record(fingerprint=fingerprint, path=path)
    try:
        found = json.loads(path.read_text())
        version, whose = found["castwise_search"], found["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path} is no record of a search: {type(error).__name__}; name another "
            "file, or delete it"
        ) from None
    if version != VERSION or whose != fingerprint:
        raise ContradictionError(
            f"{path} is the record of another search: the model, its weights, the "
            "batches, the formats, the seed or the number of probes differ; name "
            "another file, or delete it"
        )
    scores = found["scores"]
    return Record(
        fingerprint=fingerprint,
        path=path,
        probes=found["probes"],
        scores=None if scores is None else Scores.from_record(scores),
        trials=found["trials"],
    )


def fingerprint_of(
    model: nn.Module, batches: Sequence[Batch], settings: Iterable[object]
) -> str:
    """A digest of everything that scores and trials depend on."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.requires_grad} ".encode())
        _add(digest, tensor)
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__qualname__} {module.training}".encode())
    for batch in batches:
        for tensor in _tensors(batch):
            _add(digest, tensor)
    digest.update(repr(tuple(settings)).encode())
    return digest.hexdigest()


def digest_of(text: str) -> str:
    """A short digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def finite_or_text(value: float) -> float | str:
    """A number that JSON can say."""
    return value if math.isfinite(value) else str(value)


def _tensors(batch: Batch) -> list[torch.Tensor]:
    whole = [
        e for e in batch if isinstance(e, torch.Tensor) and not e.is_floating_point()
    ]
    return [*whole, *floating_in(*batch)]


def _add(digest: Any, tensor: torch.Tensor) -> None:
    plain = tensor.detach().cpu().contiguous()
    digest.update(f"{tuple(plain.shape)} {plain.dtype} ".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
