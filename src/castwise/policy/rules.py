"""A policy: ordered rules over a default, from a file or built in Python.

    policy = Policy.load("policy.yaml")
    policy = preset("default").with_phase_precision("predict", "fp16")
    bound = policy.bind(module_facts(model))
    bound.precision_of("encoder.norm").compute        # "fp32"
    print(bound.explain("encoder.norm"))

The first rule that matches wins. A rule that names no module is an error, and so are
two rules with the same keys and different values. A policy only says;
`castwise.islands` and `castwise.autocast` do.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from castwise.decision import Decision
from castwise.errors import RuleError, StorageError
from castwise.formats import FORMATS
from castwise.policy.bound import BoundPolicy, bind_rules, first_rule
from castwise.policy.document import (
    PolicyDocument,
    check_emulation,
    check_loss_scale,
    check_name,
    check_storage,
    read_document,
    read_file,
    write_document,
)
from castwise.policy.keys import (
    EMULATIONS,
    PHASES_WITH_BACKWARD,
    ModuleFacts,
    Rule,
    check_time,
)
from castwise.policy.ops import DEFAULT_TABLE, Category, OperatorTable
from castwise.policy.precision import FP32, SURROUNDINGS, Precision
from castwise.policy.silences import Silence

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """Ordered rules over a default; the first rule that matches wins."""

    name: str = "custom"
    """What logs and reports call it."""

    default: Precision = FP32
    """The precision of every module that no rule governs."""

    rules: tuple[Rule, ...] = ()
    """In order of precedence."""

    loss_scale: str | None = None
    """`none`, `dynamic` or `static:<number>`; `None` leaves the choice to castwise."""

    storage: str | None = None
    """One of `STORAGES`, for 16-bit weights; `None` leaves the choice to castwise."""

    emulation: str = EMULATIONS[0]
    """`allowed` or `refused`: whether fp8 may be emulated where a device lacks it."""

    silences: tuple[Silence, ...] = ()
    """Findings of a lint that are accepted; they change nothing that runs."""

    where: str = field(default="", compare=False)
    """The file it came from; takes no part in equality."""

    def __post_init__(self) -> None:
        check_name(self.name, self.where or "policy")
        check_emulation(self.emulation, self.where or "policy")
        if self.storage is not None:
            check_storage(self.storage, self.where or "policy")
        if self.loss_scale is not None:
            check_loss_scale(self.loss_scale, self.where or "policy")
        _refuse_contradictions(self.rules)

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read a policy file.

        Raises:
            StorageError: The file cannot be read.
            PolicyError: It can, and says something wrong; file and line are named.
        """
        return cls.parse(read_file(path), where=str(path))

    @classmethod
    def parse(cls, text: str, *, where: str = "<policy>") -> Policy:
        """Read the text of a policy file; messages call it `where`."""
        document = read_document(text, where)
        given = {
            each.name: value
            for each in fields(document)
            if (value := getattr(document, each.name)) is not None
        }
        return cls(**given, where=where)

    def to_yaml(self) -> str:
        """Return the text that parses back to an equal policy."""
        return write_document(
            PolicyDocument(
                name=self.name,
                default=self.default,
                rules=self.rules,
                loss_scale=self.loss_scale,
                storage=self.storage,
                emulation=None if self.emulation == EMULATIONS[0] else self.emulation,
                silences=self.silences,
            )
        )

    def save(self, path: str | Path) -> None:
        """Write the policy file whole or not at all."""
        _write_whole(Path(path), self.to_yaml())

    def with_default(self, precision: Precision | str) -> Policy:
        """Return a policy with another default."""
        return replace(self, default=_precision(precision))

    def with_loss_scale(self, loss_scale: str | None) -> Policy:
        """Return a policy with another choice of loss scale."""
        return replace(self, loss_scale=loss_scale)

    def with_storage(self, storage: str | None) -> Policy:
        """Return a policy with another storage of 16-bit weights."""
        return replace(self, storage=storage)

    def with_emulation(self, emulation: str) -> Policy:
        """Return a policy that allows or refuses to emulate fp8."""
        return replace(self, emulation=emulation)

    def with_silence(
        self, check: str, *, because: str, at: str | None = None
    ) -> Policy:
        """Return a policy that accepts what a check of the lint finds, with a reason.

        Args:
            check: Id of the check.
            because: Why it is accepted, one line.
            at: Glob of the places. Default: everywhere.
        """
        silence = Silence(check=check, at=at, because=because, where=_caller())
        return replace(self, silences=(*self.silences, silence))

    def with_rule(
        self,
        *,
        module: str | None = None,
        type: str | None = None,  # noqa: A002 -- the key is called so in the file
        predicate: Callable[[ModuleFacts], bool] | None = None,
        op: str | None = None,
        stage: str | None = None,
        phase: str | None = None,
        precision: Precision | str = SURROUNDINGS,
        category: Category | None = None,
        storage: str | None = None,
        because: str = "",
    ) -> Policy:
        """Return a policy with one more rule, which comes after the others.

        A rule on modules comes before the rules on phases and stages alone that stand
        last, so that an island added to a preset holds in every phase.
        """
        rule = Rule(
            module=module,
            type=type,
            predicate=predicate,
            op=op,
            stage=stage,
            phase=phase,
            precision=_precision(precision),
            category=category,
            storage=storage,
            because=because,
            where=_caller(),
        )
        at = len(self.rules)
        while rule.looks_at_modules and at and not self.rules[at - 1].looks_at_modules:
            at -= 1
        return replace(self, rules=(*self.rules[:at], rule, *self.rules[at:]))

    def with_phase_precision(
        self, phase: str, precision: Precision | str, *, because: str = ""
    ) -> Policy:
        """Return a policy with another precision for all modules in one phase.

        It takes the place of an earlier rule on that phase alone, or comes last.
        """
        new = Rule(
            phase=phase,
            precision=_precision(precision),
            because=because,
            where=_caller(),
        )
        if all(rule.keys != new.keys for rule in self.rules):
            return replace(self, rules=(*self.rules, new))
        changed = (new if rule.keys == new.keys else rule for rule in self.rules)
        return replace(self, rules=tuple(changed))

    def base_precision(
        self, *, stage: str = "forward", phase: str = "full"
    ) -> Precision:
        """Return the full precision of a module that no rule on modules governs."""
        check_time(stage, phase)
        rules = [rule for rule in self.rules if not rule.looks_at_modules]
        own = first_rule(rules, stage, phase)
        found = (own.precision if own else SURROUNDINGS).over(self.default).over(FP32)
        return replace(found, param=self.default.param or FP32.param)

    def bind(self, facts: Sequence[ModuleFacts]) -> BoundPolicy:
        """Lay the policy over the modules of one model.

        Raises:
            UnmatchedRuleError: A rule on modules names none of them.
        """
        rules = [rule for rule in self.rules if rule.op is None]
        return BoundPolicy(policy=self, governing=bind_rules(rules, facts))

    def operator_table(self, phase: str = "full") -> OperatorTable:
        """Return the default operator table with the op rules of a phase laid over it.

        Raises:
            RuleError: An op rule asks for a format that a table cannot give.
        """
        check_time("forward", phase)
        table = DEFAULT_TABLE
        for rule in reversed(self.rules):  # the first rule is laid last, and wins
            if rule.op is not None and rule.holds_in("forward", phase):
                reason = rule.because or "the policy says so"
                because = f"{reason}; {rule.label}"
                table = table.with_category(rule.op, self._category(rule), because)
        return table

    def explain_op(self, op: str, *, phase: str = "full") -> str:
        """Say how an operator treats formats, and which rule or entry decides."""
        return self.operator_table(phase).explain(op)

    def decide_loss_scale(self) -> Decision[str]:
        """Return the loss scale to use, and why.

        A format with fewer exponent bits than fp32 loses small gradients, so it gets a
        dynamic scale wherever a backward runs in it. `predict` runs none.
        """
        if self.loss_scale is not None:
            return Decision(self.loss_scale, f"{self.where or self.name} says so")
        for phase in PHASES_WITH_BACKWARD:
            rules = (rule for rule in self.rules if rule.meets_backward(phase))
            asked = [self.base_precision(phase=phase), *(r.precision for r in rules)]
            for precision in asked:
                narrow = _narrow_range(precision)
                if narrow:
                    return Decision(
                        "dynamic",
                        f"{narrow} computes in a phase with a backward ({phase}), and "
                        f"gradients below {FORMATS[narrow].smallest_subnormal:.1e} "
                        "would vanish",
                    )
        because = "every backward runs in the exponent range of fp32"
        if any(map(_is_fp8, (self.default, *(r.precision for r in self.rules)))):
            because += "; fp8 is scaled tensor by tensor"
        return Decision("none", because)

    def _category(self, rule: Rule) -> Category:
        """Say in the words of the operator table what an op rule asks for."""
        if rule.category is not None:
            return rule.category
        asked = rule.precision.compute
        if asked is None:
            return "as_is"
        if asked == "fp32":
            return "fp32"
        on_modules = (r for r in self.rules if r.op is None)
        computes = {self.default.compute, *(r.precision.compute for r in on_modules)}
        low = {_LOW[name] for name in computes if name in _LOW}
        if low == {asked}:
            return "low"
        raise RuleError(
            f"{rule.label}: an operator runs in fp32 or in the low format of its "
            f"module ({', '.join(sorted(low)) or 'none here'}), got c={asked}; write "
            "category: low, or a rule on the module"
        )


