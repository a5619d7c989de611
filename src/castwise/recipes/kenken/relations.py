"""What the clues say, as relations between cells that a model can read.

A clue is arithmetic: `x 12` in two cells of a 6 x 6 square in STANDARD digits means the
digits {2, 6} or {3, 4}. Nobody wants a network to learn the multiplication table, and
in three alphabets at that. So each clue is read once, exactly and alone, as the list of
its *ways*: all multisets of digits that satisfy it. Each way says of each rank whether
it occurs once, twice or more often. The ways of a clue, each weighed by the number of
its orderings, also give the chance that a cell of the cage holds a rank: its *support*.

Nothing is propagated from cage to cage or along rows and columns: that is the solving,
and it is left to the model. The geometry of a cage enters once: a cage that touches r
rows and c columns cannot hold a digit more than min(r, c) times.

A cell without a cage supports every rank alike, and has no ways and no mates. A clue
with too many ways to list (`_MOST_MULTISETS`, `_MOST_WAYS`) passes for none.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from castwise.recipes.kenken.alphabets import Mode, digits
from castwise.recipes.kenken.clues import OP_ADD, OP_GIVEN, OP_MUL, OP_NONE, fits_pair

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

MODES = tuple(Mode)
"""Modes by their code in tensors."""

NUM_LEVELS = 3
"""A rank occurs once, twice or more often in a way."""

_MOST_MULTISETS = 50_000
_MOST_WAYS = 1024


class Relations(NamedTuple):
    """The relations of B puzzles with L = n * n cells and C cages.

    Puzzles of a batch share most of their clues. The ways of the D different ones, W at
    most, stand here once; spelled out for every cage of 809 puzzles of size 9 they
    would be half a gigabyte, which only the device of the model has to see.
    """

    support: Tensor
    """fp32 [B, L, n]: chance of each rank by the cell's own clue."""

    mates: Tensor
    """bool [B, L, L]: another cell of the same cage."""

    members: Tensor
    """fp32 [B, C, L]: 1 for the cells of a cage that has a clue."""

    clues: Tensor
    """int64 [B, C]: which of the different clues a cage has."""

    operations: Tensor
    """int64 [B, L]: operation code of the cell's clue, 0 without one."""

    num_mates: Tensor
    """int64 [B, L]: other cells of the same cage."""

    ways: Tensor
    """fp32 [D, W, n * NUM_LEVELS]: 1 where the way holds the rank so often."""

    is_way: Tensor
    """bool [D, W]: false behind the last way of a clue."""

    def select(self, rows: Tensor | slice) -> Relations:
        """Keep some puzzles: int64 rows, a bool mask [B], or a slice."""
        per_puzzle = self._asdict()
        shared = {name: per_puzzle.pop(name) for name in _SHARED}
        return Relations(
            **{name: tensor[rows] for name, tensor in per_puzzle.items()}, **shared
        )

    def by_cage(self) -> CageWays:
        """Spell out the ways of every cage, on the device where they are."""
        return CageWays(
            members=self.members,
            ways=self.ways[self.clues],
            is_way=self.is_way[self.clues],
        )


_SHARED = ("ways", "is_way")


class CageWays(NamedTuple):
    """What the cages of B puzzles can be filled with."""

    members: Tensor
    """fp32 [B, C, L]: 1 for the cells of a cage that has a clue."""

    ways: Tensor
    """fp32 [B, C, W, n * NUM_LEVELS]: 1 where the way holds the rank so often."""

    is_way: Tensor
    """bool [B, C, W]: false behind the last way of a clue."""


class Clue(NamedTuple):
    """One clue, read alone."""

    support: NDArray[np.float32]
    """fp32 [n]; zeros if nothing satisfies the clue."""

    ways: NDArray[np.float32]
    """fp32 [W, n * NUM_LEVELS]."""


class _Multisets(NamedTuple):
    """All multisets of k ranks, with what the clues of a mode make of them."""

    counts: NDArray[np.float64]  # [M, n]
    orderings: NDArray[np.float64]  # [M]
    sums: NDArray[np.int64]  # [M]
    products: NDArray[np.object_ | np.int64]  # [M]
    pairs: NDArray[np.int64]  # [M, 2] digits, for k = 2


@lru_cache(maxsize=256)
def _multisets(size: int, mode: Mode, k: int) -> _Multisets | None:
    if math.comb(size + k - 1, k) > _MOST_MULTISETS:
        return None
    ranks = np.array(list(combinations_with_replacement(range(size), k)))
    counts = (ranks[:, :, None] == np.arange(size)).sum(axis=1)
    factorials = np.array([float(math.factorial(i)) for i in range(k + 1)])
    values = digits(size, mode)[ranks]
    exact = values.astype(object) if k > 16 else values  # 9**16 fits 64 bits
    return _Multisets(
        counts=counts.astype(np.float64),
        orderings=factorials[k] / factorials[counts].prod(axis=1),
        sums=values.sum(axis=1),
        products=exact.prod(axis=1),
        pairs=values[:, :2],
    )


def _satisfied(table: _Multisets, operation: int, target: int) -> NDArray[np.bool_]:
    if operation in (OP_GIVEN, OP_ADD):
        return np.asarray(table.sums == target)
    if operation == OP_MUL:
        return np.asarray(table.products == target, dtype=np.bool_)
    return np.array([fits_pair(operation, a, b, target) for a, b in table.pairs])


