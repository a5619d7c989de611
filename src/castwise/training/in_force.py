"""The precision that was asked for, beside the one that is in force."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from castwise.decision import Decision
from castwise.dtypes import format_of
from castwise.errors import FormatError
from castwise.fitting import emulated

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from castwise.policy.rules import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionInForce:
    """What was asked for and what runs; goes into logs, checkpoints and reports."""

    asked: Policy
    """The policy that was given."""

    effective: Policy
    """The policy that is in force; another one only where a fallback was allowed."""

    fallbacks: tuple[Decision[str], ...]
    """The formats in force instead of ones that the device cannot do, and why."""

    device: str
    """Where it runs."""

    phase: str
    """The phase in force."""

    compute: str
    """What modules compute in outside of islands."""

    islands: str
    """One line on the modules that compute otherwise."""

    parameters: Mapping[str, int]
    """Format -> how many numbers of the model's weights are held in it."""

    storage: tuple[Decision[str], ...] = ()
    """What stands beside weights in 16 bits, and why; empty where none are."""

    loss_scale: Decision[str]
    """The kind of loss scale, and why."""

    @property
    def emulated(self) -> tuple[Decision[str], ...]:
        """The formats that are computed by emulation, and how."""
        return emulated(self.effective)

    def summary(self) -> str:
        """One line for a log."""
        held = ", ".join(f"{n:,} in {fmt}" for fmt, n in self.parameters.items())
        lines = [
            f"{self.effective.name}: compute in {self.compute} on {self.device}",
            f"weights {held}",
            self.islands,
            f"loss scale {self.loss_scale}",
        ]
        lines[2:2] = [f"stored as {decision}" for decision in self.storage]
        lines.extend(f"emulation: {decision}" for decision in self.emulated)
        lines.extend(f"fallback: {decision}" for decision in self.fallbacks)
        return "; ".join(lines)


def held_formats(model: nn.Module) -> dict[str, int]:
    """Count the model's weights by the format that they are held in."""
    held: Counter[str] = Counter()
    for weight in model.parameters():
        held[_name_of(weight.dtype)] += weight.numel()
    return dict(held)


def _name_of(dtype: torch.dtype) -> str:
    try:
        return format_of(dtype)
    except FormatError:  # complex and integer weights have no row in the table
        return str(dtype).removeprefix("torch.")
