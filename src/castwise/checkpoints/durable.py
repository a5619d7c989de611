"""A file that appears whole, or not at all, whenever the machine stops.

The recipe is the classical one: write a temporary file in the same folder, fsync it,
rename it over the target, fsync the folder. Rename within a folder is atomic, so a
reader sees the old file or the new one; the two fsyncs make that true of a power cut
too. A writer that was killed leaves its temporary behind, holding no lock;
`remove_stale_temporaries` knows it by that.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from castwise.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_REMEDIES = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some of your quota or choose another folder",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that is not read-only",
    errno.ENOENT: "create the folder first",
    errno.ENOTDIR: "a part of the path is a file, choose another folder",
    errno.EISDIR: "choose the name of a file, not of a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def storage_error(verb: str, path: Path, error: OSError) -> StorageError:
    """Turn the system's refusal to `verb` a path into one sentence with a remedy."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    remedy = _REMEDIES.get(error.errno or 0, "check the path and the disk")
    return StorageError(f"cannot {verb} {path}: {reason}; {remedy}")


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes the place of `path` only when it is complete.

    Args:
        path: The file to create or replace; its folder must exist.

    Yields:
        A binary file, writable and seekable.

    Raises:
        StorageError: The system refused; `path` is untouched, the temporary is gone.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        try:
            with temporary.open("xb") as file:
                with suppress(OSError):  # some network folders know no locks
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield file
                file.flush()
                os.fsync(file.fileno())
                # Inside the lock: nobody may take the finished temporary for stale.
                temporary.replace(target)
            sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error("write", target, error) from error


def remove_stale_temporaries(folder: Path) -> int:
    """Delete what killed writers left in a folder; return how many there were.

    The temporary of a living writer is locked, and stays.
    """
    removed = 0
    for temporary in folder.glob(".*.part"):
        with suppress(OSError), temporary.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink()
            removed += 1
    return removed


def sync_folder(folder: Path) -> None:
    """Make a rename or a removal in this folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise  # those two: the file system has no fsync for folders
    finally:
        os.close(descriptor)
