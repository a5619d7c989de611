"""What the clues say about each cell, as relations that a model can read.

A clue is arithmetic: `x 12` in two cells of a 6 x 6 square in STANDARD digits means the
ranks {1, 5} or {2, 3}. Nobody wants a network to learn the multiplication table, and
in three alphabets at that. So each clue is read once, exactly and alone: all multisets
of digits that satisfy it, each weighed by the number of its orderings, give

    support[d]     the chance that a cell of the cage holds rank d
    partner[d, e]  the chance that another given cell of the cage holds e if it holds d

Nothing is propagated from cage to cage or along rows and columns: that is the solving,
and it is left to the model. The geometry of a cage enters once: a cage that touches r
rows and c columns cannot hold a digit more than min(r, c) times.

A cell without a cage supports every rank alike and has no mates. So does a cell of a
cage with more multisets than `_MOST_MULTISETS`; the model then does without its clue.
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

_MOST_MULTISETS = 50_000


class Relations(NamedTuple):
    """The relations of a batch of B puzzles with L = n * n cells."""

    support: Tensor
    """fp32 [B, L, n]: chance of each rank by the cell's own clue."""

    partner: Tensor
    """fp32 [B, L, n, n]: chance of e in a mate if the cell holds d; 0 without one."""

    mates: Tensor
    """bool [B, L, L]: another cell of the same cage."""

    operations: Tensor
    """int64 [B, L]: operation code of the cell's clue, 0 without one."""

    num_mates: Tensor
    """int64 [B, L]: other cells of the same cage."""


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
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Read one clue alone.

    Args:
        size: Rows of the puzzle.
        mode: Its alphabet.
        operation: Operation code of `clues`.
        target: Target of the clue.
        num_cells: Cells of the cage.
        repeats: How often the geometry lets a digit repeat in the cage.

    Returns:
        support, fp32 [n], and partner, fp32 [n, n]; zeros if nothing satisfies it.
    """
    table = None if operation == OP_NONE else _multisets(size, mode, num_cells)
    if table is None:
        support = np.full(size, 1 / size, dtype=np.float32)
        return support, np.zeros((size, size), dtype=np.float32)
    holds = _satisfied(table, operation, target)
    holds &= table.counts.max(axis=1) <= repeats
    counts, weight = table.counts[holds], table.orderings[holds]
    single = weight @ counts
    both = np.einsum("m,md,me->de", weight, counts, counts) - np.diag(single)
    support = single / max(weight.sum() * num_cells, 1.0)
    partner = both / np.maximum(single * max(num_cells - 1, 1), 1.0)[:, None]
    return support.astype(np.float32), partner.astype(np.float32)


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
    batch, length = cage_ids.shape
    size, num_cages = math.isqrt(length), cage_ops.shape[1]
    num_cells, repeats = _cage_shapes(cage_ids, num_cages)
    columns = (
        np.broadcast_to(modes[:, None], cage_ops.shape),
        cage_ops,
        np.where(cage_ops == OP_NONE, 0, cage_targets),
        num_cells,
        repeats,
    )
    clues = np.stack([column.ravel() for column in columns], axis=1)
    distinct, which = np.unique(clues, axis=0, return_inverse=True)
    read = [
        read_clue(size, MODES[mode], *(int(value) for value in rest))
        for mode, *rest in distinct
    ]
    which = which.reshape(batch, num_cages)
    own = np.take_along_axis(which, cage_ids, axis=1)
    operations = np.take_along_axis(cage_ops, cage_ids, axis=1)
    caged = operations != OP_NONE
    mates = (cage_ids[:, :, None] == cage_ids[:, None, :]) & caged[:, :, None]
    mates &= ~np.eye(length, dtype=np.bool_)
    return Relations(
        support=torch.from_numpy(np.stack([support for support, _ in read])[own]),
        partner=torch.from_numpy(np.stack([partner for _, partner in read])[own]),
        mates=torch.from_numpy(mates),
        operations=torch.from_numpy(operations),
        num_mates=torch.from_numpy(mates.sum(axis=2)),
    )
