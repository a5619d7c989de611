"""The largest batch, or the longest sequence, whose training step fits a budget.

    found = largest(peak_of, budget=2 << 30, most=4096)
    found.size, found.peak_bytes

`peak_of` tells the peak of a step with a batch of some size; the estimate of
`castwise.memory.estimate` does, and allocates nothing for it. A peak grows with the
size, so the search doubles until it no longer fits and then closes in from both sides,
along the line between them: some eight questions. What is found is confirmed by a real
step, whose peak is measured; if that lies above the budget, the size shrinks in
proportion and is confirmed again. Nothing is run that the estimate does not allow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from castwise.errors import BudgetError, SettingsError

_CONFIRMATIONS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What was found."""

    size: int
    """The largest size that fits."""

    peak_bytes: int
    """The peak of its step, as estimated."""

    budget_bytes: int
    """What it had to fit into."""

    is_most: bool
    """Whether the search ended at the largest size that was allowed."""

    asked: Mapping[int, int] = field(default_factory=dict)
    """Every size that was asked about, and its peak."""

    measured_bytes: int | None = None
    """The peak of one real step; none where it was not confirmed."""


def largest(
    peak_of: Callable[[int], int], *, budget: int, most: int, at_least: int = 1
) -> Fit:
    """Return the largest size whose step fits.

    Args:
        peak_of: Size -> bytes at the peak of a step; grows with the size.
        budget: Bytes that must hold it.
        most: The largest size that is of use.
        at_least: The smallest that is.

    Raises:
        BudgetError: Not even the smallest fits; the message says by how much.
        SettingsError: The sizes are no range, or the budget is none.
    """
    if not 1 <= at_least <= most:
        raise SettingsError(
            f"a fit needs sizes from 1 on, got {at_least} to {most}; raise the largest"
        )
    if budget < 1:
        raise SettingsError(f"a fit needs a budget of bytes, got {budget}")
    asked: dict[int, int] = {}

    def ask(size: int) -> bool:
        asked[size] = asked[size] if size in asked else peak_of(size)
        return asked[size] <= budget

    if not ask(at_least):
        missing = asked[at_least] - budget
        raise BudgetError(
            f"a step of size {at_least} needs {_mib(asked[at_least])} and the budget "
            f"is {_mib(budget)}, {_mib(missing)} too little; recompute blocks, hold "
            "weights or states in fewer bits, or raise the budget"
        )
    fits, too_large = at_least, most + 1
    while fits < most and too_large > most:
        size = min(2 * fits, most)
        if ask(size):
            fits = size
        else:
            too_large = size
    while too_large - fits > 1 and too_large <= most:
        size = _between(fits, too_large, asked, budget)
        if ask(size):
            fits = size
        else:
            too_large = size
    return Fit(
        size=fits,
        peak_bytes=asked[fits],
        budget_bytes=budget,
        is_most=fits == most,
        asked=dict(sorted(asked.items())),
    )


def _between(fits: int, too_large: int, asked: Mapping[int, int], budget: int) -> int:
    """Where the budget lies on the line between two sizes, away from its ends.

    Just above what is known to fit, or just below what is known not to, the line gains
    nothing if it is right; so it is kept a sixteenth of the way from both.
    """
    low, high = asked[fits], asked[too_large]
    span = too_large - fits
    share = (budget - low) / (high - low) if high > low else 0.5
    edge = max(1, span // 16)
    guess = fits + int(share * span)
    return min(max(guess, fits + 1), too_large - min(edge, span - 1))


def confirmed(
    found: Fit, peak_of: Callable[[int], int], measure: Callable[[int], int]
) -> Fit:
    """Run one real step of the size that was found; shrink it until it fits.

    Args:
        found: By `largest`.
        peak_of: As given to it.
        measure: Runs a step with a batch of some size and returns its measured peak.

    Raises:
        BudgetError: The measured peaks stay above the budget.
    """
    size = found.size
    for _ in range(_CONFIRMATIONS):
        measured = measure(size)
        if measured <= found.budget_bytes:
            return replace(
                found, size=size, peak_bytes=peak_of(size), measured_bytes=measured
            )
        if size == 1:
            break
        size = max(1, min(size - 1, int(size * found.budget_bytes / measured)))
    raise BudgetError(
        f"a real step of size {size} took {_mib(measured)} where "
        f"{_mib(found.peak_bytes)} were estimated for size {found.size}; give a "
        "smaller budget"
    )


def resized(batch: Sequence[Any], size: int, *, dim: int = 0) -> tuple[Any, ...]:
    """Return a batch of another size, made by repeating or leaving out.

    Every tensor that is as long along the dimension as the first input becomes `size`
    long; everything else stays as it is.

    Args:
        batch: The model's inputs and, last, the target.
        size: How long.
        dim: 0 for the number of samples, 1 for the length of sequences.

    Raises:
        SettingsError: No input has such a dimension.
    """
    before = size_of(batch, dim=dim)
    leaves, structure = pytree.tree_flatten(tuple(batch))
    found = []
    for leaf in leaves:
        grows = isinstance(leaf, torch.Tensor) and leaf.ndim > dim
        if grows and leaf.shape[dim] == before:
            places = torch.arange(size, device=leaf.device) % before
            found.append(leaf.index_select(dim, places))
        else:
            found.append(leaf)
    whole: tuple[Any, ...] = pytree.tree_unflatten(found, structure)
    return whole


def size_of(batch: Sequence[Any], *, dim: int = 0) -> int:
    """Return how long the inputs of a batch are along a dimension.

    Raises:
        SettingsError: No input has such a dimension.
    """
    for leaf in pytree.tree_leaves(tuple(batch[:-1])):
        if isinstance(leaf, torch.Tensor) and leaf.ndim > dim and leaf.shape[dim]:
            length: int = leaf.shape[dim]
            return length
    raise SettingsError(
        f"a fit along dimension {dim} needs an input tensor that has one; choose "
        "another dimension"
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
