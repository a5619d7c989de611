import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from castwise.checkpoints import (
    container,
    describe_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from castwise.errors import (
    CastwiseError,
    CheckpointError,
    DamagedCheckpointError,
    ForeignCheckpointError,
    NewerCheckpointError,
    StorageError,
)

TREE = {
    "step": 12,
    "model": {"w": torch.arange(15, dtype=torch.bfloat16).reshape(3, 5)},
    "odd": torch.arange(7, dtype=torch.uint8),
    "wide": torch.ones(2, dtype=torch.float64),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A whole one."""
    return save_checkpoint(tmp_path / "c.safetensors", TREE, kind="kenken run")


def refuse(path: Path, kind: str = "kenken run") -> CastwiseError:
    """Load what must be refused; return the error, one sentence."""
    with pytest.raises(CastwiseError) as caught:
        load_checkpoint(path, kind=kind)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return caught.value


def reseal(raw: bytes) -> bytes:
    """Give altered bytes a right digest, as a hostile writer would."""
    at = container._DIGEST_AT
    data = bytearray(raw)
    data[at : at + 64] = b"0" * 64
    data[at : at + 64] = hashlib.sha256(data).hexdigest().encode()
    return bytes(data)


def with_metadata(raw: bytes, **changes: str) -> bytes:
    """Rewrite metadata fields, sizes and digest consistently."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"].update(changes)
    body = json.dumps(header, separators=(",", ":")).encode()
    data = bytearray(len(body).to_bytes(8, "little") + body + raw[8 + length :])
    data[container._SIZE_AT : container._FRAME_BYTES] = b"%016d" % len(data)
    return reseal(bytes(data))


def test_any_safetensors_reader_finds_the_tensors(checkpoint: Path) -> None:
    """The file is plain safetensors: names are paths, formats are native."""
    with safe_open(checkpoint, framework="pt") as file:
        assert set(file.keys()) == {"model/w", "odd", "wide"}
        assert torch.equal(file.get_tensor("model/w"), TREE["model"]["w"])
        assert torch.equal(file.get_tensor("odd"), TREE["odd"])
        assert file.metadata()["kind"] == "kenken run"


def test_a_header_can_be_described_without_reading_tensors(tmp_path: Path) -> None:
    """Kind, version, label and size."""
    path = save_checkpoint(
        tmp_path / "c", TREE, kind="k", label={"step": 3, "score": None, "x": "y"}
    )
    facts = describe_checkpoint(path)
    assert (facts.kind, facts.version) == ("k", 1)
    assert facts.label == {"step": 3, "score": None, "x": "y"}
    assert facts.file_bytes == path.stat().st_size


def test_a_file_cut_at_any_byte_is_refused(checkpoint: Path) -> None:
    """Every prefix, the empty one included."""
    raw = checkpoint.read_bytes()
    for length in range(len(raw)):
        checkpoint.write_bytes(raw[:length])
        assert isinstance(refuse(checkpoint), DamagedCheckpointError), length


def test_a_flipped_bit_anywhere_is_refused(checkpoint: Path) -> None:
    """Length, signature, digest, header, padding and data: every byte, one bit."""
    raw = checkpoint.read_bytes()
    chance = random.Random(3)
    for place in range(len(raw)):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << chance.randrange(8)
        checkpoint.write_bytes(damaged)
        assert isinstance(refuse(checkpoint), DamagedCheckpointError), place


def test_appended_bytes_are_refused(checkpoint: Path) -> None:
    """A file that is longer than written is not what was written."""
    checkpoint.write_bytes(checkpoint.read_bytes() + b"more")
    assert "4 bytes were appended" in str(refuse(checkpoint))


def test_a_zeroed_file_of_the_right_size_is_refused(checkpoint: Path) -> None:
    """What some file systems leave after a power cut."""
    checkpoint.write_bytes(bytes(checkpoint.stat().st_size))
    refuse(checkpoint)


def test_foreign_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    """torch.save, a pickle, other people's safetensors, text, noise."""
    path = tmp_path / "foreign"
    torch.save({"w": torch.ones(300)}, path)
    assert "zip archive" in str(refuse(path))
    torch.save({"w": torch.ones(300)}, path, _use_new_zipfile_serialization=False)
    assert "pickle" in str(refuse(path))
    save_file({"w": torch.ones(300)}, path)
    assert "safetensors file of another program" in str(refuse(path))
    path.write_text("a recipe for bread, flour and water\n" * 9)
    assert "looks like text" in str(refuse(path))
    for seed in range(50):
        path.write_bytes(random.Random(seed).randbytes(300))
        assert isinstance(refuse(path), ForeignCheckpointError)


def test_a_pickle_in_the_place_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    """Loading must not execute code; the file would create a witness."""
    witness = tmp_path / "witness"

    class Bomb:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(witness),))

    for zipped in (True, False):
        path = tmp_path / "bomb"
        torch.save(Bomb(), path, _use_new_zipfile_serialization=zipped)
        assert isinstance(refuse(path), ForeignCheckpointError)
    assert not witness.exists()


