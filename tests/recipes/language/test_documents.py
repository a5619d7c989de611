"""Where text comes from, and what is kept apart."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from castwise.errors import DataError, MissingExtraError, StorageError
from castwise.recipes.language import documents
from castwise.recipes.language.documents import (
    PIECE_CHARS,
    cut,
    read_documents,
    reference_documents,
    split_documents,
)


def test_without_a_path_it_is_the_language_reference() -> None:
    """Some 80 topics, without any download."""
    found = read_documents(())
    assert found == reference_documents()
    assert len(found) > 60
    assert any("lambda" in text for text in found)


def test_a_document_is_on_one_side_whatever_stands_beside_it() -> None:
    """A hash of the text decides: order and neighbours do not matter."""
    texts = [f"text number {n}" for n in range(101)]
    whole = split_documents(texts, 0.3)
    turned = split_documents(texts[::-1], 0.3)
    part = split_documents(texts[:50], 0.3)
    assert set(whole.train) == set(turned.train)
    assert set(part.validation) == set(whole.validation) & set(texts[:50])
    assert not set(whole.train) & set(whole.validation)
    assert sorted((*whole.train, *whole.validation)) == sorted(texts)
    assert 15 < len(whole.validation) < 45


def test_a_text_that_occurs_twice_is_never_on_both_sides() -> None:
    """Copies follow each other."""
    found = split_documents([f"text {n % 7}" for n in range(70)], 0.5)
    assert not set(found.train) & set(found.validation)


def test_an_empty_side_is_refused() -> None:
    """One document cannot be split."""
    with pytest.raises(DataError, match="both sides"):
        split_documents(["only one"], 0.5)


def test_a_long_text_is_cut_at_blank_lines_and_loses_nothing() -> None:
    """Pieces put together are the text."""
    text = "\n\n".join(f"paragraph {n} " + "x" * 997 for n in range(300))
    pieces = cut(text)
    assert "".join(pieces) == text
    assert len(pieces) > 10
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])
    assert all(len(piece) >= PIECE_CHARS for piece in pieces[:-1])
    assert cut(text[:50_000]) == [text[:50_000]]


def test_files_folders_and_lines_of_json(tmp_path: Path) -> None:
    """Each in its own words."""
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.md").write_text("two")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    rows = [{"text": "three"}, {"text": "four", "score": 1}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_documents([tmp_path]) == ["one", "two", "three", "four"]
    assert read_documents([str(tmp_path / "b.md")]) == ["two"]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.txt", b"\xff\xfe", DataError, "needs to be UTF-8, and byte 0"),
        ("a.jsonl", b'{"text": "x"}\n{oops\n', DataError, r"a\.jsonl:2 is no JSON"),
        ("a.jsonl", b'{"body": "x"}\n', DataError, r"a\.jsonl:1 has no 'text'"),
        ("a.jsonl", b"[1]\n", DataError, "has no 'text'"),
    ],
)
def test_what_is_no_text_is_named(
    tmp_path: Path, name: str, content: bytes, error: type[Exception], message: str
) -> None:
    """File and line stand in the message."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        read_documents([tmp_path / name])


def test_missing_and_empty_places_are_named(tmp_path: Path) -> None:
    """Neither is silence."""
    with pytest.raises(StorageError, match="nowhere"):
        read_documents([tmp_path / "nowhere.txt"])
    with pytest.raises(StorageError, match="holds no text"):
        read_documents([tmp_path])


def test_a_dataset_needs_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names what to install."""
    (tmp_path / "data.parquet").write_bytes(b"")
    monkeypatch.setattr(documents.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match="pip install datasets"):
        read_documents([tmp_path])


def test_a_dataset_is_read_by_builders_that_run_no_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the reading functions of the package are called, file by file."""

    class Dataset:
        @staticmethod
        def from_parquet(path: str) -> list[dict[str, Any]]:
            return [{"text": f"row of {Path(path).name}"}]

        @staticmethod
        def from_file(path: str) -> list[dict[str, Any]]:
            return [{"text": f"arrow of {Path(path).name}"}]

    package = types.ModuleType("datasets")
    package.Dataset = Dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)
    monkeypatch.setattr(documents.importlib.util, "find_spec", lambda _: True)
    (tmp_path / "b.arrow").write_bytes(b"")
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "script.py").write_text("raise SystemExit('this was run')")
    assert read_documents([tmp_path]) == ["row of a.parquet", "arrow of b.arrow"]
