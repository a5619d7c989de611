"""Forensics: the operator that made the first value that is not finite, and why.

    found = first_nonfinite(lambda: loss_fn(model(x), y), model)
    str(found)    exp in gate (forward, model.py:31) overflows fp16: it made inf from
                  11.5, and the largest number of fp16 is 65504

What runs is watched below autocast and autograd. Each infinity or NaN is followed from
operator to operator, and what is blamed is the origin of those that reached the result:
an infinity that was put there on purpose, such as that of a mask, is no fault as long
as the results stay finite. The operator that failed runs once more in fp64, so that
three things can be told apart:

    overflow     a wider exponent holds the result
    underflow    a wider exponent would, because an operand had become 0 for want of it
    nan          the arithmetic has no finite answer: 0 / 0, log 0, inf - inf
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from castwise.errors import FormatError
from castwise.formats import parse_format
from castwise.numerics.forensics.origins import Kind, Origin, Origins
from castwise.numerics.operator_call import Stage, floating

__all__ = ["Kind", "NonFiniteOperator", "first_nonfinite"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NonFiniteOperator:
    """The operator at which a value stopped being finite."""

    op: str
    """ATen name without overload, as the operator table spells it, or `cast`."""

    module: str | None
    """fqn of the module that called it; none outside of the model, as in the loss."""

    stage: Stage
    """Where the call belongs."""

    where: str
    """`file:line` of the user's code; in a backward, that of the forward operator."""

    node: str | None
    """In a backward, what it is the backward of: `sqrt`; none elsewhere."""

    kind: Kind
    """Whether a wider exponent would hold it, would have, or could not."""

    made: Literal["inf", "NaN"]
    """What stands in the result; NaN where both do."""

    format: str
    """Format of the result."""

    inputs_finite: bool
    """Whether it was fed finite values only."""

    largest_input: float
    """Largest finite magnitude among its operands."""

    values: tuple[float, ...]
    """The operands at the first place that is not finite, where the operator works
    place by place; empty where it mixes many numbers."""

    source: str | None
    """What held the infinity or NaN that it was fed: `the weight fc.bias`, or none."""

    underflow: str | None
    """Where the operand became 0, for an underflow: operator and line."""

    @property
    def format_max(self) -> float:
        """Largest finite number of the result's format; infinite where unknown."""
        try:
            return parse_format(self.format).max
        except FormatError:
            return math.inf

    @property
    def is_range(self) -> bool:
        """Whether a format with a wider exponent is a remedy."""
        return self.kind != "nan"

    def __str__(self) -> str:
        of = f" in the backward of {self.node}" if self.node else ""
        place = f"{self.module or 'outside of the model'}, {self.stage}, {self.where}"
        return f"{self.op}{of} ({place}) {self._what()}"

    def _what(self) -> str:
        values = ", ".join(f"{value + 0.0:.6g}" for value in self.values)
        given = values or f"operands up to {self.largest_input:.6g}"
        if not self.inputs_finite:
            return f"made {self.made} of what {self.source or 'it was fed'} held"
        if self.kind == "overflow":
            limit = f"{self.format_max:.6g}"
            return (
                f"overflows {self.format}: it made {self.made} from {given}, and the "
                f"largest number of {self.format} is {limit}"
            )
        if self.kind == "underflow":
            return (
                f"made {self.made} from {given}: an operand had underflowed to 0 in "
                f"{self.underflow}"
            )
        return f"made {self.made} from {given}, in any format"


def first_nonfinite(
    run: Callable[[], Any], model: nn.Module
) -> NonFiniteOperator | None:
    """Run a callable and blame the operator that its infinities and NaNs come from.

    Args:
        run: Computes something with the model; what it returns is what must be finite:
            a loss, gradients, any nesting of tensors. Where it calls `backward` itself,
            the gradients of the model are looked at, too.
        model: Names the modules, weights and buffers.

    Returns:
        The origin of the first value that is not finite, in the order of execution;
        none where everything that came out is finite.
    """
    origins = Origins(model)
    with origins:
        results = run()
    gradients = [w.grad for w in model.parameters() if w.grad is not None]
    return told(origins.blamed((*floating(results), *gradients)))


def told(origin: Origin | None) -> NonFiniteOperator | None:
    """Turn an origin, with what was kept for it, into a result."""
    if origin is None:
        return None
    return NonFiniteOperator(
        op=origin.op,
        module=origin.site.module,
        stage=origin.stage,
        where=origin.site.where,
        node=origin.node,
        kind=origin.kind,
        made=origin.made,
        format=origin.format,
        inputs_finite=origin.inputs_finite,
        largest_input=origin.largest_input,
        values=origin.values,
        source=origin.source,
        underflow=origin.underflow,
    )
