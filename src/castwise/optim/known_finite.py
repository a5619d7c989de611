"""Gradients that are known to be finite, so that a sweep need not read them again.

A training step that has just taken the global norm of all gradients knows that every
one is finite; the check of the sweep would read them once more, which is a tenth of its
time. What is known lasts as long as nobody writes: a gradient must still be the same
tensor, with the same count of writes. Torch counts no write through `.data` or numpy.
So this is for a caller who steps at once, with no code of others in between; an
optimizer with step hooks, and a gradient that is cut over processes, are checked as
ever, and so is every `optimizer.step()` of a plain loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch

from castwise.optim.shards import is_sharded


@final
class KnownFinite:
    """What a caller knows of the gradients of some parameters."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        """Note the gradients as they are now; the caller has found all finite."""
        self._seen = {
            id(parameter): (parameter.grad, _num_writes(parameter.grad))
            for parameter in parameters
            if parameter.grad is not None
        }

    def holds_for(self, parameters: Iterable[torch.Tensor]) -> bool:
        """Return whether all gradients of these parameters are still those."""
        return all(map(self._holds_for_one, parameters))

    def _holds_for_one(self, parameter: torch.Tensor) -> bool:
        gradient, num_writes = self._seen.get(id(parameter), (None, None))
        same = gradient is not None and parameter.grad is gradient
        return same and num_writes == _num_writes(parameter.grad) is not None


def _num_writes(gradient: torch.Tensor | None) -> int | None:
    """Return torch's count of writes; none where it keeps none for us."""
    if gradient is None or is_sharded(gradient) or gradient.is_inference():
        return None
    return gradient._version  # noqa: SLF001 -- torch has no public name for it
