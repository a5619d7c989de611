"""Batches of puzzles as tensors, each a function of the seed and the step alone.

A batch holds puzzles of one size n as sequences of L = n * n cells, so nothing is
padded. Modes and kinds are mixed within it: `Mixture` says in which shares. A KenKen
puzzle is shown without any hint with chance `empty_share`, else each cell is revealed
with a probability drawn from [0, max_reveal]; Latin squares are nearly always shown
with hints, because an empty one has nothing to learn from beyond its symmetry.

`draw_batch` keeps no state. A run that resumes at step s draws what the run that was
never killed draws at step s, and workers may draw different steps in any order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from castwise.errors import DataError, SettingsError
from castwise.recipes.kenken.alphabets import EMPTY, Mode, tokens
from castwise.recipes.kenken.dataset import reveal_mask
from castwise.recipes.kenken.puzzle_set import Kind, PuzzleSet
from castwise.recipes.kenken.relations import MODES, Relations, relate
from castwise.recipes.kenken.streams import item_keys, uniforms

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from castwise.distributed.ranks import Ranks

UNKNOWN = -1
"""The rank of an answer that nobody has given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PuzzleBatch:
    """B puzzles of one size n with L = n * n cells and room for C cages."""

    size: int
    """Rows, columns and symbols."""

    tokens: Tensor
    """int64 [B, L]: what stands in each cell; EMPTY where it is hidden."""

    modes: Tensor
    """int64 [B]: codes of `relations.MODES`."""

    alphabet: Tensor
    """int64 [B, n]: the token of each rank."""

    relations: Relations
    """What the clues say about each cell."""

    cage_ids: Tensor
    """int64 [B, L]: the cage of each cell."""

    cage_ops: Tensor
    """int64 [B, C]: operation codes; all 0 for a Latin square."""

    cage_targets: Tensor
    """int64 [B, C]: targets."""

    answers: Tensor
    """int64 [B, L]: ranks of the solution, UNKNOWN where nobody knows it."""

    share: float = 1.0
    """What the mean of these puzzles counts for, beside those of other processes."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def hidden(self) -> Tensor:
        """Cells that a solver has to fill, bool [B, L]."""
        return self.tokens == EMPTY

    @property
    def answer_tokens(self) -> Tensor:
        """The solution as tokens, int64 [B, L]."""
        return self.alphabet.gather(1, self.answers.clamp(min=0))

    def select(self, rows: Tensor | slice) -> PuzzleBatch:
        """Keep some puzzles: int64 rows, a bool mask [B], or a slice."""
        return replace(
            self,
            relations=self.relations.select(rows),
            **{name: getattr(self, name)[rows] for name in _TENSORS},
        )

    def part(self, ranks: Ranks) -> PuzzleBatch:
        """Keep the puzzles of one process among several that share this batch.

        Its `share` is such that the mean over ranks of `share * mean over own cells` is
        the mean over all hidden cells, however many each rank has.
        """
        if ranks.num_ranks == 1:
            return self
        if len(self) < ranks.num_ranks:
            raise SettingsError(
                f"{ranks.num_ranks} processes need a puzzle each, and a batch has "
                f"{len(self)} of size {self.size}; start fewer, or raise cells_per_step"
            )
        own = self.select(ranks.part(len(self)))
        hidden = max(1, int(self.hidden.sum()))
        share = int(own.hidden.sum()) * ranks.num_ranks / hidden
        return replace(own, share=share)

    def with_tokens(self, tokens: Tensor) -> PuzzleBatch:
        """Show other cells of the same puzzles."""
        return replace(self, tokens=tokens)

    def to(self, device: torch.device | str) -> PuzzleBatch:
        """Move every tensor to a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> PuzzleBatch:
        """Keep every tensor where a GPU fetches it while the CPU goes on."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> PuzzleBatch:
        changed: dict[str, Any] = {
            name: change(getattr(self, name)) for name in _TENSORS
        }
        relations = Relations(*map(change, self.relations))
        return replace(self, relations=relations, **changed)


_TENSORS = (
    "tokens",
    "modes",
    "alphabet",
    "cage_ids",
    "cage_ops",
    "cage_targets",
    "answers",
)


def assemble(
    *,
    modes: NDArray[np.int64],
    hints: NDArray[np.int64],
    cage_ids: NDArray[np.int64],
    cage_ops: NDArray[np.int64],
    cage_targets: NDArray[np.int64],
    answers: NDArray[np.int64] | None = None,
) -> PuzzleBatch:
    """Put puzzles of one size together.

    Args:
        modes: int64 [B], codes of `relations.MODES`.
        hints: int64 [B, L], revealed ranks, UNKNOWN in hidden cells.
        cage_ids: int64 [B, L].
        cage_ops: int64 [B, C], operation codes of `clues`.
        cage_targets: int64 [B, C].
        answers: int64 [B, L], ranks of the solutions, if they are known.

    Returns:
        The batch, on the CPU.
    """
    size = math.isqrt(hints.shape[1])
    alphabet = np.stack([tokens(size, mode) for mode in MODES])[modes]
    shown = np.take_along_axis(alphabet, np.maximum(hints, 0), axis=1)
    if answers is None:
        answers = np.full_like(hints, UNKNOWN)
    return PuzzleBatch(
        size=size,
        tokens=torch.from_numpy(np.where(hints == UNKNOWN, EMPTY, shown)),
        modes=torch.from_numpy(modes),
        alphabet=torch.from_numpy(alphabet),
        relations=relate(modes, cage_ids, cage_ops, cage_targets),
        cage_ids=torch.from_numpy(cage_ids),
        cage_ops=torch.from_numpy(cage_ops),
        cage_targets=torch.from_numpy(cage_targets),
        answers=torch.from_numpy(answers),
    )


def batch_of(
    parts: Sequence[tuple[PuzzleSet, NDArray[np.int64]]], revealed: NDArray[np.bool_]
) -> PuzzleBatch:
    """Take puzzles out of sets of one size.

    Args:
        parts: Sets and the rows to take, in the order of the batch.
        revealed: bool [B, L], cells to show as hints.

    Returns:
        The batch, on the CPU.
    """
    size = parts[0][0].size
    room = max(int(puzzles.num_cages[rows].max(initial=1)) for puzzles, rows in parts)
    cells = revealed.shape[1]
    modes, answers, ids, ops, targets = [], [], [], [], []
    for puzzles, rows in parts:
        if puzzles.size != size:
            raise DataError(
                f"a batch needs puzzles of one size; got {size} and {puzzles.size}; "
                "draw one batch for each size."
            )
        modes.append(np.full(len(rows), MODES.index(puzzles.mode)))
        answers.append(puzzles.solution[rows].reshape(-1, cells).astype(np.int64))
        ids.append(puzzles.cage_id[rows].reshape(-1, cells).astype(np.int64))
        ops.append(_with_room(puzzles.cage_op[rows], room))
        targets.append(_with_room(puzzles.cage_target[rows], room))
    known = np.concatenate(answers)
    return assemble(
        modes=np.concatenate(modes),
        hints=np.where(revealed, known, UNKNOWN),
        cage_ids=np.concatenate(ids),
        cage_ops=np.concatenate(ops),
        cage_targets=np.concatenate(targets),
        answers=known,
    )


def _with_room(
    array: NDArray[np.uint8] | NDArray[np.int32], room: int
) -> NDArray[np.int64]:
    """Give [K, C] exactly `room` columns; what is cut off is not in use."""
    out = np.zeros((len(array), room), dtype=np.int64)
    width = min(room, array.shape[1])
    out[:, :width] = array[:, :width]
    return out


@dataclass(frozen=True, kw_only=True, slots=True)
class Fill:
    """How much of their grids some puzzles of a batch show."""

    share: float = 1.0
    """Share of the puzzles that are shown so."""

    empty_share: float = 0.5
    """Chance that such a KenKen puzzle comes without a hint."""

    reveal: tuple[float, float] = (0.0, 0.7)
    """Range of the probability that a cell is revealed, when some are."""

    def __post_init__(self) -> None:
        """Refuse shares that are none.

        Raises:
            SettingsError: Naming the setting.
        """
        low, high = self.reveal
        if not all(0 <= x <= 1 for x in (self.share, self.empty_share, low, high)):
            raise SettingsError(
                "share, empty_share and the ends of reveal must lie in 0..1; got "
                f"{self.share}, {self.empty_share} and {self.reveal}; correct them."
            )
        if low > high:
            raise SettingsError(f"reveal must rise, got {self.reveal}; swap its ends.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """What the batches of a run are made of; a curriculum replaces it as it goes."""

    sizes: tuple[int, ...]
    """Rows of the puzzles; each batch has one size."""

    size_shares: tuple[float, ...]
    """Share of the steps for each size; they sum to 1."""

    modes: tuple[Mode, ...] = MODES
    """Alphabets."""

    mode_shares: tuple[float, ...] = (1 / 3, 1 / 3, 1 / 3)
    """Share of the puzzles of a batch for each mode; they sum to 1."""

    latin_share: float = 0.1
    """Share of the puzzles of a batch that are Latin squares without cages."""

    fills: tuple[Fill, ...] = (Fill(),)
    """How much the puzzles show; the shares sum to 1."""

    latin_empty_share: float = 0.1
    """Chance that a Latin square comes without a hint."""

    cells_per_step: int = 1152
    """Cells in a batch; larger puzzles come in smaller batches."""

    def __post_init__(self) -> None:
        """Refuse shares that are none.

        Raises:
            SettingsError: Naming the setting.
        """
        for name, items in (("size", self.sizes), ("mode", self.modes)):
            shares = getattr(self, f"{name}_shares")
            if len(shares) != len(items) or not items or min(shares) < 0:
                raise SettingsError(
                    f"{name}_shares needs one share of at least 0 for each of {items}; "
                    f"got {shares}; give as many."
                )
        fill_shares = tuple(fill.share for fill in self.fills)
        for name, shares in (
            ("size_shares", self.size_shares),
            ("mode_shares", self.mode_shares),
            ("the shares of fills", fill_shares),
        ):
            if not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
                raise SettingsError(
                    f"{name} must sum to 1; got {shares}, which sum to "
                    f"{sum(shares):g}; divide each by the sum."
                )
        for chance in (self.latin_share, self.latin_empty_share):
            if not 0 <= chance <= 1:
                raise SettingsError(
                    "latin_share and latin_empty_share must lie in 0..1; got "
                    f"{self.latin_share} and {self.latin_empty_share}; correct them."
                )
        if self.cells_per_step < max(self.sizes) ** 2:
            raise SettingsError(
                f"cells_per_step must hold one puzzle of size {max(self.sizes)}; got "
                f"{self.cells_per_step}; give at least {max(self.sizes) ** 2}."
            )


def _choose(shares: Sequence[float], chance: NDArray[np.float64]) -> NDArray[np.int64]:
    """Turn uniform numbers into choices with these shares."""
    edges = np.cumsum(shares)[:-1]
    return np.searchsorted(edges, chance, side="right")


def _reveal_chances(
    mixture: Mixture,
    latin: NDArray[np.bool_],
    is_empty: NDArray[np.float64],
    how_much: NDArray[np.float64],
    which: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Turn uniform numbers into the chance that a cell of each puzzle is shown."""
    fill = _choose([each.share for each in mixture.fills], which)
    empty, low, high = (
        np.array(column)[fill]
        for column in zip(
            *((each.empty_share, *each.reveal) for each in mixture.fills), strict=True
        )
    )
    empty = np.where(latin, np.minimum(mixture.latin_empty_share, empty), empty)
    return np.where(is_empty < empty, 0.0, low + (high - low) * how_much)


