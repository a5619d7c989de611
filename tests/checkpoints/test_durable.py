import fcntl
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from castwise.checkpoints import replace_file, save_checkpoint
from castwise.checkpoints.durable import remove_stale_temporaries
from castwise.errors import StorageError


def names(folder: Path) -> list[str]:
    """List a folder."""
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_leaves_the_old_checkpoint_and_no_temporary(tmp_path: Path) -> None:
    """A real file system of 1 MB, filled by a checkpoint of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        path = save_checkpoint(disk / "c", {"w": torch.ones(100)}, kind="k")
        before = path.read_bytes()
        big = {"w": torch.ones(2**19)}
        with pytest.raises(StorageError, match=r"No space left on device; free some"):
            save_checkpoint(path, big, kind="k")
        assert path.read_bytes() == before
        assert names(disk) == ["c"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_size_limit_leaves_the_old_checkpoint_and_no_temporary(
    tmp_path: Path,
) -> None:
    """The same where nobody may mount: RLIMIT_FSIZE refuses the write."""
    path = save_checkpoint(tmp_path / "c", {"w": torch.ones(100)}, kind="k")
    before = path.read_bytes()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(StorageError, match="File too large"):
            save_checkpoint(path, {"w": torch.ones(2**19)}, kind="k")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert path.read_bytes() == before
    assert names(tmp_path) == ["c"]


def test_an_unwritable_folder_is_one_sentence(tmp_path: Path) -> None:
    """As an ordinary user, in a folder of somebody else."""
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    root = os.geteuid() == 0
    for parent in (tmp_path, *tmp_path.parents) if root else ():
        if parent.stat().st_uid == 0 and not parent.stat().st_mode & 1:
            parent.chmod(parent.stat().st_mode | 0o011)
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(StorageError, match="Permission denied; choose a folder"):
            save_checkpoint(folder / "c", {}, kind="k")
    finally:
        if root:
            os.seteuid(0)
    assert names(folder) == []


def test_impossible_paths_are_one_sentence_with_a_remedy(tmp_path: Path) -> None:
    """A missing folder, a file as folder, a folder as target, an endless name."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name, remedy in [
        ("missing/c", "create the folder first"),
        ("file/c", "a part of the path is a file"),
        ("folder", "choose the name of a file"),
        ("n" * 300, "choose a shorter name"),
    ]:
        with pytest.raises(StorageError, match=remedy):
            save_checkpoint(tmp_path / name, {}, kind="k")
    assert names(tmp_path) == ["file", "folder"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C in the middle: the old file stays, the temporary goes."""
    path = tmp_path / "f"
    path.write_text("old")

    def interrupt() -> None:
        with replace_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["f"]


def test_only_the_temporaries_of_dead_writers_are_stale(tmp_path: Path) -> None:
    """A temporary that somebody is writing is locked, and stays."""
    (tmp_path / ".c.1234.part").write_text("left behind")
    living = tmp_path / ".c.5678.part"
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert remove_stale_temporaries(tmp_path) == 1
    assert names(tmp_path) == [living.name]


def test_contents_are_durable_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fsync of the file, rename, fsync of the folder: a power cut finds all or none."""
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noting_fsync(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def noting_replace(self: Path, target: Path) -> Path:
        done.append(f"rename to {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "replace", noting_replace)
    save_checkpoint(tmp_path / "c", {"w": torch.ones(3)}, kind="k")
    temporary, rename, folder = done
    assert temporary.startswith(".c.")
    assert rename == "rename to c"
    assert folder == tmp_path.name