def test_folders_missing_files_and_pipes_are_refused(tmp_path: Path) -> None:
    """None of them is read, and the pipe does not make us wait."""
    assert isinstance(refuse(tmp_path), StorageError)
    missing = refuse(tmp_path / "missing")
    assert "there is no checkpoint" in str(missing)
    assert isinstance(missing, StorageError)
    os.mkfifo(tmp_path / "pipe")
    assert isinstance(refuse(tmp_path / "pipe"), StorageError)
    (tmp_path / "file").write_text("x")
    assert isinstance(refuse(tmp_path / "file" / "below"), StorageError)


def test_another_kind_is_refused_with_both_names(checkpoint: Path) -> None:
    """A KenKen model is no language model."""
    error = refuse(checkpoint, kind="soliton run")
    assert isinstance(error, ForeignCheckpointError)
    assert "'kenken run'" in str(error)
    assert "'soliton run'" in str(error)


def test_a_newer_version_is_refused_with_the_remedy(checkpoint: Path) -> None:
    """A whole file of version 2: update castwise."""
    checkpoint.write_bytes(with_metadata(checkpoint.read_bytes(), version="2"))
    error = refuse(checkpoint)
    assert isinstance(error, NewerCheckpointError)
    assert "update castwise" in str(error)


@pytest.mark.parametrize(
    "tree",
    [
        '{"tensor":["nowhere","float32",[3]]}',
        '{"tensor":["odd","float32",[3]]}',
        '{"tensor":["odd","float99",[7]]}',
        '{"tensor":["odd","uint8",[8]]}',
        '{"tensor":["odd","uint8",[-1,-1]]}',
        '{"ndarray":["odd","O",[1]]}',
        '{"ndarray":["odd","not a dtype",[1]]}',
        '{"__class__":1}',
        '{"float":"00"}',
        '{"int":"0xzz"}',
        '{"dict":[[[],1]]}',
        '{"dict":7}',
        '{"a":1,"b":2}',
        "{}",
        "[" * 50000,
        "no json",
    ],
)
def test_a_sealed_but_senseless_tree_is_refused(checkpoint: Path, tree: Any) -> None:
    """A right digest does not make a header true; nothing escapes the tree."""
    checkpoint.write_bytes(with_metadata(checkpoint.read_bytes(), tree=tree))
    assert isinstance(refuse(checkpoint), DamagedCheckpointError)


@pytest.mark.parametrize("field", ["version", "label", "kind", "tree"])
def test_a_sealed_header_without_a_field_is_refused(
    checkpoint: Path, field: str
) -> None:
    """Every field of the metadata is needed."""
    raw = checkpoint.read_bytes()
    checkpoint.write_bytes(
        reseal(raw.replace(f'"{field}":'.encode(), f'"{field[:-1]}_":'.encode()))
    )
    assert isinstance(refuse(checkpoint), DamagedCheckpointError)


def test_offsets_outside_of_the_file_are_refused_before_memory_is_taken(
    checkpoint: Path,
) -> None:
    """A header that promises a terabyte is no reason to allocate one."""
    raw = checkpoint.read_bytes()
    assert b'"data_offsets":[46,53]' in raw
    raw = raw.replace(b'"data_offsets":[46,53]', b'"data_offsets":[46,5e9]')
    checkpoint.write_bytes(reseal(raw))
    assert isinstance(refuse(checkpoint), DamagedCheckpointError)
    raw = raw.replace(b"5e9]}", b"9" * 3 + b"]}").replace(b'"odd"', b'"odd"')
    checkpoint.write_bytes(reseal(raw))
    assert isinstance(refuse(checkpoint), DamagedCheckpointError)


def test_a_value_that_cannot_be_stored_leaves_the_old_file(checkpoint: Path) -> None:
    """The tree is judged before the file is touched."""
    before = checkpoint.read_bytes()
    with pytest.raises(CheckpointError, match="needs a kind"):
        save_checkpoint(checkpoint, TREE, kind="")
    with pytest.raises(CheckpointError):
        save_checkpoint(checkpoint, {"x": object()}, kind="k")
    assert checkpoint.read_bytes() == before
    assert os.listdir(checkpoint.parent) == [checkpoint.name]  # noqa: PTH208