def draw_batch(
    sets: Mapping[tuple[int, Mode, Kind], PuzzleSet],
    mixture: Mixture,
    *,
    seed: int,
    step: int,
) -> PuzzleBatch:
    """Draw the batch of one step.

    Args:
        sets: Training puzzles by size, mode and kind; Latin squares only if the
            mixture has a share of them.
        mixture: Shares.
        seed: Seed of the run.
        step: Which step.

    Returns:
        The batch, on the CPU: the same for the same arguments, whenever it is drawn.
    """
    choice = uniforms(item_keys(seed, "kenken size", step, 0), 1)[0, 0]
    size = mixture.sizes[int(_choose(mixture.size_shares, np.array(choice)))]
    index = np.arange(mixture.cells_per_step // size**2)
    draws = uniforms(item_keys(seed, "kenken item", step, index), 6)
    mode = _choose(mixture.mode_shares, draws[:, 0])
    latin = draws[:, 1] < mixture.latin_share
    chance = _reveal_chances(mixture, latin, draws[:, 2], draws[:, 3], draws[:, 5])
    parts, order = [], []
    for code, name in enumerate(mixture.modes):
        for kind in (Kind.KENKEN, Kind.LATIN):
            chosen = np.flatnonzero((mode == code) & (latin == (kind is Kind.LATIN)))
            if chosen.size:
                puzzles = sets[size, name, kind]
                parts.append((puzzles, (draws[chosen, 4] * len(puzzles)).astype(int)))
                order.append(chosen)
    index = np.concatenate(order)
    revealed = reveal_mask(seed, step, index, size, chance[index])
    return batch_of(parts, revealed.reshape(len(index), -1))
