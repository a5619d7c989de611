r"""The checkpoint file: a safetensors file that knows whether it is whole.

    [u64 header length][{"__metadata__":{"castwise":"checkpoint","digest":"<64 hex>",
    "file_bytes":"<16 digits>","kind":...,"label":...,"tree":...,"version":"1"},
    "model/weight":{"dtype":"BF16","shape":[3,5],"data_offsets":[0,30]}, ...}][data]

Any safetensors reader opens it and finds the tensors under their paths. What is ours is
the metadata, whose first fields lie at fixed places: the digest is the SHA-256 of the
whole file, read with zeros in place of the digest itself. So every bit counts, and a
file is judged whole before anything in it is believed, its version included. That
frame holds for all versions; `version` governs the tree.

A reader refuses, in this order: what is no regular file, what does not begin as a
checkpoint (foreign), a wrong length or digest (damaged), a later version (newer),
another kind.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from castwise.checkpoints.durable import replace_file, storage_error
from castwise.checkpoints.tree import Blob, decode, encode
from castwise.errors import (
    CheckpointError,
    DamagedCheckpointError,
    ForeignCheckpointError,
    NewerCheckpointError,
    StorageError,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from io import BufferedReader

    from numpy.typing import NDArray

VERSION = 1
"""Of the tree and its encoding; the frame around it never changes."""

_SIGNATURE = b'{"__metadata__":{"castwise":"checkpoint","digest":"'
_BETWEEN = b'","file_bytes":"'
_DIGEST_AT = 8 + len(_SIGNATURE)
_SIZE_AT = _DIGEST_AT + 64 + len(_BETWEEN)
_FRAME_BYTES = _SIZE_AT + 16
_CHUNK_BYTES = 1 << 20

# what parsing a header raises that is not one of ours; RuntimeError is torch's
_STRANGE = (
    *(ValueError, KeyError, TypeError, AttributeError),
    *(RuntimeError, ArithmeticError, struct.error),
)

Scalar = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFacts:
    """What a checkpoint says about itself in its header."""

    path: Path
    """Where it lies."""

    kind: str
    """What wrote it and can read it, for example "kenken run"."""

    version: int
    """Version of the file format."""

    label: Mapping[str, Scalar] = field(default_factory=dict)
    """Small facts that can be read without reading the tensors."""

    file_bytes: int
    """Size."""


def save_checkpoint(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    kind: str,
    label: Mapping[str, Scalar] | None = None,
) -> Path:
    """Write a tree to a file: all of it durably, or nothing.

    Args:
        path: The file to create or replace; its folder must exist.
        tree: None, bool, int, float, str, bytes, tensors and numpy arrays in dicts,
            lists and tuples.
        kind: What the tree is; `load_checkpoint` asks for the same.
        label: Small facts for `describe_checkpoint`. Default: none.

    Returns:
        The path.

    Raises:
        CheckpointError: The tree holds a value that could not come back as it was.
        StorageError: The disk is full or the folder cannot be written; the file that
            was there before is untouched.
    """
    document, blobs = encode(tree)
    # Wide elements first: then each tensor lies on a multiple of its element size.
    blobs.sort(key=lambda blob: -_alignment(blob))
    header = _header(document, blobs, kind, label or {})
    with replace_file(path) as file:
        digest = hashlib.sha256()
        for part in chain([memoryview(header)], (blob.fetch().data for blob in blobs)):
            digest.update(part)
            file.write(part)
        file.seek(_DIGEST_AT)
        file.write(digest.hexdigest().encode())
    return Path(path)


def load_checkpoint(path: str | os.PathLike[str], *, kind: str) -> Any:
    """Read a tree back, bit for bit; run nothing that stands in the file.

    Args:
        path: A file that `save_checkpoint` wrote, or a folder of parts.
        kind: What the tree must be.

    Returns:
        The tree, its tensors on the CPU.

    Raises:
        DamagedCheckpointError: Truncated, or its bytes do not match their digest.
        ForeignCheckpointError: No castwise checkpoint, or one of another kind.
        NewerCheckpointError: Written by a later version of the format.
        StorageError: Missing, a folder, or not readable.
    """
    facts, tree = read_checkpoint(Path(path))
    if facts.kind != kind:
        raise ForeignCheckpointError(
            f"{path} holds a checkpoint of kind {facts.kind!r}, need {kind!r}; choose "
            "a checkpoint that this command wrote"
        )
    return tree


def describe_checkpoint(path: str | os.PathLike[str]) -> CheckpointFacts:
    """Read the header of a checkpoint without checking or reading its tensors.

    Raises:
        CheckpointError: As `load_checkpoint`, as far as the header shows it.
        StorageError: Missing, a folder, or not readable.
    """
    source = Path(path)
    if _is_in_parts(source):
        from castwise.checkpoints.parts import describe_parts  # noqa: PLC0415 -- loads torch.distributed

        return describe_parts(source)
    with _Source(source) as file:
        size = _check_frame(file, source)
        header, _ = _read_header(file, source)
        return _facts(header, source, size)


def read_checkpoint(path: Path) -> tuple[CheckpointFacts, Any]:
    """Read facts and tree of a checkpoint of any kind, after checking its digest."""
    if _is_in_parts(path):
        from castwise.checkpoints.parts import read_parts  # noqa: PLC0415 -- loads torch.distributed

        return read_parts(path)
    with _Source(path) as file:
        size = _check_frame(file, path)
        _check_digest(file, path)
        header, data_at = _read_header(file, path)
        facts = _facts(header, path, size)

        try:
            document = json.loads(header["__metadata__"]["tree"])
            fetch = partial(_fetch, file, header, data_at, size - data_at)
            return facts, decode(document, fetch)
        except _STRANGE as error:
            raise _malformed(path) from error


def _is_in_parts(path: Path) -> bool:
    """Whether the ranks of a sharded run wrote it, as a folder."""
    return path.suffix == ".sharded" and path.is_dir()


def read_leaves(path: Path, names: Collection[str]) -> dict[str, Any]:
    """Read some values of a checkpoint whose tree is a flat dict, after its digest."""
    with _Source(path) as file:
        size = _check_frame(file, path)
        _check_digest(file, path)
        header, data_at = _read_header(file, path)
        _facts(header, path, size)
        try:
            pairs = json.loads(header["__metadata__"]["tree"])["dict"]
            wanted = {"dict": [pair for pair in pairs if pair[0] in names]}
            fetch = partial(_fetch, file, header, data_at, size - data_at)
            found: dict[str, Any] = decode(wanted, fetch)
        except _STRANGE as error:
            raise _malformed(path) from error
    if missing := set(names) - found.keys():
        raise _damaged(path, f"it lacks {min(missing)}")
    return found


def stated_digest(path: Path) -> str:
    """Return the digest in the header of a checkpoint, which reading it has checked."""
    with _Source(path) as file:
        _check_frame(file, path)
        file.seek(_DIGEST_AT)
        return file.read(64).decode(errors="replace")


def _fetch(
    file: BufferedReader, header: Mapping[str, Any], data_at: int, room: int, name: str
) -> NDArray[np.uint8]:
    """Read one blob of a checkpoint that is open."""
    begin, end = header[name]["data_offsets"]
    if not 0 <= begin <= end <= room:
        raise ValueError(f"{name} lies outside of the file")
    file.seek(data_at + begin)
    blob = np.empty(end - begin, np.uint8)
    if file.readinto(blob.data) != blob.nbytes:
        raise ValueError(f"{name} ends early")
    return blob


def _alignment(blob: Blob) -> int:
    num_elements = int(np.prod(blob.shape)) if blob.shape else 1
    return blob.num_bytes // num_elements if num_elements else 1


def _header(
    document: Any, blobs: list[Blob], kind: str, label: Mapping[str, Scalar]
) -> bytes:
    """Build length and JSON header, the digest still zeros."""
    if not kind:
        raise CheckpointError("a checkpoint needs a kind, got an empty text")
    ends = list(accumulate((blob.num_bytes for blob in blobs), initial=0))
    metadata = {
        "castwise": "checkpoint",
        "digest": "0" * 64,
        "file_bytes": "0" * 16,
        "kind": kind,
        "label": json.dumps(dict(label)),
        "tree": json.dumps(document, separators=(",", ":"), allow_nan=False),
        "version": str(VERSION),
    }
    entries = {
        blob.name: {
            "dtype": blob.dtype,
            "shape": list(blob.shape),
            "data_offsets": [ends[i], ends[i + 1]],
        }
        for i, blob in enumerate(blobs)
    }
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":"))
    body = text.encode()
    body += b" " * (-len(body) % 8)  # the data begin on a multiple of eight
    header = bytearray(len(body).to_bytes(8, "little") + body)
    header[_SIZE_AT:_FRAME_BYTES] = b"%016d" % (len(header) + ends[-1])
    return bytes(header)


class _Source:
    """A checkpoint open for reading; the system's errors become `StorageError`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BufferedReader | None = None

    def __enter__(self) -> BufferedReader:
        try:
            mode = self._path.stat().st_mode
            if not stat.S_ISREG(mode):  # before open: opening a pipe would wait
                what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
                raise StorageError(
                    f"{self._path} is {what}, need a checkpoint file; name the file"
                )
            self._file = self._path.open("rb")
        except OSError as error:
            raise self._explain(error) from error
        return self._file

    def __exit__(
        self, kind: object, error: BaseException | None, trace: object
    ) -> None:
        if self._file is not None:
            self._file.close()
        if isinstance(error, OSError):
            raise self._explain(error) from error

    def _explain(self, error: OSError) -> StorageError:
        if isinstance(error, FileNotFoundError):
            return StorageError(
                f"there is no checkpoint at {self._path}; check the path"
            )
        return storage_error("read", self._path, error)


