"""What can be known about a Latin square from its hints: exact posteriors.

All squares of size 3, 4 and 5 fit in memory (12, 576, 161,280). Given hints, the
squares that keep them are equally likely, so the chance that a hidden cell holds a rank
is a count. Three figures follow, and no predictor of cells beats them on average:

    floor     the mean entropy of the hidden cells, in nats
    ceiling   the mean chance of the likeliest rank: the Bayes accuracy
    excess    the mean KL divergence from posterior to model: cross-entropy - floor

From size 6 on (8.1e8 squares) there is no such table. A KenKen puzzle with a unique
solution needs none: its floor is 0 and its ceiling 1.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import permutations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from castwise.errors import SettingsError
from castwise.recipes.kenken.batches import PuzzleBatch

LARGEST_SIZE = 5
_CHUNK = 64


@lru_cache(maxsize=3)
def all_squares(size: int) -> Tensor:
    """List every Latin square.

    Args:
        size: Rows, 3 to 5.

    Returns:
        uint8 [S, L] of ranks, in lexicographic order.
    """
    if not 1 <= size <= LARGEST_SIZE:
        raise SettingsError(
            f"exact posteriors need a size up to {LARGEST_SIZE}; got {size}; larger "
            "squares are too many to list."
        )
    rows = np.array(list(permutations(range(size))), dtype=np.uint8)
    agree = (rows[:, None, :] != rows[None, :, :]).all(axis=2)
    chosen = np.arange(len(rows))[:, None]
    allowed = agree
    for _ in range(size - 1):
        parent, following = np.nonzero(allowed)
        chosen = np.concatenate([chosen[parent], following[:, None]], axis=1)
        allowed = allowed[parent] & agree[following]
    return torch.from_numpy(rows[chosen].reshape(len(chosen), size * size))


@lru_cache(maxsize=3)
def _one_hot_squares(size: int) -> Tensor:
    """fp32 [S, L * n]; counts up to 161,280 are exact in fp32."""
    squares = all_squares(size).long()
    return functional.one_hot(squares, size).flatten(1).float()


@torch.no_grad()
def posterior(batch: PuzzleBatch) -> Tensor:
    """Weigh every rank of every cell, given the hints of the batch alone.

    Args:
        batch: Latin squares of size 3 to 5 with hints; cages are not looked at.

    Returns:
        fp64 [B, L, n] on the CPU; rows sum to 1, hints are certain. Hints that no
        square keeps give NaN.
    """
    squares = _one_hot_squares(batch.size)
    tokens, alphabet = batch.tokens.cpu(), batch.alphabet.cpu()
    shown = (tokens[:, :, None] == alphabet[:, None, :]).flatten(1).float()
    parts = []
    for hints in torch.split(shown, _CHUNK):
        keeps = (hints @ squares.T == hints.sum(dim=1, keepdim=True)).float()
        counts = (keeps @ squares).double()
        parts.append(counts / keeps.double().sum(dim=1, keepdim=True))
    return torch.cat(parts).view(len(tokens), -1, batch.size)


def entropy(chances: Tensor) -> Tensor:
    """Return the entropy in nats of the last dimension, fp64 [...]."""
    total: Tensor = torch.special.xlogy(chances, chances).sum(dim=-1)
    return -total


def cross_entropy(chances: Tensor, logits: Tensor) -> Tensor:
    """Return the cross-entropy in nats from chances to logits, fp64 [...]."""
    log_model = logits.double().log_softmax(dim=-1).to(chances.device)
    terms = torch.where(chances > 0, chances * log_model, torch.zeros_like(chances))
    return -terms.sum(dim=-1)
