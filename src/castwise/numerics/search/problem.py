"""The knapsack of one budget, made from scores; and its solution as a policy.

What a module loads of the budget adds up, in squares. An operator that runs low loads
the low modules that call it, so whether it pays depends on which of them are high
anyway: for each set of low operators the modules are solved for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from castwise.numerics.search.assignment import chosen_by_unit, policy_of
from castwise.numerics.search.budget import Budget
from castwise.numerics.search.candidates import Candidate, default_of, parse_candidates
from castwise.numerics.search.scores import Scores
from castwise.numerics.search.solve import solve
from castwise.policy.precision import FP32
from castwise.policy.rules import Policy

Choice = tuple[int, ...]
"""For each group the place of its candidate."""

_MOST_OPERATORS = 5  # that save the most; all sets of them are solved for


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A low operator in a low module that calls it."""

    operator: int
    """The group of the operator."""

    caller: int
    """The group of the module."""

    load: float
    """The squared share of the budget that this uses."""


class Problem:
    """The knapsack of one budget, made from scores.

    Args:
        scores: What was learnt about the model.
        budget: The errors allowed.
    """

    pairs: tuple[Pair, ...] = ()
    """What operators load in the modules that call them."""

    low = 0
    """The place of the default among the candidates."""

    def __init__(self, scores: Scores, budget: Budget) -> None:
        self.scores, self.budget = scores, budget
        self.candidates: tuple[Candidate, ...] = parse_candidates(scores.candidates)
        self.costs = [
            [scores.group_cost(group, name) for name in scores.candidates]
            for group in scores.groups
        ]
        self.loads = self._loads()
        self.low = self.candidates.index(default_of(self.candidates))
        self.pairs = tuple(self._pairs())
        unscored = set(scores.candidates) - set(scores.scored)
        rest = max(scores.rest[k] / limit for k, limit in budget.limits.items())
        self.constant = rest * rest if unscored else 0.0

    def _loads(self) -> list[list[float]]:
        """The squared share of the budget that each candidate uses, the worst kind."""
        kinds = [
            (self.scores.squared_errors(kind), limit * limit)
            for kind, limit in self.budget.limits.items()
        ]
        return [
            [
                max(errors[at][name] / limit for errors, limit in kinds)
                for name in self.scores.candidates
            ]
            for at in range(len(self.scores.groups))
        ]

    def _pairs(self) -> Iterator[Pair]:
        """What each operator loads in each group that calls it."""
        kinds = [
            (self.scores.operator_errors(kind), limit * limit)
            for kind, limit in self.budget.limits.items()
        ]
        home = {
            self.scores.units[at].fqn: group
            for group, members in enumerate(self.scores.groups)
            for at in members
        }
        for op, fqn in kinds[0][0]:
            load = max(errors[op, fqn] / limit for errors, limit in kinds)
            if math.isfinite(load):
                yield Pair(operator=home[op], caller=home[fqn], load=load)

    def active(self, choice: Choice) -> Iterator[tuple[int, Pair]]:
        """Low operators in low modules that call them, with their places in `pairs`."""
        for at, pair in enumerate(self.pairs):
            if choice[pair.operator] == choice[pair.caller] == self.low:
                yield at, pair

    def solve(
        self, usage: float, loads: Sequence[Sequence[float]] | None = None
    ) -> Choice | None:
        """The cheapest choice whose predicted use of the budget is at most `usage`.

        Args:
            usage: The share of the budget that may be used.
            loads: What is believed now, instead of what was scored.
        """
        capacity = usage * usage - self.constant
        found = [
            solve(self.costs, each, capacity)
            for each in self._with_operators(loads or self.loads)
        ]
        return min(
            (choice for choice in found if choice is not None),
            key=self.cost,
            default=None,
        )

    def _with_operators(
        self, loads: Sequence[Sequence[float]]
    ) -> Iterator[Sequence[Sequence[float]]]:
        """The loads of modules for each set of operators that are low.

        Where an operator is low, the low modules that call it bear its load.
        """
        called = dict.fromkeys(pair.operator for pair in self.pairs)
        dearest = sorted(called, key=lambda at: -max(self.costs[at]))
        asked = dearest[:_MOST_OPERATORS]
        for lows in itertools.product((False, True), repeat=len(asked)):
            is_low = dict(zip(asked, lows, strict=True))
            found = [list(row) for row in loads]
            for at in called:
                for one in range(len(found[at])):
                    if (one == self.low) != is_low.get(at, False):
                        found[at][one] = math.inf
            for pair in self.pairs:
                if is_low.get(pair.operator, False):
                    found[pair.caller][self.low] += pair.load
            yield found

    def predicted(self, choice: Choice) -> float:
        """The predicted use of the budget."""
        loads = sum(self.loads[at][one] for at, one in enumerate(choice))
        called = sum(pair.load for _, pair in self.active(choice))
        return math.sqrt(loads + called + self.constant)

    def cost(self, choice: Choice) -> float:
        """The cost of a choice."""
        return sum(self.costs[at][one] for at, one in enumerate(choice))

    def highest_cost(self) -> float:
        """The cost of all modules with the most digits; operators then cost nothing."""
        return sum(
            self.costs[at][one]
            for at, one in enumerate(self.safest())
            if not self.scores.units[self.scores.groups[at][0]].op
        )

    def cheapest(self) -> Choice:
        """Every group in its cheapest candidate that can be taken."""
        return tuple(
            min(
                range(len(costs)),
                key=lambda one: (math.isinf(loads[one]), costs[one], loads[one]),
            )
            for costs, loads in zip(self.costs, self.loads, strict=True)
        )

    def safest(self) -> Choice:
        """Every group in the candidate with the smallest error."""
        names = self.scores.candidates
        digits = [candidate.digits for candidate in self.candidates]
        return tuple(
            max(
                range(len(names)),
                key=lambda one: (not math.isinf(loads[one]), digits[one]),
            )
            for loads in self.loads
        )

    def spread(self, choice: Choice) -> dict[str, Candidate]:
        """Unit -> its candidate; an operator that nothing low calls stays as it is."""
        units, default = self.scores.units, default_of(self.candidates)
        chosen = chosen_by_unit(units, self.scores.groups, choice, self.candidates)
        most = max(self.candidates, key=lambda each: each.digits)
        idle = {
            unit.fqn: most
            for unit in units
            if unit.op and all(chosen[caller] != default for caller in unit.names)
        }
        return chosen | idle

    def policy(self, choice: Choice, *, name: str = "searched") -> Policy:
        """Write a choice as a policy, with the reason of every rule."""
        scores = self.scores
        chosen = self.spread(choice)
        default = default_of(self.candidates)
        used = self.unit_usage()

        def because(units: tuple[str, ...]) -> str:
            forced = [self.forced(fqn) for fqn in units]
            if units and all(forced):
                return forced[0]
            share = math.sqrt(sum(used[fqn][default.name] ** 2 for fqn in units))
            said = self._said(share, default.name)
            fits = units and chosen[units[0]] == default
            return f"may stay low, {said}" if fits else said

        low = any(
            "fp16" in (each.compute, each.compute_backward) for each in chosen.values()
        )
        modules = {u.fqn: chosen[u.fqn] for u in scores.units if not u.op}
        if {each.name for each in modules.values()} == {"fp32"}:
            return Policy(name=name, default=FP32)
        found = policy_of(scores.tree, modules, default, because=because, name=name)
        for unit in scores.units:
            if unit.op and chosen[unit.fqn] == default:
                found = found.with_rule(
                    op=unit.op, category="low", because=because((unit.fqn,))
                )
        return found.with_loss_scale("dynamic") if low else found

    def _said(self, share: float, name: str) -> str:
        """What rounding in a format uses of the budget, as the reason of a rule."""
        limits = self.budget.limits
        if len(limits) > 1 or "measure" in limits:
            return f"{share:.2g} times the budget {self.budget} in {name} alone"
        ((kind, limit),) = limits.items()
        return f"{kind} error {share * limit:.1e} in {name}, of budget {limit:g}"

    def unit_usage(self) -> dict[str, dict[str, float]]:
        """Unit -> candidate -> share of the budget; a group's counts for each in it."""
        found = self._module_usage()
        name = self.candidates[self.low].name
        for group in {pair.operator for pair in self.pairs}:
            load = sum(pair.load for pair in self.pairs if pair.operator == group)
            (at,) = self.scores.groups[group]
            found[self.scores.units[at].fqn][name] = math.sqrt(load)
        return found

    def _module_usage(self) -> dict[str, dict[str, float]]:
        return {
            self.scores.units[at].fqn: {
                name: math.sqrt(load)
                for name, load in zip(self.scores.candidates, loads, strict=True)
            }
            for group, loads in zip(self.scores.groups, self.loads, strict=True)
            for at in group
        }

    def forced(self, fqn: str) -> str:
        """Why the default cannot be taken for a unit, or nothing."""
        score = self.scores.values[fqn].get(self.scores.default)
        return "" if score is None else score.forced
