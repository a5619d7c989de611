"""What surrounds a captured graph: the policy, laid over modules and operators."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from castwise.errors import PolicyError
from castwise.fp8_products import FP8
from castwise.islands import module_facts
from castwise.islands.layout import governing_fqn

if TYPE_CHECKING:
    from torch import fx, nn

    from castwise.policy.bound import BoundPolicy
    from castwise.policy.ops import OperatorTable
    from castwise.policy.rules import Policy

Stage = Literal["forward", "backward"]
"""A stage of a step that graphs have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What a policy says about the modules and operators of one model, in one phase."""

    bound: BoundPolicy
    """The policy, laid over the model."""

    phase: str
    """The phase that is planned."""

    table: OperatorTable
    """The operator table of the phase."""

    fqns: dict[int, str]
    """The identity of a module -> its first name in the model."""

    stages: tuple[Stage, Stage] = ("forward", "backward")
    """The stage whose rules decide for an operator, and the one for its derivative."""

    home: str = ""
    """The module of nodes that do not say theirs."""

    _computes: dict[tuple[str, str], str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, policy: Policy, phase: str = "full") -> Surroundings:
        """Lay a policy over a model.

        Raises:
            PolicyError: The policy asks for what a plan cannot give.
        """
        bound = policy.bind(module_facts(model))
        found = cls(
            bound=bound,
            phase=phase,
            table=policy.operator_table(phase),
            fqns={id(module): fqn for fqn, module in model.named_modules()},
        )
        for fqn in dict.fromkeys(map(governing_fqn, found.fqns.values())):
            _refuse(bound, fqn, phase)
        return found

    def module_of(self, node: fx.Node) -> str:
        """The fqn of the module that called a node, as far as it is known."""
        stack = node.meta.get("nn_module_stack") or {}
        for key in reversed(stack):
            number = str(key).partition("@")[0]
            if number.isdigit() and int(number) in self.fqns:
                return self.fqns[int(number)]
        return self.home

    def within(self, home: str, stage: Stage | None = None) -> Surroundings:
        """The same for a graph inside of a graph.

        Args:
            home: The module that runs it, where its nodes do not say theirs.
            stage: Where it is the forward, or the backward, by itself.
        """
        stages = self.stages if stage is None else (stage, stage)
        return replace(self, home=home, stages=stages)

    def compute(self, module: str) -> str:
        """The format that a module computes in."""
        return self._compute(module, self.stages[0])

    def backward(self, module: str) -> str:
        """The format that the backward of a module computes in."""
        return self._compute(module, self.stages[1])

    def reason(self, module: str) -> str:
        """Which rule or default decides what a module computes in."""
        return self._reason(module, self.stages[0])

    def reason_backward(self, module: str) -> str:
        """Which rule or default decides what its backward computes in."""
        return self._reason(module, self.stages[1])

    @property
    def lows(self) -> list[str]:
        """The low formats that modules compute in, in either stage."""
        found = {
            compute(fqn)
            for fqn in self.fqns.values()
            for compute in (self.compute, self.backward)
        }
        return sorted(found & {"bf16", "fp16"})

    def _reason(self, module: str, stage: Stage) -> str:
        fqn = governing_fqn(module)
        rule = self.bound.rule_of(fqn, stage=stage, phase=self.phase)
        by = rule.label if rule else f"the default of {self.bound.policy.name}"
        because = f", because {rule.because}" if rule and rule.because else ""
        compute = self._compute(module, stage)
        return f"{fqn or 'the whole model'}: c={compute} by {by}{because}"

    def _compute(self, module: str, stage: Stage) -> str:
        key = module, stage
        if key not in self._computes:
            precision = self.bound.precision_of(
                governing_fqn(module), stage=stage, phase=self.phase
            )
            assert precision.compute is not None
            self._computes[key] = precision.compute
        return self._computes[key]


def _refuse(bound: BoundPolicy, fqn: str, phase: str) -> None:
    precision = bound.precision_of(fqn, phase=phase)
    place = repr(fqn) if fqn else "the whole model"
    if precision.param != "fp32":
        raise PolicyError(
            f"a plan needs weights in fp32, got p={precision.param} for {place} from "
            f"{bound.policy.name}; use castwise.prepare, which holds weights otherwise"
        )
    backward = bound.precision_of(fqn, stage="backward", phase=phase).compute
    for compute in (precision.compute, backward):
        if compute in FP8:
            raise PolicyError(
                f"a plan needs formats that operators compute in, got c={compute} for "
                f"{place} from {bound.policy.name}; use castwise.prepare, which "
                "emulates fp8"
            )
    both = {precision.compute, backward}
    if len(both) > 1 and (precision.compute == "fp64" or "tf32" in both):
        raise PolicyError(
            "a plan gives a backward a format of its own beside a forward in bf16, "
            f"fp16 or fp32, and never tf32, got c={precision.compute} forward and "
            f"c={backward} backward for {place} from {bound.policy.name}; use "
            "castwise.prepare, which runs the module again"
        )
