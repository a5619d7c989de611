"""What became of one step, and which operator is to blame where it was skipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch.autograd.graph import Node


@dataclass(frozen=True, kw_only=True, slots=True)
class Stepped:
    """The weights were updated."""

    loss: float
    """Sum of the losses given to `backward`, unscaled."""

    gradient_norm: float
    """Global norm of the gradients, unscaled, before clipping."""

    clipped: bool
    """Whether the gradients were scaled down."""

    scale: float
    """The loss scale that was used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """The weights were left alone, because a gradient was not finite."""

    because: str
    """One sentence."""

    parameter: str
    """The first parameter whose gradient is not finite."""

    op: str | None
    """The operator whose backward wrote that gradient; none where the loss itself was
    not finite, because then the forward went wrong before."""

    scale: float
    """The loss scale that was used."""

    loss: float
    """Sum of the losses given to `backward`, unscaled."""


def writer_of(weight: torch.Tensor, last: Node | None) -> str | None:
    """Name the operator whose backward writes the gradient of a weight."""
    pending, seen = [last], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            inner = _through_casts(following)
            if inner is not None and getattr(inner, "variable", None) is weight:
                return node.name().removesuffix("0").removesuffix("Backward")
            pending.append(following)
    return None


def _through_casts(node: Node | None) -> Node | None:
    """Follow the nodes that only change format or orientation of a weight."""
    while node is not None and node.name() in ("ToCopyBackward0", "TBackward0"):
        node = node.next_functions[0][0]
    return node
