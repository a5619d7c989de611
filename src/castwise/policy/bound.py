"""A policy laid over the modules of one model: which rule decides where.

How the precision of a module is found:

1. Of the rules that govern it and hold in the stage and phase, the first wins.
2. What that leaves open comes from the module that contains it, and so on upwards.
3. What is still open comes from the default; what the default leaves out is fp32.

The format and the storage of weights are found among the rules without stage and phase,
because weights have one storage for the whole run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from castwise.decision import Decision
from castwise.errors import PolicyError, UnmatchedRuleError
from castwise.formats import FORMATS
from castwise.policy.keys import (
    PHASES,
    REGEX_MARK,
    STAGES,
    ModuleFacts,
    Rule,
    check_time,
    upwards,
)
from castwise.policy.precision import FP32, Precision
from castwise.wording import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from castwise.policy.rules import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundPolicy:
    """A policy laid over the modules of one model: what holds where."""

    policy: Policy
    """The policy itself."""

    governing: Mapping[str, tuple[Rule, ...]]
    """fqn -> the rules that name the module or one above it, in order."""

    _known: dict[tuple[str, str, str], Precision] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """What was asked before, since laying islands out asks the same again and again."""

    def rule_of(
        self, fqn: str, *, stage: str = "forward", phase: str = "full"
    ) -> Rule | None:
        """Return the rule that decides for a module, or none for the default."""
        check_time(stage, phase)
        return first_rule(self._rules_on(fqn), stage, phase)

    def precision_of(
        self, fqn: str, *, stage: str = "forward", phase: str = "full"
    ) -> Precision:
        """Return the full precision of a module in a stage and phase."""
        key = fqn, stage, phase
        if key not in self._known:
            self._known[key] = self._find_precision(*key)
        return self._known[key]

    def _find_precision(self, fqn: str, stage: str, phase: str) -> Precision:
        check_time(stage, phase)
        default = self.policy.default.over(FP32)
        found, storage = Precision(), Precision()
        for rules in self._rules_upwards(fqn):
            own = first_rule(rules, stage, phase)
            always = next((rule for rule in rules if rule.holds_always), None)
            found = found.over(own.precision) if own else found
            storage = storage.over(always.precision) if always else storage
        found, param = found.over(default), storage.over(default).param
        return found if found.param == param else replace(found, param=param)

    def storage_of(self, fqn: str) -> Decision[str | None]:
        """Return how the weights of a module are stored, and why.

        Nothing stands beside weights in fp32 or fp64. Weights in 16 bits are stored as
        the policy says, or else so that no update is lost: `split` in bf16, `master` in
        fp16, whose exponent is too short to be split.
        """
        fmt = self.precision_of(fqn).param
        assert fmt is not None
        if fmt not in _DEFAULT_STORAGE:
            return Decision(None, f"{fmt} holds what an update adds")
        lost = FORMATS[fmt].eps / 4  # half the spacing just below a power of two
        lost_updates = f"lose updates below {lost:.1e} of their weight"
        asked = self._asked_storage(fqn)
        if asked is None:
            because = f"{fmt} alone would {lost_updates}"
            return Decision(_DEFAULT_STORAGE[fmt], because)
        if asked.value == "plain":
            return Decision("plain", f"{asked.because}; weights will {lost_updates}")
        return Decision(asked.value, asked.because)

    def _asked_storage(self, fqn: str) -> Decision[str] | None:
        for rules in self._rules_upwards(fqn):
            always = next((rule for rule in rules if rule.holds_always), None)
            if always is not None and always.storage is not None:
                return Decision(always.storage, always.because or always.label)
        policy = self.policy
        if policy.storage is None:
            return None
        return Decision(policy.storage, f"{policy.where or policy.name} says so")

    def explain(self, fqn: str) -> str:
        """Say what precision a module has, and which rule decides.

        One line for an ordinary forward, and one for each stage and phase where
        another rule decides.
        """
        usual = self.rule_of(fqn)
        lines = [self._reason(fqn, "forward", "full", "")]
        decided: dict[int, list[tuple[str, str]]] = {}
        for stage, phase in ((s, p) for p in PHASES for s in STAGES):
            rule = self.rule_of(fqn, stage=stage, phase=phase)
            if rule is not usual:
                decided.setdefault(id(rule), []).append((stage, phase))
        lines += [
            self._reason(fqn, *times[0], f" in {_when(times)}")
            for times in decided.values()
        ]
        return "\n".join(lines)

    def explain_op(self, op: str, *, phase: str = "full") -> str:
        """Say how an operator treats formats, and which rule or entry decides."""
        return self.policy.explain_op(op, phase=phase)

    def _reason(self, fqn: str, stage: str, phase: str, when: str) -> str:
        rule = self.rule_of(fqn, stage=stage, phase=phase)
        precision = self.precision_of(fqn, stage=stage, phase=phase)
        by = rule.label if rule else f"the default of {self.policy.name}"
        because = f", because {rule.because}" if rule and rule.because else ""
        storage = self.storage_of(fqn)
        held = "" if when or storage.value is None else f"; weights stored as {storage}"
        return f"{fqn or 'the whole model'}{when}: {precision} by {by}{because}{held}"

    def _rules_upwards(self, fqn: str) -> Iterator[tuple[Rule, ...]]:
        """Yield the rules on a module, then those on what contains it."""
        yield self._rules_on(fqn)
        for place in list(upwards(fqn))[1:]:
            yield self.governing.get(place, ())

    def _rules_on(self, fqn: str) -> tuple[Rule, ...]:
        found = self.governing.get(fqn)
        if found is None:
            raise PolicyError(
                f"no module {fqn!r} in the model that {self.policy.name} is laid over"
                f"{did_you_mean(fqn, self.governing)}"
            )
        return found


_DEFAULT_STORAGE = {"bf16": "split", "fp16": "master"}
"""Formats of weights that lose updates, and what castwise chooses for them."""


def _when(times: Sequence[tuple[str, str]]) -> str:
    """Say `backward`, `predict`, or `predict forward and update` for those times."""
    stages = [stage for stage in STAGES if any(stage == each for each, _ in times)]
    phases = [phase for phase in PHASES if any(phase == each for _, each in times)]
    if len(times) < len(stages) * len(phases):
        return ", ".join(f"{phase} {stage}" for stage, phase in times)
    shown = [] if len(phases) == len(PHASES) else [" and ".join(phases)]
    shown += [] if len(stages) == len(STAGES) else [" and ".join(stages)]
    return " ".join(shown)


def bind_rules(
    rules: Sequence[Rule], facts: Sequence[ModuleFacts]
) -> dict[str, tuple[Rule, ...]]:
    """Return for every fqn the rules that govern it, in order.

    Raises:
        UnmatchedRuleError: A rule on modules names none of them.
    """
    by_fqn = {"": ModuleFacts(fqn="")} | {each.fqn: each for each in facts}
    named = {
        fqn: {rank for rank, rule in enumerate(rules) if rule.names(each)}
        for fqn, each in by_fqn.items()
    }
    for rank, rule in enumerate(rules):
        if not any(rank in ranks for ranks in named.values()):
            raise UnmatchedRuleError(_unmatched(rule, list(by_fqn.values())))
    governing: dict[str, tuple[Rule, ...]] = {}
    for fqn in by_fqn:
        ranks = set().union(*(named.get(place, ()) for place in upwards(fqn)))
        governing[fqn] = tuple(rules[rank] for rank in sorted(ranks))
    return governing


def first_rule(rules: Iterable[Rule], stage: str, phase: str) -> Rule | None:
    """Return the first rule on modules that holds in the stage and phase."""
    return next(
        (rule for rule in rules if rule.op is None and rule.holds_in(stage, phase)),
        None,
    )


def _unmatched(rule: Rule, facts: Sequence[ModuleFacts]) -> str:
    """Say what the rule looked for, and what in the model comes nearest."""
    near = ""
    if rule.module is not None and not rule.module.startswith(REGEX_MARK):
        near = did_you_mean(rule.module, [each.fqn for each in facts], cutoff=0.5)
    if not near and rule.type is not None:
        near = did_you_mean(rule.type, [name for each in facts for name in each.types])
    return (
        f"{rule.label} matches none of the {len(facts)} modules{near}; correct the "
        "rule or delete it"
    )
