"""Watches what a run keeps between steps: weights and moments that nobody can mend.

A gradient that is not finite is gone after its step. A weight or a moment that is not
finite stays: every later step would be skipped, or, worse, carry a NaN from a moment
into the weights. So the first steps after anything but an update wrote to the moments
(a checkpoint, somebody's hand) look at all of them, and a skipped step looks at the
weights. While only updates write, nothing is read but the version counters of torch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping

import torch

from castwise.distributed.gradients import local_part, unscale
from castwise.errors import LossScaleError
from castwise.loss_scale import NonFinite, NoScale, first_non_finite

SQUARE_LIMIT = math.sqrt(torch.finfo(torch.float32).max)
"""A gradient beyond it is finite, and its square in a second moment is not."""

_version = operator.attrgetter("_version")  # torch has no public name for it

_WIDE = (torch.float64, torch.complex128)


class StateWatch:
    """Watches the moments of one optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._seen: tuple[int, int, int] | None = None

    def check(self, weights: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Refuse to step by a moment that is not finite; called before an update.

        Args:
            weights: Returns them by name; asked only when somebody wrote to a moment.

        Raises:
            LossScaleError: A moment is not finite; no weight was touched.
        """
        if self._fingerprint() == self._seen:
            return
        moments = {
            f"{kind} of {name}": moment
            for name, weight in weights().items()
            for kind, moment in self._moments(weight)
        }
        found = first_non_finite(moments)
        if found is not None:
            raise LossScaleError(
                f"the optimizer's {found.parameter} holds {found.kind}, which would go "
                "into its weight by this step and stay in every later one; load the "
                "last checkpoint"
            )

    def remember(self) -> None:
        """Take the moments as an update left them."""
        self._seen = self._fingerprint()

    def _fingerprint(self) -> tuple[int, int, int]:
        """A number that changes when others write to a moment, or exchange it."""
        found = [
            value
            for state in self._optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
        places = hash(tuple(map(id, found)))
        return len(found), sum(map(_version, found)), places

    def _moments(self, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        for kind, value in self._optimizer.state.get(weight, {}).items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                yield str(kind), local_part(value)


def refuse_poisoned_weights(weights: Mapping[str, torch.Tensor]) -> None:
    """Stop a run that no later step could mend; called when a step was skipped.

    Of weights that are cut over processes all processes hear, and all of them stop.

    Raises:
        LossScaleError: A weight is not finite.
    """
    found = unscale(NoScale(), weights)
    if found is not None:
        raise LossScaleError(
            f"the weight {found.parameter!r} itself holds {found.kind}, so every step "
            "that uses it will be skipped; load the last checkpoint"
        )


def too_large_to_square(
    gradients: Mapping[str, torch.Tensor], norm: float
) -> NonFinite | None:
    """Find a gradient whose square overflows the fp32 of a second moment.

    Args:
        gradients: As they will be given to the optimizer, finite and clipped.
        norm: Their global norm before clipping, which is known already.
    """
    if norm < SQUARE_LIMIT:
        return None
    parts = {name: local_part(each).detach() for name, each in gradients.items()}
    low = {n: each for n, each in parts.items() if each.dtype not in _WIDE}
    for name, part in low.items():
        values = part._values() if part.is_sparse else part  # noqa: SLF001 -- the only view
        largest = float(values.abs().max()) if values.numel() else 0.0
        if largest >= SQUARE_LIMIT:
            cause = f"it is {largest:.3g}, whose square fp32 does not hold"
            return NonFinite(parameter=name, kind="inf", cause=cause)
    return None
