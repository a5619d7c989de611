"""Handovers: in which formats tensors really go from module to module when all is low.

In a low region not everything is low. Where products ran, tensors are in 16 bits and
the operators behind them go on in 16 bits; a residual stream or a table may stay in
fp32. A unit must be replayed with its inputs in the formats that it will be given, and
with inner modules that hand out what they will hand out; so one step is run with every
module in the default and its formats are noted.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch

from castwise.numerics.search.bench import Bench
from castwise.numerics.search.structure import floating_in
from castwise.numerics.search.visits import Visitor, Visits
from castwise.policy.rules import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class Handovers:
    """The formats that cross the borders of modules."""

    inputs: dict[str, list[tuple[torch.dtype, ...]]] = field(default_factory=dict)
    """Module -> for each call the formats of its floating inputs."""

    outputs: dict[str, tuple[torch.dtype, ...]] = field(default_factory=dict)
    """Module -> the formats of its floating outputs."""

    def given(self, fqn: str, at: int) -> tuple[torch.dtype, ...]:
        """What a call is given; nothing where it was not seen."""
        calls = self.inputs.get(fqn, [])
        return calls[at] if at < len(calls) else ()

    def hands_out(self, fqn: str, dtype: torch.dtype) -> bool:
        """Whether a module hands out a format."""
        return dtype in self.outputs.get(fqn, ())


class _Notes(Visitor):
    def __init__(self) -> None:
        self.inputs: defaultdict[str, list[tuple[torch.dtype, ...]]] = defaultdict(list)
        self.outputs: dict[str, tuple[torch.dtype, ...]] = {}

    def enters(self, fqn: str, at: int, inputs: tuple[Any, ...]) -> None:
        del at
        self.inputs[fqn].append(tuple(each.dtype for each in floating_in(*inputs)))

    def leaves(self, fqn: str, at: int, outputs: list[torch.Tensor]) -> None:
        del at
        self.outputs[fqn] = tuple(each.dtype for each in outputs)


def observe_handovers(bench: Bench, policy: Policy, at: int) -> Handovers:
    """Run one batch forward under a policy and note the formats."""
    notes = _Notes()
    visits = Visits(bench.model, notes)
    with bench.under(policy) as region, visits.watched():
        bench.step(region, bench.batches[at])
    return Handovers(inputs=dict(notes.inputs), outputs=notes.outputs)
