"""The folder of one run: where its checkpoints, journal and report stand.

    runs/kenken/001/
        checkpoints/        the last k and the best
        metrics.jsonl       every line of evidence, and TensorBoard events beside it
        report.html         written at the end, with report.json

Without `--out` every run gets the next free number, so that nothing is overwritten; a
folder that already holds a run is only entered with `--resume`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from castwise.errors import CheckpointError, SettingsError, StorageError


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """Paths of one run."""

    path: Path
    """The folder itself; it exists and can be written."""

    resuming: bool
    """Whether a run stands in it that shall go on."""

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """The page written at the end."""
        return self.path / "report.html"


def newest_run(parent: Path) -> Path | None:
    """Return the highest-numbered run below `parent` that holds a checkpoint."""
    if not parent.is_dir():
        return None
    runs = [path for path in parent.iterdir() if _holds_checkpoints(path)]
    numbered = [path for path in runs if path.name.isdigit()]
    return max(numbered, key=lambda path: int(path.name), default=None)


def open_run_folder(
    *, out: Path | None, parent: Path, resume: bool, again: bool = False
) -> RunFolder:
    """Return a folder to write to, or the one to go on in.

    Args:
        out: The folder that the user named, or None for a numbered one below `parent`.
        parent: Where numbered runs stand, for example `runs/kenken`.
        resume: Whether to go on with the run that stands there.
        again: Whether the same command was started anew after it had been killed:
            goes on where there is a checkpoint, and begins anew where there is none
            (default: False).

    Raises:
        SettingsError: If `out` holds a run and `resume` was not asked for.
        CheckpointError: If `resume` was asked for and there is nothing to go on with.
        StorageError: If the folder cannot be made or written.
    """
    if again and out is not None:
        _make_writable(out)
        return RunFolder(path=out, resuming=_holds_checkpoints(out))
    if resume:
        path = out if out is not None else newest_run(parent)
        if path is None or not _holds_checkpoints(path):
            raise CheckpointError(
                f"--resume needs a run with a checkpoint, and {out or parent} holds "
                "none; start one without --resume."
            )
        _make_writable(path)
        return RunFolder(path=path, resuming=True)
    path = out if out is not None else _next_number(parent)
    if _holds_checkpoints(path) or (path / "metrics.jsonl").exists():
        raise SettingsError(
            f"{path} holds a run already; add --resume to go on with it, or name "
            "another folder with --out."
        )
    _make_writable(path)
    return RunFolder(path=path, resuming=False)


def _next_number(parent: Path) -> Path:
    taken = [0]
    if parent.is_dir():
        taken += [int(path.name) for path in parent.iterdir() if path.name.isdigit()]
    return parent / f"{max(taken) + 1:03d}"


def _holds_checkpoints(path: Path) -> bool:
    folder = path / "checkpoints"
    # What a killed writer left half begins with a dot.
    return folder.is_dir() and any(each.name[0] != "." for each in folder.iterdir())


def _make_writable(path: Path) -> None:
    """Make the folder and prove that a file can be written in it."""
    probe = path / ".writable"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"A run needs a folder that can be written, and {path} cannot be: "
            f"{error.strerror or error}; name another one with --out."
        ) from error
