import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from castwise.errors import CastwiseError, DataError, SettingsError, StorageError
from castwise.training.journal import Journal, read_journal


def journal_in(folder: Path) -> Journal:
    """Open a journal without the weight of TensorBoard."""
    return Journal(folder, tensorboard=False)


def steps(folder: Path) -> list[int]:
    """List the steps that a journal holds."""
    return [record.step for record in read_journal(folder)]


def test_lines_read_back_as_they_were_written(tmp_path: Path) -> None:
    """Numbers, texts, nothing, scalars of torch and numpy, lists, mappings."""
    values = {
        "loss": 1.25,
        "count": 3,
        "fine": True,
        "because": "overflow \u20ac \n",
        "parameter": None,
        "by_size": {4: [0.5, math.inf], "deep": {"nan": math.nan}},
    }
    with journal_in(tmp_path / "new" / "run") as journal:
        journal.write("train", 7, values)
        journal.write("epoch", 8, {"t": torch.tensor(2.5), "n": np.float32(0.5)})
    first, second = read_journal(tmp_path / "new" / "run")
    assert (first.event, first.step) == ("train", 7)
    assert math.isnan(first.values["by_size"]["deep"].pop("nan"))
    assert first.values == {**values, "by_size": {"4": [0.5, math.inf], "deep": {}}}
    assert second.values == {"t": 2.5, "n": 0.5}
    assert second.time >= first.time > 1.7e9


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    """Nan and the infinities are texts, since JSON has no words for them."""
    with journal_in(tmp_path) as journal:
        journal.write("train", 1, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    (line,) = journal.path.read_text().splitlines()
    found = json.loads(line, parse_constant=refuse)
    assert [found[name] for name in "abc"] == ["NaN", "Infinity", "-Infinity"]


def test_a_line_stands_on_disk_before_the_next_is_written(tmp_path: Path) -> None:
    """A process killed right after `write` has lost nothing."""
    code = (
        "import os, signal, sys; from castwise.training.journal import Journal\n"
        "j = Journal(sys.argv[1], tensorboard=False); j.write('train', 1, {'x': 2})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -9
    assert steps(tmp_path) == [1]


def test_a_rewound_journal_holds_no_step_twice(tmp_path: Path) -> None:
    """Killed at step 9 in the middle of a line, resumed from the checkpoint of 6."""
    with journal_in(tmp_path) as journal:
        for step in range(1, 10):
            journal.write("train", step, {"loss": 1 / step})
    with journal.path.open("ab") as file:
        file.write(b'{"event": "train", "step": 10, "ti')
    with journal_in(tmp_path) as again:
        again.rewind(6)
        for step in range(7, 12):
            again.write("train", step, {"loss": 1 / step})
    assert steps(tmp_path) == list(range(1, 12))


def test_a_rewind_in_use_goes_on_in_the_same_journal(tmp_path: Path) -> None:
    """No restart is needed; a journal without a file has nothing to rewind."""
    journal = journal_in(tmp_path)
    journal.rewind(5)
    assert not journal.path.exists()
    journal.write("train", 1, {})
    journal.write("train", 2, {})
    journal.rewind(1)
    journal.write("train", 2, {"again": 1})
    journal.close()
    assert steps(tmp_path) == [1, 2]


def test_a_half_written_line_is_cut_before_the_next(tmp_path: Path) -> None:
    """Even without a rewind the next line must not be glued to it."""
    journal = journal_in(tmp_path)
    journal.path.write_bytes(b'{"event": "a", "step": 1, "time": 1}\n{"eve')
    assert steps(tmp_path) == [1]
    journal.write("train", 2, {})
    journal.close()
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{}",
        "[]",
        "7",
        '{"event": "a", "step": "1", "time": 1}',
        '{"event": "a", "step": 1.5, "time": 1}',
        '{"event": 1, "step": 1, "time": 1}',
        '{"event": "a", "step": 1, "time": null}',
        '{"event": "a", "step": 1, "time": 1, "x": NaN}',
        '{"event": "a", "step": 1, "time": 1',
        "\x00\xff",
        "[" * 90000,
    ],
)
def test_a_damaged_line_is_refused_with_file_and_line(
    tmp_path: Path, line: str
) -> None:
    """Reading and rewinding alike; the file stays as it is."""
    path = tmp_path / "metrics.jsonl"
    good = '{"event": "a", "step": 1, "time": 1}\n'
    path.write_text(good + line + "\n" + good, encoding="latin-1")
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 is no line of a journal"):
        read_journal(path)
    with pytest.raises(DataError):
        journal_in(tmp_path).rewind(0)
    assert path.read_bytes() == before


@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_no_bytes_raise_anything_outside_the_tree(
    raw: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever stands in the file."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    path.write_bytes(raw)
    try:
        read_journal(path)
    except CastwiseError as error:
        assert "fuzzed.jsonl:" in str(error)  # noqa: PT017 -- most files are fine


def test_values_that_are_no_data_are_refused_by_name(tmp_path: Path) -> None:
    """Nothing is written for them."""
    journal = journal_in(tmp_path)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"x": torch.ones(3)}, r"got x of shape \(3,\)"),
        ({"x": {"y": object()}}, r"got x\.y of type object"),
        ({"step": 1}, "its own 'step'"),
    ]
    for values, message in bad:
        with pytest.raises(SettingsError, match=message):
            journal.write("train", 1, values)
    assert not journal.path.exists()


def test_storage_errors_are_one_sentence(tmp_path: Path) -> None:
    """A missing journal, a file in the way, a disk that takes no more."""
    with pytest.raises(StorageError, match="no journal at"):
        read_journal(tmp_path / "none.jsonl")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot write"):
        journal_in(tmp_path / "file").write("train", 1, {})
    journal = journal_in(tmp_path)
    journal.write("train", 1, {})
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, hard))
    try:
        with pytest.raises(StorageError, match="File too large"):
            journal.write("train", 2, {})  # a part of it still fits
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    journal.close()
    assert steps(tmp_path) == [1]


def test_tensorboard_sees_numbers_and_forgets_what_was_rewound(tmp_path: Path) -> None:
    """Events beside the lines; after a rewind to 4, the old steps 5 and 6 are gone."""
    with Journal(tmp_path) as journal:
        for step in range(1, 7):
            journal.write("train", step, {"loss": float(step), "because": "text"})
    with Journal(tmp_path) as journal:
        journal.rewind(4)
        for step in range(5, 8):
            journal.write("train", step, {"loss": 100.0 + step})
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    events = event_accumulator.EventAccumulator(os.fspath(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    assert found == {1: 1, 2: 2, 3: 3, 4: 4, 5: 105, 6: 106, 7: 107}
    assert len(events.Scalars("train/loss")) == 7


def test_importing_the_journal_does_not_load_tensorboard() -> None:
    """It takes over a second, and most commands never write an event."""
    code = (
        "import castwise.training.journal, sys; sys.exit('tensorboard' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
