"""Text to tokens and back: bytes, or byte pairs learned from the training text.

    bytes    256 bytes and an end of document; needs nothing and loses nothing
    bpe      byte-level byte pairs (Sennrich et al. 2016, arXiv 1508.07909), learned on
             the spot by the package tokenizers; needs it for reading as well

A tokenizer describes itself as plain data that stands in the checkpoint, so that a
model is sampled from without the text that it was trained on.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from castwise.errors import DataError, MissingExtraError, SettingsError

KINDS = ("bytes", "bpe")
_NUM_BYTES = 256
_END = "<end>"

Ids = NDArray[np.int64]


class Tokenizer(ABC):
    """The seam between text and model."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """How many tokens there are, the end of document included."""

    @property
    @abstractmethod
    def end(self) -> int:
        """The token after every document."""

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """Return the tokens of a text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens; what is no UTF-8 becomes a replacement mark."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return plain data from which `tokenizer_of` makes the same tokenizer."""

    @property
    def digest(self) -> str:
        """SHA-256 of the description."""
        text = json.dumps(self.describe(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@final
class ByteTokenizer(Tokenizer):
    """Bytes of UTF-8, and one more token for the end of a document."""

    @property
    def vocab_size(self) -> int:
        """Return 257."""
        return _NUM_BYTES + 1

    @property
    def end(self) -> int:
        """Return 256."""
        return _NUM_BYTES

    def encode(self, text: str) -> Ids:
        """Return one token per byte."""
        raw = text.encode("utf-8", "surrogatepass")
        return np.frombuffer(raw, dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text, ends of documents left out."""
        return bytes(i for i in ids if i < _NUM_BYTES).decode("utf-8", "replace")

    def describe(self) -> dict[str, Any]:
        """Return its kind, which says everything."""
        return {"kind": "bytes"}


@final
class PairTokenizer(Tokenizer):
    """Byte-level byte pairs.

    Args:
        text: JSON as the package tokenizers writes it.
    """

    def __init__(self, text: str) -> None:
        try:
            self._inner: Any = _package().Tokenizer.from_str(text)
        except MissingExtraError:
            raise
        except Exception as error:  # the package raises bare Exception
            raise DataError(
                f"a tokenizer needs JSON of the package tokenizers: {error}"
            ) from error
        self._text = text

    @classmethod
    def learn(cls, documents: Iterable[str], vocab_size: int) -> PairTokenizer:
        """Learn the pairs of some documents.

        Raises:
            MissingExtraError: The package is not installed.
        """
        package = _package()
        inner = package.Tokenizer(package.models.BPE())
        inner.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = package.decoders.ByteLevel()
        trainer = package.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[_END],
            initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(documents, trainer)
        return cls(inner.to_str())

    @property
    def vocab_size(self) -> int:
        """Return how many tokens were learned; fewer than asked in a small text."""
        return int(self._inner.get_vocab_size())

    @property
    def end(self) -> int:
        """Return the token after every document."""
        return int(self._inner.token_to_id(_END))

    def encode(self, text: str) -> Ids:
        """Return the tokens; a text that spells the end is no end."""
        parts = text.split(_END)
        ids = [self._inner.encode(part).ids for part in parts[:1]]
        for part in parts[1:]:  # the marker in the text itself, as its characters
            ids += [self._inner.encode(_END[:2]).ids, self._inner.encode(_END[2:]).ids]
            ids.append(self._inner.encode(part).ids)
        return np.asarray([i for each in ids for i in each], dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text, ends of documents left out."""
        return str(self._inner.decode([int(i) for i in ids if i != self.end]))

    def describe(self) -> dict[str, Any]:
        """Return the JSON of the package."""
        return {"kind": "bpe", "json": self._text}


def learn_tokenizer(kind: str, documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return a tokenizer that was learned from documents.

    Raises:
        SettingsError: The kind is unknown.
        MissingExtraError: Its package is not installed.
    """
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "bpe":
        return PairTokenizer.learn(documents, vocab_size)
    raise SettingsError(
        f"text.tokenizer needs one of {', '.join(KINDS)}, got {kind!r}; name one"
    )


def tokenizer_of(description: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer that described itself so.

    Raises:
        DataError: It is no description of a tokenizer.
        MissingExtraError: Its package is not installed.
    """
    kind = description.get("kind")
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "bpe":
        return PairTokenizer(str(description.get("json")))
    raise DataError(f"a tokenizer is one of {', '.join(KINDS)}, got {kind!r}")


def _package() -> Any:
    if importlib.util.find_spec("tokenizers") is None:
        raise MissingExtraError(
            "the tokenizer bpe needs the package tokenizers, which is not installed; "
            "run `pip install tokenizers`, or set text.tokenizer to bytes"
        )
    package: Any = importlib.import_module("tokenizers")
    for name in ("models", "pre_tokenizers", "decoders", "trainers"):
        importlib.import_module(f"tokenizers.{name}")
    return package
