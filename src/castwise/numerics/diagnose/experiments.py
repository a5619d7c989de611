"""Experiments of a diagnosis: a format taken apart, a trail of infinities, an update.

A format is two things: how many digits, and how far the exponent reaches. `Emulated`
gives a replay in float64 any combination of the two, by rounding what each operator
returns. If an error goes away when only the exponent gets wider, it was range; if it
goes away with more digits, it was rounding.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch.utils._pytree import tree_map

from castwise.errors import TargetError
from castwise.formats import Format
from castwise.numerics.forensics.origins import Origin, Origins
from castwise.numerics.forensics.watched_call import WatchedCall
from castwise.numerics.operator_call import is_view
from castwise.numerics.replay import SameDraws, Wide, first_line
from castwise.rounding import round_nearest

ENDS = {"fp64": 1e150, "complex128": 1e150, "fp32": 1e18, "complex64": 1e18}
"""Operands above this may overflow when they are multiplied, in the widest formats."""


def taken_apart(exponent_bits: int, mantissa_bits: int) -> Format:
    """A format of any exponent and mantissa."""
    return Format(
        name=f"e{exponent_bits}m{mantissa_bits}",
        exponent_bits=exponent_bits,
        mantissa_bits=mantissa_bits,
    )


class Emulated(SameDraws):  # type: ignore[no-untyped-call]
    """Rounds what every operator of a float64 replay returns to a format."""

    def __init__(self, fmt: Format) -> None:
        super().__init__()
        self._format = fmt

    def rounded(self, value: Any) -> Any:
        """Return a float64 or complex128 tensor rounded; anything else as it is."""
        if not isinstance(value, torch.Tensor):
            return value
        if value.is_complex():
            parts = torch.view_as_real(value.detach().resolve_conj())
            return torch.view_as_complex(round_nearest(parts.double(), self._format))
        if value.dtype == torch.float64:
            return round_nearest(value.detach(), self._format)
        return value

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(func, HigherOrderOperator) or is_view(func):
            return result
        if func._schema.is_mutable:  # noqa: SLF001 -- the schema has no public name
            if isinstance(result, torch.Tensor):
                result.copy_(self.rounded(result))
            return result
        return tree_map(self.rounded, result)


class Trail(Origins):  # type: ignore[no-untyped-call]
    """Where infinities and NaNs began, and at which call of that operator."""

    def __init__(self, model: nn.Module | None) -> None:
        super().__init__(nn.Module() if model is None else model)
        self._num_calls: Counter[tuple[str, str]] = Counter()
        self._calls: dict[int, int] = {}

    def call_of(self, origin: Origin) -> int:
        """The how-manieth call of its operator from its line it was, from 1 on."""
        return self._calls.get(origin.order, 1)

    @property
    def first(self) -> Origin | None:
        """The first operator that made one of finite inputs and was not meant to."""
        found = (e for e in self._origins if e.inputs_finite and not e.meant)
        return next(found, None)

    def _see(self, call: WatchedCall, site: Any) -> None:
        if site is not None:
            self._num_calls[call.name, site.where] += 1
        super()._see(call, site)

    def _new(self, call: WatchedCall, bad: list[torch.Tensor], site: Any) -> Origin:
        origin = super()._new(call, bad, site)
        key = origin.op, origin.site.where
        self._calls[origin.order] = self._num_calls[key] or 1
        return origin


def is_range(origin: Origin) -> bool:
    """Whether a wider exponent would hold what an operator made.

    For the widest formats there is none to try; operands near the end of the range
    are then what tells.
    """
    near_the_end = origin.largest_input > ENDS.get(origin.format, float("inf"))
    return origin.kind != "nan" or near_the_end


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What one step of the optimizer did to one weight."""

    parameter: str
    """Its name."""

    format: str
    """What it is held in."""

    unmoved: float
    """Share of its numbers that should have moved and did not."""

    size: float
    """Median of the update relative to the number, in float64."""


def copies(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Copy a model and its optimizer together, so that they keep to each other.

    Raises:
        TargetError: They cannot be copied.
    """
    try:
        return copy.deepcopy((model, optimizer))
    except (RuntimeError, TypeError) as error:
        raise TargetError(
            f"a diagnosis needs copies of the model and its optimizer, and they cannot "
            f"be copied: {first_line(error)}; leave the optimizer out"
        ) from error


def widen_in_place(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Hold weights and optimizer states in float64; parameters keep their identity."""
    widen = Wide(None, "fp64").widen
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = widen(tensor.data)
        for state in optimizer.state.values():
            for name, value in state.items():
                state[name] = widen(value)
