"""What one rule looks at: its keys, how they match a module, and what they must not be.

A rule is keys plus one value. The keys say where it holds:

    module     a glob on the fqn (`encoder.*.norm`, `*` crosses dots), or `re:` and a
               regular expression for the whole fqn
    type       a class name, bare or qualified, or a glob on it; subclasses match
    predicate  a Python function of the module's facts; it cannot be written to a file
    op         an operator, by its ATen name; it holds in the whole model
    stage      forward, backward or update
    phase      warmup, full, predict or correct

All keys of a rule must match. A module whose fqn, type and predicate match is *named*
by the rule, and the rule *governs* it and everything below it: a rule on `solver` holds
for `solver.scan.net` too. `module` is asked of the fqn and of every one above it.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from castwise.errors import PolicyError, RuleError
from castwise.policy.ops import CATEGORIES, Category
from castwise.policy.precision import SURROUNDINGS, Precision
from castwise.wording import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STAGES = ("forward", "backward", "update")
"""The stages of one training step."""

PHASES = ("warmup", "full", "predict", "correct")
"""The phases of a run; a run without phases is `full` from beginning to end."""

PHASES_WITH_BACKWARD = ("warmup", "full", "correct")
"""The phases that compute gradients; `predict` only runs forward."""

STORAGES = ("master", "split", "split8", "kahan", "stochastic", "plain")
"""Where the bits of a weight go that 16 do not hold: see `optim/storage.py`."""

EMULATIONS = ("allowed", "refused")
"""Whether fp8 may be computed by rounding and bf16, where a device lacks it."""

REGEX_MARK = "re:"
"""What a module key begins with when the rest is a regular expression."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleFacts:
    """What a rule may know about a module; the policy itself touches no module."""

    fqn: str
    """Dotted path from the root, which is the empty text."""

    types: tuple[str, ...] = ()
    """Bare and qualified names of its class and of every class above it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Where a precision holds, and why; at least one key is given."""

    module: str | None = None
    """Glob on the fqn, or `re:` and a regular expression for all of it."""

    type: str | None = None
    """Class name, bare or qualified, or a glob on it; subclasses match."""

    predicate: Callable[[ModuleFacts], bool] | None = None
    """Python function that says whether a module is meant."""

    op: str | None = None
    """Operator by its ATen name; excludes the keys of modules and stages."""

    stage: str | None = None
    """One of STAGES; without it the rule holds in all."""

    phase: str | None = None
    """One of PHASES; without it the rule holds in all."""

    precision: Precision = SURROUNDINGS
    """What the rule gives; open fields stay as in the surroundings."""

    category: Category | None = None
    """For an operator, instead of a precision: how it treats its inputs' formats."""

    storage: str | None = None
    """One of STORAGES, for weights that are held in 16 bits."""

    because: str = ""
    """One clause that a person can check."""

    where: str = field(default="", compare=False)
    """File and line, or how the rule was built; takes no part in equality."""

    def __post_init__(self) -> None:
        if all(key is None for key in self.keys):
            raise RuleError(
                f"{self.label}: a rule needs at least one key of module, type, op, "
                "stage, phase; for every module write the policy's default"
            )
        for name in ("module", "type", "op", "because"):
            text = getattr(self, name)
            if text is not None and (not text.isprintable() or text != text.strip()):
                raise RuleError(
                    f"{self.label}: {name} needs one line of printable text without "
                    f"outer spaces, got {shown(text)}"
                )
            if text == "" and name != "because":
                raise RuleError(
                    f"{self.label}: {name} is empty; name something, or leave it out"
                )
        _check_choice(self, "stage", STAGES)
        _check_choice(self, "phase", PHASES)
        _check_choice(self, "storage", STORAGES)
        _check_regex(self)
        _check_value(self)

    @property
    def keys(self) -> tuple[object, ...]:
        """Everything that says where the rule holds."""
        return (
            self.module,
            self.type,
            self.predicate,
            self.op,
            self.stage,
            self.phase,
        )

    @property
    def value(self) -> str:
        """The precision or the category, and the storage, as they are written."""
        value = self.category or str(self.precision)
        return f"{value} with storage {self.storage}" if self.storage else value

    @property
    def label(self) -> str:
        """How messages name the rule: its place, and its keys."""
        names = ("module", "type", "predicate", "op", "stage", "phase")
        parts = [
            f"{name} {_brief(key)}"
            for name, key in zip(names, self.keys, strict=True)
            if key is not None
        ]
        place = f"{self.where}: " if self.where else ""
        return f"{place}rule [{', '.join(parts)}]"

    @property
    def looks_at_modules(self) -> bool:
        """Whether some module must match, or else the rule is a mistake."""
        return not (
            self.module is None and self.type is None and self.predicate is None
        )

    @property
    def holds_always(self) -> bool:
        """Whether the rule looks at neither stage nor phase."""
        return self.stage is None and self.phase is None

    def holds_in(self, stage: str, phase: str) -> bool:
        """Whether the rule is in force in this stage and phase."""
        return self.stage in (None, stage) and self.phase in (None, phase)

    def meets_backward(self, phase: str) -> bool:
        """Whether gradients of this phase pass through what the rule decides."""
        return self.phase in (None, phase) and self.stage != "update"

    def names(self, facts: ModuleFacts) -> bool:
        """Whether the module itself matches every key that looks at modules."""
        return (
            (self.module is None or any(map(self._fits, upwards(facts.fqn))))
            and (self.type is None or self._has_type(facts.types))
            and (self.predicate is None or bool(self.predicate(facts)))
        )

    def _fits(self, fqn: str) -> bool:
        assert self.module is not None
        if self.module.startswith(REGEX_MARK):
            return re.fullmatch(self.module.removeprefix(REGEX_MARK), fqn) is not None
        return fnmatchcase(fqn, self.module)

    def _has_type(self, types: tuple[str, ...]) -> bool:
        assert self.type is not None
        return any(fnmatchcase(name, self.type) for name in types)