# formats of modules -> the low format that their operators run in
_LOW = {"bf16": "bf16", "fp16": "fp16", "fp8_e4m3": "bf16", "fp8_e5m2": "bf16"}


def _precision(value: Precision | str) -> Precision:
    return Precision.parse(value) if isinstance(value, str) else value


def _caller() -> str:
    """Return file and line of whoever called the method that calls this."""
    frame = sys._getframe(2)  # noqa: SLF001 -- CPython's documented way
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _is_fp8(precision: Precision) -> bool:
    """Whether operators or outputs are in a format of 8 bits."""
    names = (precision.compute, precision.output)
    return any(name is not None and FORMATS[name].bits == 8 for name in names)


def _narrow_range(precision: Precision) -> str | None:
    """Return a format of the precision that has fewer exponent bits than fp32.

    Not fp8, which is scaled tensor by tensor.
    """
    names = (precision.compute, precision.output, precision.param)
    return next(
        (
            name
            for name in names
            if name
            and FORMATS[name].bits > 8
            and FORMATS[name].exponent_bits < FORMATS["fp32"].exponent_bits
        ),
        None,
    )


def _refuse_contradictions(rules: Sequence[Rule]) -> None:
    """Refuse two rules that say different things about the same keys."""
    seen: dict[tuple[object, ...], Rule] = {}
    for rule in rules:
        before = seen.setdefault(rule.keys, rule)
        if before.value != rule.value:
            raise RuleError(
                f"{rule.label} says {rule.value}, and {before.label} says "
                f"{before.value} for the same keys; keep one of them"
            )


def _write_whole(path: Path, text: str) -> None:
    """Write beside the file, then rename: a reader sees the old text or the new one."""
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)  # mkstemp grants nobody else anything
        Path(temporary).replace(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise StorageError(f"{path}: the policy cannot be written: {reason}") from None
