"""What the clues say about each cell, as relations that a model can read.

A clue is arithmetic: `x 12` in two cells of a 6 x 6 square in STANDARD digits means the
ranks {1, 5} or {2, 3}. Nobody wants a network to learn the multiplication table, and
in three alphabets at that. So each clue is read once, exactly and alone: all multisets
of digits that satisfy it, each weighed by the number of its orderings, give

    support[d]      the chance that a cell of the cage holds rank d
    partner[d, e]   the chance that another given cell of the cage holds e if it holds d
    required[d, e]  whether some other cell of the cage must hold e if it holds d

and the numbers of sums and products themselves stand beside them (`terms`): what rank d
gives to the target and what it leaves to the other cells.

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

NUM_TERMS = 4
_MOST_MULTISETS = 50_000


class Relations(NamedTuple):
    """The relations of a batch of B puzzles with L = n * n cells."""

    support: Tensor
    """fp32 [B, L, n]: chance of each rank by the cell's own clue."""

    partner: Tensor
    """fp32 [B, L, n, n]: chance of e in a mate if the cell holds d; 0 without one."""

    mates: Tensor
    """bool [B, L, L]: another cell of the same cage."""

    required: Tensor
    """fp32 [B, L, n, n]: 1 where some mate must hold e if the cell holds d."""

    terms: Tensor
    """fp32 [B, L, n, 4]: what the rank gives to the target and what it leaves to the
    mates, both in units of the size (sums) or logarithms (products), and whether each
    of the two is negative (products)."""

    operations: Tensor
    """int64 [B, L]: operation code of the cell's clue, 0 without one."""

    num_mates: Tensor
    """int64 [B, L]: other cells of the same cage."""


class Clue(NamedTuple):
    """One clue, read alone; the fields are those of `Relations` for a cell of it."""

    support: NDArray[np.float32]
    """fp32 [n]; zeros if nothing satisfies the clue."""

    partner: NDArray[np.float32]
    """fp32 [n, n]."""

    required: NDArray[np.float32]
    """fp32 [n, n]."""

    terms: NDArray[np.float32]
    """fp32 [n, 4]."""


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


def _terms(
    values: NDArray[np.int64], operation: int, target: int
) -> NDArray[np.float32]:
    """List what each digit gives to a sum or product and leaves: fp32 [n, 4]."""
    out = np.zeros((len(values), NUM_TERMS), dtype=np.float32)
    if operation in (OP_GIVEN, OP_ADD):
        out[:, 0] = values / len(values)
        out[:, 1] = (target - values) / len(values)
    elif operation == OP_MUL:
        given = np.log(np.maximum(np.abs(values), 1))
        out[:, 0] = given / 2
        out[:, 1] = (math.log(max(abs(target), 1)) - given) / 2
        out[:, 2] = values < 0
        out[:, 3] = (values < 0) != (target < 0)
    return out


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
    nothing = np.zeros((size, size), dtype=np.float32)
    terms = _terms(digits(size, mode), operation, target)
    if table is None:
        support = np.full(size, 1 / size, dtype=np.float32)
        return Clue(support=support, partner=nothing, required=nothing, terms=terms)
    holds = _satisfied(table, operation, target)
    holds &= table.counts.max(axis=1) <= repeats
    counts, weight = table.counts[holds], table.orderings[holds]
    single = weight @ counts
    both = np.einsum("m,md,me->de", weight, counts, counts) - np.diag(single)
    with_rank = (counts > 0).astype(np.float64)
    lacking = counts[:, None, :] <= np.eye(size)  # [M, d, e]: no e beside one d
    escapes = np.einsum("md,mde->de", with_rank, lacking)
    mates = max(num_cells - 1, 1)
    return Clue(
        support=(single / max(weight.sum() * num_cells, 1.0)).astype(np.float32),
        partner=(both / np.maximum(single * mates, 1.0)[:, None]).astype(np.float32),
        required=((escapes == 0) & (single > 0)[:, None]).astype(np.float32),
        terms=terms,
    )


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
    support, partner, required, terms = (
        torch.from_numpy(np.stack(tables)[own]) for tables in zip(*read, strict=True)
    )
    return Relations(
        support=support,
        partner=partner,
        required=required,
        terms=terms,
        mates=torch.from_numpy(mates),
        operations=torch.from_numpy(operations),
        num_mates=torch.from_numpy(mates.sum(axis=2)),
    )
