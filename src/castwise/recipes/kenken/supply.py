"""The puzzle sets of one run: made on the spot, cached, named by their digests.

Training, validation and test sets are disjoint by construction: `dataset.py` assigns a
puzzle to a split by a hash that no swap of rows, columns or axes changes. The cache is
a convenience; a file in it that cannot be trusted is made anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from castwise.errors import StorageError
from castwise.recipes.kenken.alphabets import Mode, parse_mode
from castwise.recipes.kenken.dataset import open_puzzle_set
from castwise.recipes.kenken.puzzle_set import Kind, PuzzleSet, Split
from castwise.recipes.kenken.settings import KenKenSettings

Key = tuple[int, Mode, Kind]

SMALL_WORLD = 3
NUM_TRAIN_AT_3 = 1024
NUM_VALIDATION_AT_3 = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Supply:
    """Every set of a run, by size, mode and kind."""

    train: Mapping[Key, PuzzleSet]
    """Puzzles to learn from."""

    validation: Mapping[Key, PuzzleSet]
    """Puzzles that measure the run; none of them is in `train`."""

    @property
    def digests(self) -> dict[str, str]:
        """The content hash of each set, by a readable name."""
        return {
            f"{puzzles.kind} {puzzles.mode} n={puzzles.size} {puzzles.split}": (
                puzzles.digest
            )
            for sets in (self.train, self.validation)
            for puzzles in sets.values()
        }


def default_folder() -> Path:
    """Return the user's cache folder for puzzles."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "castwise" / "kenken"


def open_supply(
    settings: KenKenSettings,
    folder: Path,
    *,
    progress: Callable[[str, int, int], None],
) -> Supply:
    """Open or make every set that a run needs.

    Args:
        settings: Of the run.
        folder: The cache.
        progress: Called with a set's name, its place and the number of sets.

    Raises:
        DataError: If so many different puzzles do not exist.
        StorageError: If the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"Puzzles need a folder that can be written, and {folder} cannot be: "
            f"{error.strerror or error}; name another one with --data."
        ) from error
    wanted = list(_wanted(settings))
    found: dict[Split, dict[Key, PuzzleSet]] = {Split.TRAIN: {}, Split.VALIDATION: {}}
    for place, (key, split, count) in enumerate(wanted):
        size, mode, kind = key
        progress(f"{kind} {mode} {size}x{size}, {split}", place, len(wanted))
        found[split][key] = open_puzzle_set(
            folder, size, mode, count, settings.data_seed, split, kind=kind
        )
    return Supply(train=found[Split.TRAIN], validation=found[Split.VALIDATION])


def _wanted(settings: KenKenSettings) -> Iterator[tuple[Key, Split, int]]:
    for size in settings.sizes:
        for name in settings.modes:
            for kind in (Kind.KENKEN, Kind.LATIN):
                key = (size, parse_mode(name), kind)
                yield key, Split.TRAIN, _count(size, kind, settings.num_train)
                yield (
                    key,
                    Split.VALIDATION,
                    _count(size, kind, settings.num_validation, validation=True),
                )


def _count(size: int, kind: Kind, wanted: int, *, validation: bool = False) -> int:
    """Cap a count where the world of puzzles is small (see `world_note`)."""
    if kind is Kind.LATIN or size > SMALL_WORLD:
        return wanted
    return min(wanted, NUM_VALIDATION_AT_3 if validation else NUM_TRAIN_AT_3)
