"""The puzzles of a run: made on the spot, split for good, kept on disk, drawn by index.

Splits are a property of the puzzle, not of the run: a key that all twins of a puzzle
share (`symmetry.py`) sends it to train (80 of 100), validation (10) or test (10), so no
two sets of different splits ever share a puzzle, whatever their seeds. A set holds no
key twice. Plain Latin squares are split by their exact canonical form from size 6 on,
and may repeat within a set, because there the reveal mask makes the puzzle; up to
size 5 there are too few of them to split, and `world_note` says so.

Everything random is a function of (seed, epoch, index), so any worker makes any item,
a resumed run goes on exactly, and the number of workers changes nothing.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from castwise.errors import DataError, SettingsError
from castwise.recipes.kenken.alphabets import Mode, check_size, digits
from castwise.recipes.kenken.cages import make_unique
from castwise.recipes.kenken.latin import latin_squares
from castwise.recipes.kenken.puzzle_set import (
    GENERATOR_VERSION,
    Kind,
    PuzzleSet,
    Split,
    load_puzzle_set,
    save_puzzle_set,
)
from castwise.recipes.kenken.streams import item_keys, permuted, stream_key, uniforms
from castwise.recipes.kenken.symmetry import latin_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray

_LOG = logging.getLogger(__name__)

_LOTS = {
    Split.TRAIN: np.array([0, 80, 100]),
    Split.VALIDATION: np.array([80, 90, 100]),
    Split.TEST: np.array([90, 100, 100]),
}
_EVERYTHING = np.array([0, 100, 100])
_SPLITTABLE_LATIN_SIZE = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    """What one stretch of candidates brought."""

    stretch: int
    """Number of squares that were made."""

    num_candidates: int
    """How many of them belong to the split."""

    solution: NDArray[np.uint8]
    cage_id: NDArray[np.uint8]
    cage_op: NDArray[np.uint8]
    cage_target: NDArray[np.int32]
    num_cages: NDArray[np.int16]
    nodes: NDArray[np.int32]
    key: NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Order:
    """What is to be made; enough to make any stretch of candidates."""

    size: int
    mode: Mode
    kind: Kind
    split: Split
    seed: int

    def make(self, start: int) -> _Batch:
        """Make the stretch of candidates that begins at `start`."""
        name = f"{self.kind} {self.mode} {self.split}"
        seed = int(stream_key(self.seed, f"squares of {name}", self.size)) >> 1
        squares = latin_squares(
            self.size, _stretch(self.size), seed, start=start, workers=1
        )
        if self.kind is Kind.LATIN:
            return self._choose_squares(squares)
        return self._cage_squares(squares, start, f"cages of {name}")

    def _choose_squares(self, squares: NDArray[np.uint8]) -> _Batch:
        """Keep the squares that belong to the split."""
        keys = latin_keys(squares)
        lot = _LOTS[self.split] if self.size >= _SPLITTABLE_LATIN_SIZE else _EVERYTHING
        ticket = keys % np.uint64(lot[2])
        mine = (ticket >= np.uint64(lot[0])) & (ticket < np.uint64(lot[1]))
        num = int(mine.sum())
        return _Batch(
            stretch=len(squares),
            num_candidates=num,
            solution=squares[mine],
            cage_id=np.zeros((num, self.size, self.size), np.uint8),
            cage_op=np.zeros((num, 1), np.uint8),
            cage_target=np.zeros((num, 1), np.int32),
            num_cages=np.zeros(num, np.int16),
            nodes=np.zeros(num, np.int32),
            key=keys[mine],
        )

    def _cage_squares(
        self, squares: NDArray[np.uint8], start: int, name: str
    ) -> _Batch:
        """Keep the unique puzzles of the split that random cages make."""
        count, n, _ = squares.shape
        cage_id = np.zeros((count, n, n), np.uint8)
        cage_op = np.zeros((count, n * n), np.uint8)
        cage_target = np.zeros((count, n * n), np.int32)
        num_cages = np.zeros(count, np.int16)
        nodes = np.zeros(count, np.int32)
        key = np.zeros(count, np.uint64)
        source = np.zeros(count, np.int64)
        tally = np.zeros(4, np.int64)
        kept = make_unique(
            digits(n, self.mode),
            squares,
            stream_key(self.seed, name, n),
            start,
            _LOTS[self.split],
            cage_id,
            cage_op,
            cage_target,
            num_cages,
            nodes,
            key,
            source,
            tally,
        )
        return _Batch(
            stretch=count,
            num_candidates=int(tally.sum()),
            solution=squares[source[:kept]],
            cage_id=cage_id[:kept],
            cage_op=cage_op[:kept],
            cage_target=cage_target[:kept],
            num_cages=num_cages[:kept],
            nodes=nodes[:kept],
            key=key[:kept],
        )


def _stretch(n: int) -> int:
    """Return how many candidates one task makes: about a tenth of a second's work."""
    return {3: 1024, 4: 1024, 5: 1024, 6: 1024, 7: 512, 8: 128, 9: 64}.get(n, 16)