@lru_cache(maxsize=1 << 16)
def read_clue(
    size: int, mode: Mode, operation: int, target: int, num_cells: int, repeats: int
) -> Clue:
    """Read one clue alone.

    Args:
        size: Rows of the puzzle.
        mode: Its alphabet.
        operation: Operation code of `clues`.
        target: Target of the clue.
        num_cells: Cells of the cage.
        repeats: How often the geometry lets a digit repeat in the cage.

    Returns:
        What it says.
    """
    table = None if operation == OP_NONE else _multisets(size, mode, num_cells)
    if table is None:
        return _silent(size)
    holds = _satisfied(table, operation, target)
    holds &= table.counts.max(axis=1) <= repeats
    if holds.sum() > _MOST_WAYS:
        return _silent(size)
    counts, weight = table.counts[holds], table.orderings[holds]
    support = weight @ counts / max(weight.sum() * num_cells, 1.0)
    levels = np.minimum(counts, NUM_LEVELS)[:, :, None] == np.arange(1, NUM_LEVELS + 1)
    ways = levels.reshape(len(counts), size * NUM_LEVELS)
    return Clue(support=support.astype(np.float32), ways=ways.astype(np.float32))


def _silent(size: int) -> Clue:
    """Read a clue that says nothing."""
    return Clue(
        support=np.full(size, 1 / size, dtype=np.float32),
        ways=np.zeros((0, size * NUM_LEVELS), dtype=np.float32),
    )


def _padded(clues: list[Clue]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Give clues equal room for ways: fp32 [D, W, n * levels] and bool [D, W]."""
    most = max([1, *(len(clue.ways) for clue in clues)])
    ways = np.zeros((len(clues), most, clues[0].ways.shape[1]), dtype=np.float32)
    is_way = np.zeros((len(clues), most), dtype=np.bool_)
    for row, clue in enumerate(clues):
        ways[row, : len(clue.ways)] = clue.ways
        is_way[row, : len(clue.ways)] = True
    return ways, is_way


def _cage_shapes(
    cage_ids: NDArray[np.int64], num_cages: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count cells and possible repeats of each cage, int64 [B, C]."""
    batch, length = cage_ids.shape
    size = math.isqrt(length)
    member = cage_ids[:, :, None] == np.arange(num_cages)
    grid = member.reshape(batch, size, size, num_cages)
    rows, columns = grid.any(axis=2).sum(axis=1), grid.any(axis=1).sum(axis=1)
    return member.sum(axis=1), np.minimum(rows, columns)


def _distinct(
    columns: tuple[NDArray[np.int64], ...],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find the different rows of some columns.

    Args:
        columns: int64 [B, C] each; all but the third are small and not negative.

    Returns:
        int64 [D, 5], and int64 [B, C]: which of them each place has.
    """
    mode, operation, target, num_cells, repeats = columns
    key = (target << 28) | (num_cells << 18) | (repeats << 8) | (operation << 4) | mode
    _, first, which = np.unique(key.ravel(), return_index=True, return_inverse=True)
    distinct = np.stack([column.ravel()[first] for column in columns], axis=1)
    return distinct, which.reshape(key.shape)


def relate(
    modes: NDArray[np.int64],
    cage_ids: NDArray[np.int64],
    cage_ops: NDArray[np.int64],
    cage_targets: NDArray[np.int64],
) -> Relations:
    """Read the clues of a batch of puzzles of one size.

    Args:
        modes: int64 [B], codes of `MODES`.
        cage_ids: int64 [B, L], the cage of each cell.
        cage_ops: int64 [B, C], operation codes; all 0 for a Latin square.
        cage_targets: int64 [B, C].

    Returns:
        The relations, on the CPU.
    """
    length, num_cages = cage_ids.shape[1], cage_ops.shape[1]
    size = math.isqrt(length)
    num_cells, repeats = _cage_shapes(cage_ids, num_cages)
    columns = (
        np.broadcast_to(modes[:, None], cage_ops.shape),
        cage_ops,
        np.where(cage_ops == OP_NONE, 0, cage_targets),
        num_cells,
        repeats,
    )
    distinct, which = _distinct(columns)
    read = [read_clue(size, MODES[mode], *rest) for mode, *rest in distinct.tolist()]
    own = np.take_along_axis(which, cage_ids, axis=1)
    operations = np.take_along_axis(cage_ops, cage_ids, axis=1)
    caged = operations != OP_NONE
    mates = (cage_ids[:, :, None] == cage_ids[:, None, :]) & caged[:, :, None]
    mates &= ~np.eye(length, dtype=np.bool_)
    ways, is_way = _padded(read)
    member = (cage_ids[:, None, :] == np.arange(num_cages)[:, None]) & caged[:, None]
    return Relations(
        support=torch.from_numpy(np.stack([clue.support for clue in read])[own]),
        mates=torch.from_numpy(mates),
        members=torch.from_numpy(member.astype(np.float32)),
        clues=torch.from_numpy(which),
        operations=torch.from_numpy(operations),
        num_mates=torch.from_numpy(mates.sum(axis=2)),
        ways=torch.from_numpy(ways),
        is_way=torch.from_numpy(is_way),
    )
