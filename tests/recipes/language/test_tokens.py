"""Tokenizers, token files, packing, and the supply that keeps them."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from castwise.errors import DataError, MissingExtraError, SettingsError, StorageError
from castwise.recipes.language import tokenizer as room
from castwise.recipes.language.settings import TextSettings
from castwise.recipes.language.supply import open_supply
from castwise.recipes.language.token_file import (
    Packing,
    open_token_file,
    write_token_file,
)
from castwise.recipes.language.tokenizer import (
    ByteTokenizer,
    PairTokenizer,
    Tokenizer,
    learn_tokenizer,
    tokenizer_of,
)

TEXTS = ["plain text", "Zeilen\nund Umlaute äöü", "数字 <end> of it", "", "\x00\x7f"]

needs_tokenizers = pytest.mark.skipif(
    importlib.util.find_spec("tokenizers") is None, reason="tokenizers is missing"
)


def tokenizers() -> list[Tokenizer]:
    """Both kinds, where the package is there."""
    found: list[Tokenizer] = [ByteTokenizer()]
    if importlib.util.find_spec("tokenizers") is not None:
        found.append(PairTokenizer.learn(["some text to learn " * 40], 300))
    return found


@pytest.mark.parametrize("tokenizer", tokenizers(), ids=lambda t: type(t).__name__)
def test_what_is_encoded_comes_back(tokenizer: Tokenizer) -> None:
    """No text is lost, none spells the end, and a description is enough."""
    again = tokenizer_of(tokenizer.describe())
    assert again.digest == tokenizer.digest
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert again.decode(ids.tolist()) == text
        assert tokenizer.end not in ids
        assert ids.tolist() == again.encode(text).tolist()
        assert all(0 <= one < tokenizer.vocab_size for one in ids)


@needs_tokenizers
def test_byte_pairs_are_learned_from_the_text() -> None:
    """The same text gives the same pairs, and fewer tokens than bytes."""
    text = "the cat and the hat and the bat " * 30
    first = learn_tokenizer("bpe", [text], 300)
    second = learn_tokenizer("bpe", [text], 300)
    assert first.digest == second.digest
    assert first.vocab_size <= 300
    assert len(first.encode(text)) < len(text) / 2


def test_a_missing_package_and_unknown_kinds_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the remedy."""
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match="pip install tokenizers"):
        learn_tokenizer("bpe", ["x"], 300)
    with pytest.raises(SettingsError, match="bytes, bpe"):
        learn_tokenizer("words", ["x"], 300)
    with pytest.raises(DataError, match="bytes, bpe"):
        tokenizer_of({"kind": "words"})


@needs_tokenizers
def test_a_damaged_description_is_refused() -> None:
    """It is data of a stranger."""
    with pytest.raises(DataError, match="JSON of the package"):
        tokenizer_of({"kind": "bpe", "json": "{"})


def test_a_token_file_holds_every_document_and_its_end(tmp_path: Path) -> None:
    """In the narrowest format, mapped and not read."""
    num, digest = write_token_file(tmp_path / "x.npy", ["ab", "c"], ByteTokenizer())
    stream = open_token_file(tmp_path / "x.npy")
    assert stream.tolist() == [97, 98, 256, 99, 256]
    assert (num, stream.dtype, len(digest)) == (5, np.uint16, 64)
    assert isinstance(stream, np.memmap)


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00"])
def test_a_damaged_token_file_is_refused(tmp_path: Path, content: bytes) -> None:
    """No traceback, no pickle."""
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises((DataError, StorageError)):
        open_token_file(tmp_path / "x.npy")


def test_pickled_arrays_are_never_loaded(tmp_path: Path) -> None:
    """A token file is data alone."""
    np.save(tmp_path / "x.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="no token file"):
        open_token_file(tmp_path / "x.npy")


def stream(num: int) -> np.ndarray:
    """Return tokens that are their own places."""
    return np.arange(num, dtype=np.uint16)


def test_a_pass_visits_every_window_once_and_targets_follow_inputs() -> None:
    """Windows share no token as input, and the next token is the target."""
    packing = Packing(stream(1000), length=7, batch_size=4, seed=5)
    seen: Counter[int] = Counter()
    for step in range(packing.batches_per_pass):
        batch = packing.batch(step)
        assert batch.tokens.shape == batch.targets.shape == (4, 7)
        assert torch.equal(batch.tokens + 1, batch.targets)
        seen.update(batch.tokens.flatten().tolist())
    assert set(seen.values()) == {1}
    assert len(seen) > 0.97 * 1000


def test_a_batch_is_a_function_of_seed_and_step_alone() -> None:
    """In any order, in any process."""
    one = Packing(stream(500), length=5, batch_size=3, seed=1)
    two = Packing(stream(500), length=5, batch_size=3, seed=1)
    other = Packing(stream(500), length=5, batch_size=3, seed=2)
    steps = [0, 70, 3, 32, 33, 70]
    rows = {step: one.batch(step).tokens for step in steps}
    for step in reversed(steps):
        assert torch.equal(rows[step], two.batch(step).tokens)
    assert not torch.equal(rows[0], other.batch(0).tokens)
    assert not torch.equal(rows[0], one.batch(one.batches_per_pass).tokens)


def test_batches_for_measuring_come_in_order() -> None:
    """The first windows, without a draw."""
    found = Packing(stream(100), length=9, batch_size=4).in_order(6)
    assert [len(batch.tokens) for batch in found] == [4, 2]
    assert found[0].tokens[:, 0].tolist() == [0, 9, 18, 27]


def test_a_text_that_is_too_short_is_told_by_how_much() -> None:
    """Need, got, remedy."""
    with pytest.raises(DataError, match="at least 51 tokens, got 50"):
        Packing(stream(50), length=10, batch_size=4)
    Packing(stream(51), length=10, batch_size=4)


def test_a_supply_is_made_once_and_shared(tmp_path: Path) -> None:
    """The second opening writes nothing; a damaged file is made anew."""
    settings = TextSettings()
    first = open_supply(settings, tmp_path)
    files = sorted(tmp_path.rglob("*.npy"))
    assert len(files) == 2
    times = [path.stat().st_mtime_ns for path in files]
    second = open_supply(settings, tmp_path)
    assert [path.stat().st_mtime_ns for path in files] == times
    assert second.digests == first.digests
    assert first.bytes_per_token == pytest.approx(1.0, abs=0.01)
    files[0].write_bytes(files[0].read_bytes()[:-1] + b"\x01")
    third = open_supply(settings, tmp_path)
    assert third.digests == first.digests
    assert np.array_equal(third.train, second.train)


def test_another_split_is_another_supply(tmp_path: Path) -> None:
    """No run meets the tokens of other settings."""
    open_supply(TextSettings(), tmp_path)
    open_supply(TextSettings(validation_share=0.2), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
