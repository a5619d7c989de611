from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from castwise.checkpoints import CheckpointShelf
from castwise.checkpoints.parts import (
    INDEX,
    load_parts,
    remove_folder,
    remove_stale_folders,
)
from castwise.errors import DamagedCheckpointError, ForeignCheckpointError

KIND = "resharded"
SCRIPT = Path(__file__).with_name("resharded_run.py")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> CheckpointShelf:
    """What four processes left, after they found that all comes back."""
    folder = tmp_path_factory.mktemp("shelf")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    found = subprocess.run(
        [*torchrun, "--nproc-per-node", "4", str(SCRIPT), str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr
    assert "the same" in found.stdout
    return CheckpointShelf(folder=folder, kind=KIND)


def copied(shelf: CheckpointShelf, tmp_path: Path) -> CheckpointShelf:
    """The same shelf, to be damaged."""
    folder = shutil.copytree(shelf.folder, tmp_path / "copy")
    return CheckpointShelf(folder=folder, kind=KIND, keep_last=1)


@pytest.mark.slow
def test_what_some_ranks_saved_others_load(shelf: CheckpointShelf) -> None:
    """Two to four, four to two and to one: see `resharded_run.py`.

    int16 remainders, moments in 8 bits with their scales, fp8, complex numbers and NaN,
    and a save under way that does not see the next update.
    """
    latest, best = shelf.latest().value, shelf.best().value
    assert latest is not None
    assert best is not None
    assert (latest.step, best.step, best.score) == (4, 3, 0.5)
    assert latest.tree["plain"]["text"] == "x"
    assert [path.name for path in shelf.paths()] == [
        "0002-step-4.sharded",
        "0001-step-3.sharded",
    ]


@pytest.mark.slow
def test_a_damaged_folder_is_passed_over(
    shelf: CheckpointShelf, tmp_path: Path
) -> None:
    """A flipped bit, a part of another checkpoint, a part or the index missing."""
    ours = copied(shelf, tmp_path)
    latest, before = ours.paths()
    part = latest / "part-00001.safetensors"
    whole = part.read_bytes()

    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    found = ours.latest()
    assert found.value is not None
    assert found.value.step == 3
    assert "do not match their digest" in found.because
    shutil.copy(before / part.name, part)
    with pytest.raises(DamagedCheckpointError, match=r"lacks|another checkpoint"):
        load_parts(latest, kind=KIND)
    part.unlink()
    assert f"lacks {part.name}" in ours.latest().because
    part.write_bytes(whole)
    with pytest.raises(ForeignCheckpointError, match="need 'other'"):
        load_parts(latest, kind="other")
    (latest / INDEX).unlink()
    assert "has no index" in ours.latest().because


@pytest.mark.slow
def test_no_file_of_a_folder_is_a_pickle(shelf: CheckpointShelf) -> None:
    """Nothing that stands in it can run: safetensors of plain tensors, and JSON."""
    files = sorted(shelf.paths()[0].iterdir())
    assert [path.name for path in files] == [
        INDEX,
        *(f"part-{rank:05d}.safetensors" for rank in range(4)),
    ]
    for path in files:
        with safe_open(path, framework="np") as opened:
            assert opened.metadata()["castwise"] == "checkpoint"


@pytest.mark.slow
def test_half_a_folder_is_never_read(shelf: CheckpointShelf, tmp_path: Path) -> None:
    """What a killed run left has a dot, and goes with the next save."""
    ours = copied(shelf, tmp_path)
    latest, before = ours.paths()
    half = ours.folder / f".{latest.name}.part"
    shutil.copytree(latest, half)
    assert half not in ours.paths()
    remove_stale_folders(ours.folder)
    assert not half.exists()
    remove_folder(before)
    assert list(ours.folder.iterdir()) == [latest]
    assert ours.next_folder(9).name == "0003-step-9.sharded"
