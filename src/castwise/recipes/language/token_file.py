"""Tokens on disk, mapped into memory, and packed into windows of one length.

All documents of a side stand one behind the other, each with its end token, in one
`.npy` file of the narrowest unsigned integer that holds the vocabulary. No process
reads it whole: a batch touches the pages of its windows.

Packing: pass e over the file starts at an offset drawn for it, cuts windows of
`length + 1` tokens without gaps, and visits them in an order drawn for it. Inputs are
all tokens of a window but the last, targets all but the first. A window may hold the
end of one document and the beginning of the next; nothing is padded.

    batch = packing.batch(step)      # a pure function of seed and step
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from castwise.checkpoints.durable import replace_file, storage_error
from castwise.errors import DataError

if TYPE_CHECKING:
    from castwise.distributed.ranks import Ranks
    from castwise.recipes.language.tokenizer import Tokenizer

Stream = NDArray[np.unsignedinteger]


def write_token_file(
    path: Path, documents: Iterable[str], tokenizer: Tokenizer
) -> tuple[int, str]:
    """Write the tokens of documents, whole or not at all.

    Returns:
        How many tokens there are, and the SHA-256 of the file.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    parts = [np.append(tokenizer.encode(text), tokenizer.end) for text in documents]
    stream = np.concatenate(parts).astype(np.min_scalar_type(tokenizer.vocab_size - 1))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as file:
            np.lib.format.write_array(file, stream, allow_pickle=False)
    except OSError as error:
        raise storage_error("write", path, error) from error
    return len(stream), digest_of(path)


def open_token_file(path: Path) -> Stream:
    """Map a token file into memory.

    Raises:
        DataError: It is damaged.
        StorageError: It cannot be read.
    """
    try:
        stream: Stream = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise storage_error("read", path, error) from error
    except (ValueError, EOFError) as error:
        raise DataError(
            f"{path} is no token file: {error}; remove it, and it is made anew"
        ) from error
    if stream.ndim != 1 or stream.dtype.kind != "u":
        raise DataError(
            f"{path} needs one row of unsigned integers, got {stream.dtype} of shape "
            f"{stream.shape}; remove it, and it is made anew"
        )
    return stream


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        StorageError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise storage_error("read", path, error) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """Inputs and targets, both `[B, T]`, int64."""

    tokens: Tensor
    """What the model sees."""

    targets: Tensor
    """The token after each of them."""

    def part(self, ranks: Ranks) -> TokenBatch:
        """Keep the windows of one process; a run refuses parts that are not equal."""
        own = ranks.part(len(self.tokens))
        return TokenBatch(tokens=self.tokens[own], targets=self.targets[own])

    def to(self, device: torch.device) -> TokenBatch:
        """Return it on a device."""
        return TokenBatch(
            tokens=self.tokens.to(device), targets=self.targets.to(device)
        )


class Packing:
    """Windows of a stream of tokens, in an order that a seed draws.

    Args:
        stream: All tokens.
        length: Tokens of an input.
        batch_size: Windows of a batch.
        seed: Of offsets and orders.

    Raises:
        DataError: The stream is too short for one batch.
    """

    def __init__(
        self, stream: Stream, *, length: int, batch_size: int, seed: int = 0
    ) -> None:
        # one length is kept free, so that every offset leaves as many windows
        self._num_windows = (len(stream) - length - 1) // length
        if self._num_windows < batch_size:
            raise DataError(
                f"a batch of {batch_size} windows of {length} tokens needs at least "
                f"{(batch_size + 1) * length + 1} tokens, got {len(stream)}; give more "
                "text, shorter windows or smaller batches"
            )
        self._stream, self._length = stream, length
        self._batch_size, self._seed = batch_size, seed
        self._pass: tuple[int, int, NDArray[np.int64]] | None = None

    @property
    def batches_per_pass(self) -> int:
        """How many batches a pass over the text has; the rest of it is left out."""
        return self._num_windows // self._batch_size

    def batch(self, step: int) -> TokenBatch:
        """Return the batch of a step."""
        number, place = divmod(step, self.batches_per_pass)
        offset, order = self._order(number)
        chosen = order[place * self._batch_size : (place + 1) * self._batch_size]
        return self._gather(offset + chosen * self._length)

    def in_order(self, num_windows: int) -> list[TokenBatch]:
        """Return the first windows of the text in batches, for measuring."""
        starts = np.arange(min(num_windows, self._num_windows)) * self._length
        size = self._batch_size
        return [
            self._gather(starts[at : at + size]) for at in range(0, len(starts), size)
        ]

    def _order(self, number: int) -> tuple[int, NDArray[np.int64]]:
        if self._pass is None or self._pass[0] != number:
            drawn = np.random.default_rng((self._seed, number))
            offset = int(drawn.integers(self._length))
            self._pass = (number, offset, drawn.permutation(self._num_windows))
        return self._pass[1:]

    def _gather(self, starts: NDArray[np.int64]) -> TokenBatch:
        windows = np.stack([self._stream[s : s + self._length + 1] for s in starts])
        both = torch.from_numpy(windows.astype(np.int64))
        return TokenBatch(tokens=both[:, :-1], targets=both[:, 1:])
