import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from castwise.checkpoints import CheckpointShelf, save_checkpoint
from castwise.errors import (
    DamagedCheckpointError,
    ForeignCheckpointError,
    SettingsError,
    StorageError,
)


def shelf_in(folder: Path, **settings: Any) -> CheckpointShelf:
    """Open a shelf below a folder."""
    return CheckpointShelf(folder=folder / "checkpoints", kind="run", **settings)


def steps(shelf: CheckpointShelf) -> list[int]:
    """List the steps that stay."""
    return sorted(int(path.stem.split("-step-")[1]) for path in shelf.paths())


def fill(shelf: CheckpointShelf, *scored: tuple[int, float | None]) -> None:
    """Save one checkpoint a step."""
    for step, score in scored:
        shelf.save(step, {"step": step, "w": torch.full((5,), step)}, score)


def test_the_last_k_and_the_best_stay(tmp_path: Path) -> None:
    """The best stays however old it is."""
    shelf = shelf_in(tmp_path, keep_last=2)
    fill(shelf, (10, 0.1), (20, 0.9), (30, 0.3), (40, 0.4), (50, 0.5))
    assert steps(shelf) == [20, 40, 50]
    best = shelf.best().value
    assert (best.step, best.score) == (20, 0.9)
    latest = shelf.latest()
    assert latest.value.tree["step"] == latest.value.step == 50
    assert latest.because == "the latest whole checkpoint"


def test_the_direction_of_best_is_stated(tmp_path: Path) -> None:
    """A loss is best when lowest; the earlier wins a tie; NaN is never best."""
    shelf = shelf_in(tmp_path, keep_last=1, best_is="lowest")
    fill(shelf, (1, float("nan")), (2, 0.2), (3, 0.2), (4, float("inf")), (5, None))
    assert shelf.best().value.step == 2
    assert steps(shelf) == [2, 5]


def test_an_empty_shelf_says_so(tmp_path: Path) -> None:
    """Nothing saved, or nothing judged: None, with the reason; no folder appears."""
    shelf = shelf_in(tmp_path)
    assert shelf.latest().value is None
    assert "holds no checkpoint" in shelf.latest().because
    assert not shelf.folder.exists()
    fill(shelf, (1, None))
    assert shelf.best().value is None


def test_latest_falls_back_to_the_newest_whole_checkpoint_and_says_so(
    tmp_path: Path,
) -> None:
    """Each damaged one that was passed over is named."""
    shelf = shelf_in(tmp_path)
    fill(shelf, (1, 0.1), (2, 0.2), (3, 0.3))
    three, two, _ = shelf.paths()
    three.write_bytes(three.read_bytes()[:-1])
    two.write_bytes(b"")
    found = shelf.latest()
    assert found.value.step == 1
    assert three.name in found.because
    assert two.name in found.because
    assert "truncated" in found.because
    assert shelf.best().value.step == 1


def test_a_shelf_without_a_whole_checkpoint_is_an_error(tmp_path: Path) -> None:
    """Starting afresh in silence would lose the run."""
    shelf = shelf_in(tmp_path)
    fill(shelf, (1, 0.1), (2, 0.2))
    for path in shelf.paths():
        path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(DamagedCheckpointError, match=r"0002-step-2.*0001-step-1"):
        shelf.latest()


def test_a_shelf_of_another_kind_is_refused(tmp_path: Path) -> None:
    """It is not damage, so nothing is passed over."""
    shelf = shelf_in(tmp_path)
    fill(shelf, (1, 0.1))
    save_checkpoint(shelf.folder / "0002-step-2.safetensors", {}, kind="other")
    with pytest.raises(ForeignCheckpointError, match="'other', need 'run'"):
        shelf.latest()


def test_a_run_that_went_back_is_not_overtaken_by_its_abandoned_future(
    tmp_path: Path,
) -> None:
    """Order of saving decides, not the step."""
    shelf = shelf_in(tmp_path, keep_last=2)
    fill(shelf, (100, None), (200, None), (50, None))
    assert shelf.latest().value.step == 50
    assert steps(shelf) == [50, 200]


def test_strangers_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    """Only names that the shelf gives are its own."""
    shelf = shelf_in(tmp_path, keep_last=1)
    fill(shelf, (1, None))
    notes = shelf.folder / "notes.txt"
    notes.write_text("mine")
    fill(shelf, (2, None), (3, None))
    assert notes.read_text() == "mine"
    assert steps(shelf) == [3]


def test_settings_are_checked(tmp_path: Path) -> None:
    """At construction, with the remedy."""
    with pytest.raises(SettingsError, match="at least 1, got 0"):
        shelf_in(tmp_path, keep_last=0)
    with pytest.raises(SettingsError, match="'highest' or 'lowest', got 'max'"):
        shelf_in(tmp_path, best_is="max")


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    """A file lies where the folder should."""
    (tmp_path / "checkpoints").write_text("x")
    shelf = shelf_in(tmp_path)
    with pytest.raises(StorageError, match="cannot create"):
        fill(shelf, (1, None))
    with pytest.raises(StorageError, match="cannot read"):
        shelf.latest()


WRITER = """
import sys, torch
from pathlib import Path
from castwise.checkpoints import CheckpointShelf
shelf = CheckpointShelf(folder=Path(sys.argv[1]), kind="run", keep_last=2)
found = shelf.latest()
step = found.value.step if found.value else 0
print("ready", flush=True)
while True:
    step += 1
    tree = {"step": step, "w": torch.full((50_000,), float(step))}
    shelf.save(step, tree, score=-abs(step - 40))
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_writer_killed_at_any_instant_loses_nothing_that_it_reported(
    tmp_path: Path,
) -> None:
    """SIGKILL at random times, again and again, in one folder."""
    chance = random.Random(11)
    shelf = CheckpointShelf(folder=tmp_path / "s", kind="run", keep_last=2)
    reported = 0
    for _ in range(12):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(shelf.folder)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert writer.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0, 0.25))
        writer.send_signal(signal.SIGKILL)
        out, _ = writer.communicate()
        reported = max([reported, *(int(n) for n in out.split())])
        found = shelf.latest()
        if reported:
            assert found.because == "the latest whole checkpoint"
            assert found.value.step in {reported, reported + 1}
            assert found.value.tree["step"] == found.value.step
            assert found.value.tree["w"].eq(found.value.step).all()
            assert shelf.best().value.score <= 0
    assert reported > 20
    (shelf.folder / ".0001-step-1.safetensors.abcd.part").write_text("half")
    fill(shelf, (reported + 2, None))
    assert [path for path in shelf.folder.iterdir() if path.suffix == ".part"] == []
    assert len(shelf.paths()) <= 3