def _patience(n: int) -> int:
    """Return how many candidates in a row may bring nothing new."""
    return 1 << 17 if n <= 5 else 1 << 15


def _batches(order: _Order, workers: int) -> Iterator[_Batch]:
    """Make stretch after stretch, in order, a few ahead on other threads."""
    step = _stretch(order.size)
    with ThreadPoolExecutor(workers) as threads:
        ahead: deque[Future[_Batch]] = deque()
        start = 0
        try:
            while True:
                while len(ahead) < 2 * workers:
                    ahead.append(threads.submit(order.make, start))
                    start += step
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def generate_puzzle_set(
    size: int,
    mode: Mode,
    count: int,
    seed: int,
    split: Split | str,
    *,
    kind: Kind = Kind.KENKEN,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> PuzzleSet:
    """Make puzzles.

    Args:
        size: Rows, columns and symbols, 3 to 16. KenKen puzzles above size 9 take
            seconds each.
        mode: The alphabet.
        count: How many.
        seed: Seed of the set.
        split: The share of all puzzles to draw from.
        kind: With cages or without. Default: KenKen.
        workers: Threads; the result does not depend on them. Default: one per core.
        progress: Called with the number of puzzles found so far. Default: nobody.

    Returns:
        The set.

    Raises:
        DataError: When so many different puzzles cannot be found.
    """
    check_size(size)
    if count < 1:
        raise SettingsError(
            f"a puzzle set needs a count of 1 or more; got {count}; ask for one."
        )
    split = Split(split)
    order = _Order(size=size, mode=mode, kind=kind, split=split, seed=seed)
    parts: list[dict[str, NDArray[np.generic]]] = []
    seen: set[int] = set()
    found = num_candidates = barren = 0
    for batch in _batches(order, workers or os.cpu_count() or 1):
        fresh = _fresh(batch, seen, count - found)
        parts.append({name: getattr(batch, name)[fresh] for name in _COLUMNS})
        found += len(fresh)
        num_candidates += batch.num_candidates
        barren = 0 if len(fresh) else barren + batch.stretch
        if progress is not None:
            progress(found)
        if found == count:
            break
        if barren >= _patience(size):
            raise DataError(
                f"{count} different {mode} {kind} puzzles of size {size} were asked "
                f"for the {split} split, but after {found} of them {barren} "
                "candidates in a row brought nothing new; ask for fewer or for a "
                "larger size."
            )
    columns = {
        name: np.concatenate([part[name] for part in parts]) for name in _COLUMNS
    }
    room = max(1, int(columns["num_cages"].max()))
    for name in ("cage_op", "cage_target"):
        columns[name] = np.ascontiguousarray(columns[name][:, :room])
    return PuzzleSet(
        size=size,
        mode=mode,
        kind=kind,
        split=split,
        seed=seed,
        num_candidates=num_candidates,
        **columns,
    )


_COLUMNS = (
    "solution",
    "cage_id",
    "cage_op",
    "cage_target",
    "num_cages",
    "nodes",
    "key",
)


def _fresh(batch: _Batch, seen: set[int], wanted: int) -> NDArray[np.int64]:
    """Choose what a batch adds, at most `wanted`; keys are taken once for KenKen."""
    repeats_allowed = not batch.num_cages.any()
    rows: list[int] = []
    for row, key in enumerate(batch.key.tolist()):
        if len(rows) == wanted:
            break
        if repeats_allowed or key not in seen:
            seen.add(key)
            rows.append(row)
    return np.array(rows, dtype=np.int64)


def open_puzzle_set(
    folder: Path,
    size: int,
    mode: Mode,
    count: int,
    seed: int,
    split: Split | str,
    *,
    kind: Kind = Kind.KENKEN,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> PuzzleSet:
    """Read a set from a folder, or make it and keep it there.

    A file that cannot be trusted is made anew, with a line in the log. Processes that
    open the same set at once may each make it; the file is whole at every moment.

    Args:
        folder: Where sets are kept.
        size: As for `generate_puzzle_set`, as are all that follow.
        mode: The alphabet.
        count: How many.
        seed: Seed of the set.
        split: The share of all puzzles to draw from.
        kind: With cages or without.
        workers: Threads.
        progress: Called with the number of puzzles found so far.

    Returns:
        The set.
    """
    split = Split(split)
    path = folder / (
        f"{kind}-{mode}-n{size}-{split}-seed{seed}-{count}"
        f"-v{GENERATOR_VERSION}.safetensors"
    )
    if path.exists():
        try:
            puzzles = load_puzzle_set(path)
        except DataError as error:
            _LOG.warning("making a puzzle set anew: %s", error)
        else:
            held = (puzzles.kind, puzzles.mode, puzzles.size, puzzles.split)
            asked = (kind, mode, size, split)
            if (*held, puzzles.seed, len(puzzles)) == (*asked, seed, count):
                return puzzles
            _LOG.warning("making a puzzle set anew: %s holds another set", path)
    puzzles = generate_puzzle_set(
        size, mode, count, seed, split, kind=kind, workers=workers, progress=progress
    )
    save_puzzle_set(path, puzzles)
    return puzzles


def reveal_mask(
    seed: int, epoch: ArrayLike, index: ArrayLike, n: int, fraction: ArrayLike
) -> NDArray[np.bool_]:
    """Choose which cells are revealed, each on its own with the given chance.

    Args:
        seed: Seed of the run.
        epoch: int [] or [B], pass over the data.
        index: int [] or [B], the item.
        n: Size of the square.
        fraction: float [] or [B], chance of a cell in 0..1.

    Returns:
        bool [B, n, n], true where the cell is revealed.
    """
    draws = uniforms(item_keys(seed, "reveal mask", epoch, index), n * n)
    return draws.reshape(-1, n, n) < np.reshape(np.asarray(fraction), (-1, 1, 1))


def batch_indices(
    seed: int, position: int, batch_size: int, length: int, stream: str = "order"
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose the items of a batch from an endless sequence of shuffled epochs.

    Each epoch visits every item once, in its own random order. Step s of a run with
    one batch size stands at position `s * batch_size`; batches run on across epochs.

    Args:
        seed: Seed of the run.
        position: Items drawn before this batch.
        batch_size: Items to draw.
        length: Items in the set.
        stream: Name that tells the orders of several sets apart.

    Returns:
        int64 [batch_size] epochs and int64 [batch_size] indices.
    """
    places = np.arange(position, position + batch_size, dtype=np.int64)
    epochs, within = places // length, places % length
    keys = item_keys(seed, f"epoch of {stream}", epochs, 0)
    return epochs, permuted(keys, within, length)


def world_note(size: int, mode: Mode, kind: Kind = Kind.KENKEN) -> str:
    """Say where the world of puzzles is too small for an honest split.

    Args:
        size: Size of the square.
        mode: The alphabet.
        kind: With cages or without.

    Returns:
        One sentence for the report, empty where there is nothing to say.
    """
    squares = _NUM_SQUARES.get(size)
    if kind is Kind.LATIN and squares is not None:
        return (
            f"There are only {squares} Latin squares of size {size}: train, validation "
            "and test share them and differ in what is revealed."
        )
    if kind is Kind.LATIN and size == _SPLITTABLE_LATIN_SIZE:
        return (
            "Up to symmetry there are 1,162 Latin squares of size 6: no two splits "
            "share one, but a large training set holds all that are its own."
        )
    if kind is Kind.KENKEN and size == min(_NUM_SQUARES):
        return (
            f"About {_FOUND_AT_SIZE_3[mode]} unique puzzles of size 3 were found up "
            "to symmetry: no two splits share one, but a large training set holds "
            "nearly all that are its own, and all splits share the 12 solutions."
        )
    if kind is Kind.KENKEN and squares is not None:
        return (
            f"No two splits share a puzzle of size {size}, but all of them share the "
            f"{squares} Latin squares that can be solutions."
        )
    return ""


_NUM_SQUARES = {3: "12", 4: "576", 5: "161,280"}
_FOUND_AT_SIZE_3 = {
    Mode.STANDARD: "9,200",
    Mode.ZERO_INCLUSIVE: "10,100",
    Mode.NEGATIVE: "9,500",
}
