"""What surrounds a captured graph: the policy, laid over modules and operators."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from castwise.errors import PolicyError
from castwise.fp8_products import FP8
from castwise.islands import module_facts
from castwise.islands.layout import governing_fqn

if TYPE_CHECKING:
    from torch import fx, nn

    from castwise.policy.bound import BoundPolicy
    from castwise.policy.ops import OperatorTable
    from castwise.policy.rules import Policy


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

    _computes: dict[str, str] = field(default_factory=dict)

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
        """The fqn of the module that called a node; the root where none is known."""
        stack = node.meta.get("nn_module_stack") or {}
        for key in reversed(stack):
            number = str(key).partition("@")[0]
            if number.isdigit() and int(number) in self.fqns:
                return self.fqns[int(number)]
        return ""

    def compute(self, module: str) -> str:
        """The format that a module computes in."""
        if module not in self._computes:
            precision = self.bound.precision_of(governing_fqn(module), phase=self.phase)
            assert precision.compute is not None
            self._computes[module] = precision.compute
        return self._computes[module]

    def reason(self, module: str) -> str:
        """Which rule or default decides what a module computes in."""
        return self.bound.explain(governing_fqn(module)).partition("\n")[0]

    @property
    def lows(self) -> list[str]:
        """The low formats that modules compute in."""
        found = map(self.compute, self.fqns.values())
        return sorted({each for each in found if each in {"bf16", "fp16"}})


def _refuse(bound: BoundPolicy, fqn: str, phase: str) -> None:
    precision = bound.precision_of(fqn, phase=phase)
    place = repr(fqn) if fqn else "the whole model"
    if precision.param != "fp32":
        raise PolicyError(
            f"a plan needs weights in fp32, got p={precision.param} for {place} from "
            f"{bound.policy.name}; use castwise.prepare, which holds weights otherwise"
        )
    if precision.compute in FP8:
        raise PolicyError(
            f"a plan needs formats that operators compute in, got c={precision.compute}"
            f" for {place} from {bound.policy.name}; use castwise.prepare, which "
            "emulates fp8"
        )
    backward = bound.precision_of(fqn, stage="backward", phase=phase).compute
    if backward != precision.compute:
        raise PolicyError(
            f"a plan gives the backward of a module the formats of its forward, got "
            f"c={precision.compute} forward and c={backward} backward for {place} from "
            f"{bound.policy.name}; use castwise.prepare, which runs it again"
        )
