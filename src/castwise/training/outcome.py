"""What became of one step, and which operator is to blame where it was skipped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from castwise.loss_scale import NonFinite
from castwise.numerics.forensics import Kind, NonFiniteOperator
from castwise.numerics.operator_call import Stage
from castwise.training.replay import Explanation

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
    """The first operator that made something that is not finite. Where the step could
    not be replayed, the one whose backward wrote that gradient; none where not even the
    loss was finite."""

    module: str | None
    """fqn of the module that called the operator; none outside of the model."""

    stage: Stage | None
    """Where the operator ran; none where that is not known."""

    kind: Kind
    """Overflow and underflow are matters of range, and a wider exponent or another
    loss scale is a remedy; nan has none. Without a replay, judged by what the gradient
    holds."""

    where: str | None
    """`file:line` of the user's code that called the operator."""

    scale: float
    """The loss scale that was used."""

    loss: float
    """Sum of the losses given to `backward`, unscaled."""

    gone_at: float | None = None
    """A lower loss scale at which the step would have been finite, if one was found."""

    rank: int | None = None
    """The process that it happened on, where several step together and one of them
    found out."""

    found: NonFiniteOperator | None = None
    """Everything that the replay found out about the operator."""

    def cause(self) -> str:
        """What went wrong, without figures, so that equal causes can be counted."""
        if self.found is None:
            return f"{self.kind} in the gradient of {self.parameter}"
        place = f"{self.module or 'the loss'}, {self.stage}, {self.where}"
        return f"{self.kind}: {self.op} ({place})"


def skipped(
    finding: NonFinite,
    explanation: Explanation,
    *,
    writer: str | None,
    loss: float,
    scale: float,
) -> Skipped:
    """Put together what is known about a skipped step."""
    found = explanation.found
    at = f" at loss scale {scale:g}" if scale != 1 else ""
    because = f"{finding}{at}"
    if not math.isfinite(loss):
        shown = "NaN" if math.isnan(loss) else "inf"
        because = f"the loss is {shown}, so the forward went wrong; {finding}"
        writer = None
    told = str(explanation)
    return Skipped(
        because=f"{because}: {told}" if told else because,
        parameter=finding.parameter,
        op=writer if found is None else found.op,
        module=None if found is None else found.module,
        stage=None if found is None else found.stage,
        kind=(found.kind if found else "overflow" if finding.kind == "inf" else "nan"),
        where=None if found is None else found.where,
        scale=scale,
        loss=loss,
        gone_at=explanation.gone_at,
        rank=explanation.rank,
        found=found,
    )


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
