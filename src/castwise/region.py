"""The region of a phase: what a policy puts into force around a model that it is on.

    region = Region.of(policy, "full", (applied,))
    with region.entered("cpu"):
        loss = loss_fn(model(x), y)

Islands hold by themselves. A region is what they stand in: autocast by the policy's
operator table in the low format, or tf32 products, or nothing at all.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from castwise.autocast import autocast, check_operators
from castwise.fp8_products import CARRIER, FP8
from castwise.islands.border import LOW
from castwise.islands.products import ProductsHold
from castwise.policy.keys import PHASES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from castwise.islands import AppliedPolicy
    from castwise.policy.ops import OperatorTable
    from castwise.policy.rules import Policy


def refuse_unknown_operators(policy: Policy) -> None:
    """Refuse a policy that names an operator which PyTorch does not have.

    Raises:
        RuleError: Naming the rule, and the nearest names that PyTorch has.
    """
    for table in dict.fromkeys(map(policy.operator_table, PHASES)):
        check_operators(table)


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """What one phase puts into force around the model."""

    compute: str
    """What modules compute in outside of islands."""

    low: str | None
    """The low format of the region, if there is one anywhere."""

    table: OperatorTable
    """What runs low in it."""

    fp8: bool = False
    """Whether products in it emulate fp8."""

    @classmethod
    def of(
        cls, policy: Policy, phase: str, applied: Sequence[AppliedPolicy] = ()
    ) -> Self:
        """Work out the region of a phase, with the islands that stand in it."""
        asked = policy.base_precision(phase=phase).compute
        assert asked is not None
        compute = CARRIER if asked in FP8 else asked  # the root's border does the rest
        lows = (
            compute if compute in LOW else None,
            *(a.low_format() for a in applied),
        )
        return cls(
            compute=compute,
            low=next((low for low in lows if low is not None), None),
            table=policy.operator_table(phase),
            fp8=any(each.emulated for each in applied),
        )

    @property
    def is_idle(self) -> bool:
        """Whether entering it changes nothing."""
        return self.low is None and self.compute != "tf32"

    @contextlib.contextmanager
    def entered(self, device_type: str) -> Iterator[None]:
        """Put the region into force on a kind of device."""
        with contextlib.ExitStack() as stack:
            if self.low is not None:
                stack.enter_context(
                    autocast(device_type, self.low, self.table, fp8=self.fp8)
                )
                if self.low != self.compute:  # islands alone are low, and enter again
                    stack.enter_context(torch.autocast(device_type, enabled=False))
            if self.compute == "tf32":
                stack.enter_context(ProductsHold(device_type, "tf32"))
            yield