def _check_frame(file: BufferedReader, path: Path) -> int:
    """Judge the first bytes and the length; return the size."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(_FRAME_BYTES)
    begin = head[8:_DIGEST_AT]
    if len(head) <= 8:
        raise _damaged(path, f"it holds {size} bytes")
    wrong = sum(a != b for a, b in zip(begin, _SIGNATURE, strict=False))
    if wrong > len(begin) // 4:  # a damaged signature still resembles one
        raise ForeignCheckpointError(
            f"{path} is no castwise checkpoint{_guess(head)}; choose a file that "
            "castwise wrote"
        )
    promised = head[_SIZE_AT:]
    if wrong or (len(head) == _FRAME_BYTES and not promised.isdigit()):
        raise _damaged(path, "its first bytes were altered")
    if len(head) < _FRAME_BYTES or size < int(promised):
        whole = f" of {int(promised)}" if len(head) == _FRAME_BYTES else ""
        raise _damaged(path, f"it was truncated to {size}{whole} bytes")
    if size > int(promised):
        raise _damaged(path, f"{size - int(promised)} bytes were appended to it")
    return size


def _check_digest(file: BufferedReader, path: Path) -> None:
    """Hash the whole file, with zeros for the digest itself."""
    file.seek(0)
    head = bytearray(file.read(_FRAME_BYTES))
    promised = bytes(head[_DIGEST_AT : _DIGEST_AT + 64])
    head[_DIGEST_AT : _DIGEST_AT + 64] = b"0" * 64
    digest = hashlib.sha256(head)
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    if digest.hexdigest().encode() != promised:
        raise _damaged(path, "its bytes do not match their digest")


def _read_header(file: BufferedReader, path: Path) -> tuple[dict[str, Any], int]:
    """Parse the header; return it with the place where the data begin."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > os.fstat(file.fileno()).st_size - 8:
        raise _damaged(path, "its header is longer than the file")
    try:
        header = json.loads(file.read(length))
        if not isinstance(header["__metadata__"], dict):
            raise TypeError("metadata are an object")
    except _STRANGE as error:
        raise _malformed(path) from error
    return header, 8 + length


def _facts(header: dict[str, Any], path: Path, size: int) -> CheckpointFacts:
    try:
        metadata = header["__metadata__"]
        version = int(metadata["version"])
        if version > VERSION:
            raise NewerCheckpointError(
                f"{path} was written in version {version} of the checkpoint format, "
                f"this castwise reads up to {VERSION}; update castwise"
            )
        return CheckpointFacts(
            path=path,
            kind=str(metadata["kind"]),
            version=version,
            label=dict(json.loads(metadata["label"])),
            file_bytes=size,
        )
    except _STRANGE as error:
        raise _malformed(path) from error


def _guess(head: bytes) -> str:
    """Say what a foreign file looks like."""
    if head.startswith(b"PK"):
        return " (it looks like a zip archive, as torch.save writes)"
    if head.startswith(b"\x80"):
        return " (it looks like a pickle, which castwise never loads)"
    if head[8:9] == b"{":
        return " (it looks like a safetensors file of another program)"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return " (it looks like text)"
    return ""


def _damaged(path: Path, how: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{path} is damaged: {how}; use an earlier checkpoint"
    )


def _malformed(path: Path) -> DamagedCheckpointError:
    return _damaged(path, "its header does not describe its contents")
