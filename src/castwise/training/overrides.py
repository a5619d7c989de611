"""Changes of a policy while a run goes on: a module in another precision, and why.

The policy that the run was given stays what it is. An override comes before its rules,
and takes the place of a rule that names the same module:

    changes   promote head to c=fp32,o=fp32 at step 120, release head at step 520
    policy    [rule head: c=fp32,o=fp32] + the rules that were given, and those again

Every change is kept with its step and its reason, and stands in each checkpoint, so
that a resumed run computes as the one that was left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from castwise.policy import Policy, Precision, Rule


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyChange:
    """One entry of the policy's history."""

    step: int
    """Steps that were tried before, skipped ones included."""

    module: str
    """fqn of the module."""

    precision: str | None
    """What it runs in from here on; none where it is as the policy says again."""

    because: str
    """The reason, one line."""

    def __str__(self) -> str:
        to = "the policy's precision" if self.precision is None else self.precision
        return f"step {self.step}: {self.module} to {to}: {self.because}"


def in_force(changes: Iterable[PolicyChange]) -> dict[str, PolicyChange]:
    """The overrides that are left after all changes, by module."""
    left: dict[str, PolicyChange] = {}
    for change in changes:
        left.pop(change.module, None)
        if change.precision is not None:
            left[change.module] = change
    return left


def overridden(policy: Policy, changes: Iterable[PolicyChange]) -> Policy:
    """A policy with the overrides of all changes before its rules."""
    rules = [
        Rule(
            module=change.module,
            precision=Precision.parse(change.precision or ""),
            because=change.because,
            where=f"override at step {change.step}",
        )
        for change in in_force(changes).values()
    ]
    keys = {rule.keys for rule in rules}
    others = [rule for rule in policy.rules if rule.keys not in keys]
    return replace(policy, rules=(*rules, *others))


def records(changes: Iterable[PolicyChange]) -> list[dict[str, Any]]:
    """Changes as plain data; `from_records` reads them."""
    return [asdict(change) for change in changes]


def from_records(found: Iterable[Mapping[str, Any]]) -> tuple[PolicyChange, ...]:
    """Changes from what `records` gave."""
    return tuple(PolicyChange(**each) for each in found)
