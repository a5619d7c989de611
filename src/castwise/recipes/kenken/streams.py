"""Random numbers without state: a value is a function of what it is for.

    key  = fold(fold(fold(start(seed), name), epoch), index)
    word = mix64(key + (counter + 1) * GOLDEN)

`mix64` is the finaliser of SplitMix64 (Steele, Lea and Flood 2014, with the constants
of Stafford's variant 13), so the words of one key are a SplitMix64 sequence that starts
at the key. Any item of any epoch can be made alone, in any order, by any worker; a
resumed run continues exactly, because there is nothing to restore.

Two keys collide, or walk the same stretch, with a chance of about (words per item) /
2**63 per pair of items. `below` multiplies instead of dividing and is biased by less
than bound / 2**32. None of this is for cryptography.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from castwise.errors import SettingsError
from castwise.recipes.kenken.compiled import kernel

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_FEISTEL_ROUNDS = 8


@kernel
def mix64(word: np.uint64) -> np.uint64:
    """Scatter the bits of a word; a bijection of 64-bit words."""
    word = (word ^ (word >> np.uint64(30))) * _FIRST
    word = (word ^ (word >> np.uint64(27))) * _SECOND
    return word ^ (word >> np.uint64(31))


@kernel
def fold(key: np.uint64, value: np.uint64) -> np.uint64:
    """Go from a key to the key of one of its parts; a bijection in the value."""
    return mix64((key ^ mix64(value + GOLDEN)) + GOLDEN)


@kernel
def next_word(state: NDArray[np.uint64]) -> np.uint64:
    """Draw the next word of the key in `state` (uint64 [1], advanced in place)."""
    state[0] += GOLDEN
    return mix64(state[0])


@kernel
def below(state: NDArray[np.uint64], bound: int) -> np.int64:
    """Draw an integer in 0..bound-1, for a bound below 2**32."""
    high = next_word(state) >> np.uint64(32)
    return np.int64((high * np.uint64(bound)) >> np.uint64(32))


@kernel
def shuffle(state: NDArray[np.uint64], items: NDArray[np.int64]) -> None:
    """Shuffle the items in place (Fisher and Yates)."""
    for i in range(items.size - 1, 0, -1):
        j = below(state, i + 1)
        items[i], items[j] = items[j], items[i]


# --- the same functions over numpy arrays; array arithmetic wraps without a warning


def _mix(word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    word = (word ^ (word >> np.uint64(30))) * _FIRST
    word = (word ^ (word >> np.uint64(27))) * _SECOND
    return word ^ (word >> np.uint64(31))


def _fold(key: NDArray[np.uint64], value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return _mix((key ^ _mix(value + GOLDEN)) + GOLDEN)


def _word(value: int) -> NDArray[np.uint64]:
    return np.array([value & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)


def check_seed(seed: int) -> int:
    """Return the seed if it can key a stream, else say what can."""
    if not 0 <= seed < 2**63:
        raise SettingsError(
            f"a seed must lie in 0..2**63-1; got {seed}; choose one of these."
        )
    return seed


def _named(seed: int, name: str) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    key = _mix(_word(check_seed(seed)) + GOLDEN)
    return _fold(key, _word(int.from_bytes(digest, "little")))


def stream_key(seed: int, name: str, *parts: int) -> np.uint64:
    """Make the key of a named stream, which kernels fold an index into.

    Args:
        seed: Seed of the run.
        name: What the numbers are for; each use has its own name.
        *parts: Further numbers that tell streams apart, such as a size.

    Returns:
        The key, one uint64.
    """
    key = _named(seed, name)
    for part in parts:
        key = _fold(key, _word(part))
    return np.uint64(key[0])


def item_keys(
    seed: int, name: str, epoch: ArrayLike, index: ArrayLike
) -> NDArray[np.uint64]:
    """Make the keys of many items at once.

    Args:
        seed: Seed of the run.
        name: What the numbers are for.
        epoch: int [] or [K], pass over the data.
        index: int [] or [K], the item.

    Returns:
        uint64 [K]: one key per item.
    """
    key = _fold(_named(seed, name), np.atleast_1d(np.asarray(epoch)).astype(np.uint64))
    return _fold(key, np.atleast_1d(np.asarray(index)).astype(np.uint64))


def words(keys: NDArray[np.uint64], count: int, start: int = 0) -> NDArray[np.uint64]:
    """Read words of many keys at once.

    Args:
        keys: uint64 [K], from `item_keys`.
        count: How many words of each.
        start: Counter of the first.

    Returns:
        uint64 [K, count], equal to what `next_word` draws one by one.
    """
    counters = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    return _mix(keys[:, None] + counters[None, :] * GOLDEN)


def uniforms(
    keys: NDArray[np.uint64], count: int, start: int = 0
) -> NDArray[np.float64]:
    """Read numbers in [0, 1) of many keys at once; arguments as for `words`."""
    return (words(keys, count, start) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permuted(
    keys: NDArray[np.uint64], position: NDArray[np.int64], length: int
) -> NDArray[np.int64]:
    """Say which item stands at a position of a random permutation, without making it.

    A Feistel network permutes the smallest even number of bits that holds the length;
    what falls outside walks on until it falls inside (Black and Rogaway 2002).

    Args:
        keys: uint64 [K] or [1], one key per permutation.
        position: int64 [K], positions in 0..length-1.
        length: Number of items.

    Returns:
        int64 [K]: the items; a bijection of positions for each key.
    """
    half = np.uint64(max(1, (max(length - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.broadcast_to(keys, position.shape)
    value = position.astype(np.uint64)
    walking = np.ones(position.shape, dtype=bool)
    while walking.any():
        left, right = value[walking] >> half, value[walking] & mask
        for turn in range(_FEISTEL_ROUNDS):
            scattered = _fold(keys[walking], right + np.uint64(turn << 40))
            left, right = right, left ^ (scattered & mask)
        value[walking] = (left << half) | right
        walking &= value >= np.uint64(length)
    return value.astype(np.int64)