def _brief(key: object) -> str:
    """Return a key as it stands in the file; a very long one is cut."""
    text = str(getattr(key, "__name__", key))
    return text if len(text) <= 60 else shown(text)


def check_time(stage: str, phase: str) -> None:
    """Refuse a question about a stage or phase that there is none of."""
    for name, value, choices in (("stage", stage, STAGES), ("phase", phase, PHASES)):
        if value not in choices:
            raise PolicyError(
                f"{name} needs one of {', '.join(choices)}, got {shown(value)}"
            )


def upwards(fqn: str) -> Iterator[str]:
    """Yield `a.b.c`, `a.b`, `a` and the root; the root alone for the root."""
    while fqn:
        yield fqn
        fqn = fqn.rpartition(".")[0]
    yield ""


def _check_choice(rule: Rule, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(rule, name)
    if value is not None and value not in choices:
        raise RuleError(
            f"{rule.label}: {name} needs one of {', '.join(choices)}, got "
            f"{shown(str(value))}"
        )


def _check_regex(rule: Rule) -> None:
    if rule.module is None or not rule.module.startswith(REGEX_MARK):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # re warns of sets that will mean another
            re.compile(rule.module.removeprefix(REGEX_MARK))
    except (re.error, RecursionError, OverflowError, Warning) as error:
        raise RuleError(
            f"{rule.label}: the text after {REGEX_MARK} is no regular expression: "
            f"{error}; for a glob leave {REGEX_MARK} out"
        ) from None


def _check_value(rule: Rule) -> None:
    """Refuse values that cannot be honoured together with the rule's keys."""
    if rule.storage is not None and not (rule.op is None and rule.holds_always):
        raise RuleError(
            f"{rule.label}: weights are stored in one way in the whole run; leave out "
            f"storage {rule.storage}, or give it in a rule on modules alone"
        )
    if rule.op is None:
        if rule.category is not None:
            raise RuleError(
                f"{rule.label}: category {rule.category} needs the key op; for a "
                "module write a precision"
            )
        if (rule.stage or rule.phase) and rule.precision.param is not None:
            _check_param(rule)
        return
    if rule.looks_at_modules or rule.stage is not None:
        raise RuleError(
            f"{rule.label}: an op rule holds in the whole model and in every stage; "
            "leave out module, type, predicate and stage, or write a rule on the module"
        )
    if rule.category is not None and rule.category not in CATEGORIES:
        raise RuleError(
            f"{rule.label}: category needs one of {', '.join(CATEGORIES)}, got "
            f"{rule.category!r}"
        )
    if rule.category is not None and rule.precision != SURROUNDINGS:
        raise RuleError(
            f"{rule.label}: needs a precision or a category, got both; leave one out"
        )
    alone = Precision(compute=rule.precision.compute)
    if rule.precision != alone and not rule.precision.is_uniform:
        raise RuleError(
            f"{rule.label}: an operator only computes; write c=, got {rule.precision}"
        )


def _check_param(rule: Rule) -> None:
    """Weights have one storage for the whole run, so no stage or phase may give one.

    A bare `fp64` fills all four fields and stays readable as "compute there in fp64".
    """
    if not rule.precision.is_uniform:
        raise RuleError(
            f"{rule.label}: weights are held in one format for all stages and phases; "
            f"leave out p={rule.precision.param}, or give it in a rule without them"
        )
