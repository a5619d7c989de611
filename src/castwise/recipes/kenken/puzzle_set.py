"""Many puzzles of one size and mode as frozen arrays, and the file that keeps them.

The file is a safetensors file whose metadata say what it holds and carry a blake2b
digest over that and over every array. A file that is damaged, truncated, of another
kind or of another generator version is refused: nothing is trained on by accident.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from castwise.errors import DataError, StorageError
from castwise.recipes.kenken.alphabets import Mode, digits

if TYPE_CHECKING:
    from typing import Any

GENERATOR_VERSION = 1
"""Raised whenever the same settings would make other puzzles."""

_FORMAT = "castwise kenken puzzle set"


class Kind(StrEnum):
    """What is asked of a puzzle."""

    KENKEN = "kenken"
    """Cages with clues; the solution is unique without any hint."""

    LATIN = "latin"
    """No cages: a square to complete from the hints that a mask reveals."""


class Split(StrEnum):
    """Which share of all puzzles a set is drawn from."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


@dataclass(frozen=True, kw_only=True, slots=True)
class PuzzleSet:
    """Puzzles of one size and mode, K of them with room for C cages each."""

    size: int
    """Rows, columns and symbols."""

    mode: Mode
    """The alphabet."""

    kind: Kind
    """With cages or without."""

    split: Split
    """The share of all puzzles that these come from."""

    seed: int
    """Seed that they were made from."""

    num_candidates: int
    """Candidates of this split that were looked at to find these puzzles."""

    solution: NDArray[np.uint8] = field(repr=False)
    """uint8 [K, n, n] of ranks."""

    cage_id: NDArray[np.uint8] = field(repr=False)
    """uint8 [K, n, n], cage of each cell; zeros for a Latin square."""

    cage_op: NDArray[np.uint8] = field(repr=False)
    """uint8 [K, C], operation codes of `clues`; 0 behind the last cage."""

    cage_target: NDArray[np.int32] = field(repr=False)
    """int32 [K, C], targets; 0 behind the last cage."""

    num_cages: NDArray[np.int16] = field(repr=False)
    """int16 [K], cages in use."""

    nodes: NDArray[np.int32] = field(repr=False)
    """int32 [K], trials of the exact solver: the difficulty."""

    key: NDArray[np.uint64] = field(repr=False)
    """uint64 [K], hash that puzzles share when rows, columns or axes are swapped."""

    def __post_init__(self) -> None:
        count, n = len(self.solution), self.size
        room = self.cage_op.shape[-1]
        shapes: dict[str, tuple[int, ...]] = {
            "solution": (count, n, n),
            "cage_id": (count, n, n),
        }
        shapes |= {"cage_op": (count, room), "cage_target": (count, room)}
        for spec in _array_fields():
            array = getattr(self, spec)
            shape, dtype = shapes.get(spec, (count,)), _DTYPES[spec]
            if array.shape != shape or array.dtype != dtype:
                raise DataError(
                    f"a puzzle set needs {spec} as {dtype} {shape}; got "
                    f"{array.dtype} {array.shape}; make the set anew."
                )
            array.flags.writeable = False

    def __len__(self) -> int:
        return len(self.solution)

    @property
    def digits(self) -> NDArray[np.int64]:
        """int64 [n], the digit of each rank."""
        return digits(self.size, self.mode)

    @property
    def facts(self) -> dict[str, str]:
        """What the set is, as text; the head of its file."""
        return {
            "format": _FORMAT,
            "generator_version": str(GENERATOR_VERSION),
            "size": str(self.size),
            "mode": self.mode.value,
            "kind": self.kind.value,
            "split": self.split.value,
            "seed": str(self.seed),
            "num_candidates": str(self.num_candidates),
        }

    @property
    def digest(self) -> str:
        """The blake2b hash of what the set is and of every array, 32 hex digits."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps(self.facts, sort_keys=True).encode())
        for name in _array_fields():
            array = getattr(self, name)
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


_DTYPES = {
    "solution": np.dtype(np.uint8),
    "cage_id": np.dtype(np.uint8),
    "cage_op": np.dtype(np.uint8),
    "cage_target": np.dtype(np.int32),
    "num_cages": np.dtype(np.int16),
    "nodes": np.dtype(np.int32),
    "key": np.dtype(np.uint64),
}


def _array_fields() -> tuple[str, ...]:
    return tuple(spec.name for spec in fields(PuzzleSet) if spec.name in _DTYPES)


def save_puzzle_set(path: Path, puzzles: PuzzleSet) -> None:
    """Write a set; the file appears whole or not at all.

    Args:
        path: Where; the folder is made if it is missing.
        puzzles: What.
    """
    arrays = {name: getattr(puzzles, name) for name in _array_fields()}
    data = save(arrays, metadata=puzzles.facts | {"digest": puzzles.digest})
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"a puzzle set must be written to {path}, but {error.strerror}; free "
            "space, or choose a folder that you may write to."
        ) from error


def load_puzzle_set(path: Path) -> PuzzleSet:
    """Read a set and check every byte of it against its digest.

    Args:
        path: A file written by `save_puzzle_set`.

    Returns:
        The set, its arrays read-only.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            facts = dict(file.metadata() or {})
            names = set(file.keys())
            if facts.get("format") != _FORMAT:
                raise DataError(
                    f"{path} must hold a puzzle set, but it is another kind of file; "
                    "name a file that castwise wrote."
                )
            if facts.get("generator_version") != str(GENERATOR_VERSION):
                raise DataError(
                    f"{path} must be of generator version {GENERATOR_VERSION}; got "
                    f"{facts.get('generator_version')}; make the set anew."
                )
            if names != set(_DTYPES):
                raise _damaged(path)
            arrays = {name: file.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise StorageError(
            f"a puzzle set is needed at {path}, but no file is there; make it first."
        ) from error
    except (SafetensorError, ValueError) as error:
        raise _damaged(path) from error
    except OSError as error:
        raise StorageError(
            f"{path} must be readable, but {error.strerror or error}; check its "
            "permissions."
        ) from error
    return _checked(path, facts, arrays)


def _checked(path: Path, facts: dict[str, str], arrays: dict[str, Any]) -> PuzzleSet:
    """Put a set together and compare its digest with the one in the file."""
    try:
        puzzles = PuzzleSet(
            size=int(facts["size"]),
            mode=Mode(facts["mode"]),
            kind=Kind(facts["kind"]),
            split=Split(facts["split"]),
            seed=int(facts["seed"]),
            num_candidates=int(facts["num_candidates"]),
            **arrays,
        )
    except (KeyError, ValueError, DataError) as error:
        raise _damaged(path) from error
    if puzzles.digest != facts.get("digest"):
        raise _damaged(path)
    return puzzles


def _damaged(path: Path) -> DataError:
    return DataError(
        f"{path} must match its digest, but it is truncated or damaged; delete it and "
        "make the set anew."
    )
