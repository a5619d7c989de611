"""Frozen test sets: the same puzzles for everybody, named by their digests.

A set is never shipped. It is made on the spot, a second or a minute of work, from a
fixed seed and the `test` share of all puzzles, and its digest must be the one that
stands here. Runs of `castwise train kenken` draw from the other shares alone, and a
puzzle keeps its share when rows, columns or axes are swapped, so none of these puzzles
was ever trained on, whatever the seed of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from castwise.errors import DataError
from castwise.recipes.kenken.alphabets import Mode
from castwise.recipes.kenken.dataset import open_puzzle_set
from castwise.recipes.kenken.puzzle_set import GENERATOR_VERSION, PuzzleSet, Split

NUM_PUZZLES = 1000
SEED = 2026

DIGESTS: dict[tuple[int, str], str] = {
    (4, "standard"): "ddf64e81bc8e5737ecc3ca0c9f08ba06",
    (4, "zero"): "69c50c1bfacb6208f12c2a5f5a5bcde2",
    (4, "negative"): "8e30f580fc0d7b77873431031a7b5da9",
    (5, "standard"): "18dc54916cd0eb136f96ea322dfadce4",
    (5, "zero"): "47f16ebd875b99d94912170a02f44ac0",
    (5, "negative"): "6d103b58d9573b3174673f888f4ebede",
    (6, "standard"): "019209376602183d9fe0f88243db1431",
    (6, "zero"): "c0005d1298d2894ec0b562ff9732b6a5",
    (6, "negative"): "8c7c420903f39f10ebce3219f6bc21e8",
    (7, "standard"): "88c918b2b0f7fd1c570809e39e035456",
    (7, "zero"): "e22e53c1518f49e6c3d03f7ef9207dc8",
    (7, "negative"): "0890e8194360e86577dd43d9047b91f2",
    (8, "standard"): "857a2aa5ee738276c1b2e9e77df3930f",
    (8, "zero"): "b3ad77a62a4b035ae2c8defaba2ceecd",
    (8, "negative"): "e1c7de39f64e5faa7c5180058d0e37ac",
    (9, "standard"): "e5ed03cb0a5eddcf9fc52385f22909f6",
    (9, "zero"): "487bff92bcd9df83e86b1b9d46fc5434",
    (9, "negative"): "99357b1ab021ce126d7b3e982a68889f",
}
"""Size and mode -> blake2b of the set's arrays and facts; KenKen, unique solutions."""


def frozen_set(
    size: int,
    mode: Mode,
    folder: Path,
    *,
    progress: Callable[[int], None] | None = None,
) -> PuzzleSet:
    """Make or open one frozen test set.

    Args:
        size: Rows of the puzzles.
        mode: The alphabet.
        folder: Where sets are kept.
        progress: Called with the number of puzzles found so far.

    Raises:
        DataError: There is no such set, or what was made is not it.
    """
    wanted = DIGESTS.get((size, mode.value))
    if wanted is None:
        sizes = sorted({each for each, _ in DIGESTS})
        raise DataError(
            f"no frozen test set of size {size}; there are sizes {sizes[0]} to "
            f"{sizes[-1]}"
        )
    made = open_puzzle_set(
        folder, size, mode, NUM_PUZZLES, SEED, Split.TEST, progress=progress
    )
    if made.digest != wanted:
        raise DataError(
            f"the frozen test set of size {size}, mode {mode}, has the digest "
            f"{wanted} (generator version {GENERATOR_VERSION}), and {made.digest} was "
            "made; this is another generator, so figures cannot be compared: use the "
            "version of castwise that the figures come from"
        )
    return made
