"""The folder of one run."""

from __future__ import annotations

from pathlib import Path

import pytest

from castwise.errors import CheckpointError, SettingsError, StorageError
from castwise.training.run_folder import newest_run, open_run_folder


def with_checkpoint(path: Path) -> Path:
    """Make a folder look like a run."""
    (path / "checkpoints").mkdir(parents=True)
    (path / "checkpoints" / "step-1.safetensors").write_bytes(b"x")
    return path


def test_runs_are_numbered_and_never_overwritten(tmp_path: Path) -> None:
    """Without --out each run gets the next number."""
    first = open_run_folder(out=None, parent=tmp_path, resume=False)
    second = open_run_folder(out=None, parent=tmp_path, resume=False)
    assert [first.path.name, second.path.name] == ["001", "002"]


def test_resume_takes_the_newest_run_with_a_checkpoint(tmp_path: Path) -> None:
    """An empty newer folder does not hide the run that can go on."""
    with_checkpoint(tmp_path / "009")
    with_checkpoint(tmp_path / "010")
    (tmp_path / "011").mkdir()
    folder = open_run_folder(out=None, parent=tmp_path, resume=True)
    assert folder.path == newest_run(tmp_path) == tmp_path / "010"
    assert folder.resuming


def test_a_named_folder_that_holds_a_run_is_not_entered(tmp_path: Path) -> None:
    """The remedy is named."""
    with_checkpoint(tmp_path / "mine")
    with pytest.raises(SettingsError, match="--resume"):
        open_run_folder(out=tmp_path / "mine", parent=tmp_path, resume=False)


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    """Both for a named folder and for none."""
    for out in (None, tmp_path / "mine"):
        with pytest.raises(CheckpointError, match="holds none"):
            open_run_folder(out=out, parent=tmp_path / "runs", resume=True)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    """A file stands where the folder should be."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be"):
        open_run_folder(out=tmp_path / "file" / "run", parent=tmp_path, resume=False)
