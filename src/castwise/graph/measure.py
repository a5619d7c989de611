"""The whole bill, measured: one step by a plan, one under autocast, one in float64.

    measured = measure(model, batch, loss_fn, "bf16-mixed")
    print(measured)
    plan: 50 casts, 44.2 MB; 33.9 MB saved; gradient error 3.58e-03 ...

Copies of the model run, so the model stays as it is. Casts and their bytes are counted
below autograd, in forward and backward; saved bytes are what autograd keeps for the
backward, each storage once, weights left out; errors are relative, against float64.
Dropout draws the same masks each time, as far as a format lets it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from castwise.autocast import autocast
from castwise.errors import ContractError
from castwise.graph.compiled import compile as compile_by_plan
from castwise.graph.regions import widened
from castwise.graph.values import tensors_of
from castwise.numerics.census import observe
from castwise.numerics.error import relative_error
from castwise.numerics.target import checked_batches, checked_loss

if TYPE_CHECKING:
    from torch import nn

    from castwise.graph.plan import Plan
    from castwise.policy.rules import Policy

WORSE = 1.5
"""How many times the error of autocast a plan may have, beyond one rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one way to run a step cost."""

    num_casts: int
    """Casts, forward and backward."""

    bytes_cast: int
    """Bytes that they read and write."""

    bytes_saved: int
    """Bytes that autograd keeps for the backward."""

    loss_error: float
    """Relative error of the loss against float64."""

    gradient_error: float
    """Relative error of all gradients together against float64."""

    def __str__(self) -> str:
        return (
            f"{self.num_casts} casts, {self.bytes_cast / 1e6:.3g} MB; "
            f"{self.bytes_saved / 1e6:.3g} MB saved; loss error "
            f"{self.loss_error:.2e}, gradient error {self.gradient_error:.2e}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A plan and autocast, side by side on one batch."""

    planned: Cost
    """By the plan."""

    autocast: Cost
    """Under castwise's operator table, operator by operator."""

    torch_autocast: Cost | None
    """Under `torch.autocast`; none where an operator refuses there."""

    plan: Plan
    """The plan that ran."""

    @property
    def holds(self) -> bool:
        """Whether the plan is as near to float64 as autocast is."""
        rounding = 2.0**-8
        return all(
            ours <= WORSE * theirs + rounding
            for ours, theirs in (
                (self.planned.loss_error, self.autocast.loss_error),
                (self.planned.gradient_error, self.autocast.gradient_error),
            )
        )

    def check(self) -> Measured:
        """Return the measurement itself if the plan holds.

        Raises:
            ContractError: The plan is farther from float64 than autocast is.
        """
        if not self.holds:
            raise ContractError(
                f"a plan must be as near to float64 as autocast is, got {self}; give "
                "modules precision fp32 by rules, and report the model"
            )
        return self

    def record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "plan": self.plan.digest()}

    def __str__(self) -> str:
        rows = {
            "plan": self.planned,
            "operator table": self.autocast,
            "torch.autocast": self.torch_autocast,
        }
        return "\n".join(
            f"{name}: {cost or 'an operator refuses'}" for name, cost in rows.items()
        )


def measure(
    model: nn.Module,
    batch: Sequence[Any],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    policy: Policy | str = "bf16-mixed",
) -> Measured:
    """Run one step by a plan, under autocast, and in float64, and compare.

    Args:
        model: Weights in fp32; copies of it run.
        batch: The model's inputs and, last, the target.
        loss_fn: From the model's output and the target to a scalar.
        policy: A policy, or the name of a preset.

    Raises:
        TargetError: The batch is no tuple, or the loss no scalar with a gradient.
        PolicyError: The policy asks for what a plan cannot give.
    """
    (given,) = checked_batches([batch], what="a measurement")
    bench = _Bench(model, given, loss_fn)
    planned = compile_by_plan(copy.deepcopy(model), policy, inner="eager")
    lows = planned.low_formats or ("bf16",)
    device = bench.device.type
    cost = bench.cost(planned, planned)
    usual = copy.deepcopy(model)
    table = planned.operator_table
    return Measured(
        planned=cost,
        autocast=bench.cost(
            usual, _within(usual, lambda: autocast(device, lows[0], table))
        ),
        torch_autocast=bench.cost_of_torch(lows[0]),
        plan=planned.plan(),
    )


class _Bench:
    """One batch, and the float64 step that others are held against."""

    def __init__(
        self,
        model: nn.Module,
        batch: Sequence[Any],
        loss_fn: Callable[[Any, Any], torch.Tensor],
    ) -> None:
        self._model, self._batch, self._loss_fn = model, batch, loss_fn
        first = next(iter(model.parameters()), torch.empty(0))
        self.device = first.device
        exact = copy.deepcopy(model).double()
        self._loss, self._gradients = self._step(exact, exact, _widened(batch))

    def cost(self, model: nn.Module, run: Callable[..., Any]) -> Cost:
        """Run a step of a fresh copy, and count."""
        self._step(model, run, self._batch)  # captures graphs; counts nothing
        found: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
        census = observe(lambda: found.append(self._step(model, run, self._batch)))
        ((loss, gradients),) = found
        casts = census.select(op="cast")
        return Cost(
            num_casts=census.num_casts,
            bytes_cast=sum(each.num_bytes for each in casts),
            bytes_saved=self._saved(model, run),
            loss_error=relative_error(loss, self._loss),
            gradient_error=relative_error(
                list(gradients.values()), [self._gradients[name] for name in gradients]
            ),
        )

    def cost_of_torch(self, fmt: str) -> Cost | None:
        """The same under `torch.autocast`, where no operator refuses."""
        model, device = copy.deepcopy(self._model), self.device.type
        dtype = torch.bfloat16 if fmt == "bf16" else torch.float16
        try:
            run = _within(model, lambda: torch.autocast(device, dtype))
            return self.cost(model, run)
        except RuntimeError:
            return None

    def _step(
        self, model: nn.Module, run: Callable[..., Any], batch: Sequence[Any]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One forward and backward; loss, and gradients by name."""
        model.zero_grad()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            out = run(*batch[:-1])
            loss = checked_loss(self._loss_fn(out, batch[-1]), what="a measurement")
            loss.backward()  # type: ignore[no-untyped-call]
        gradients = {
            name.removeprefix("_orig_mod."): weight.grad.clone()
            for name, weight in model.named_parameters()
            if weight.grad is not None
        }
        return loss.detach(), gradients

    def _saved(self, model: nn.Module, run: Callable[..., Any]) -> int:
        """Bytes that autograd keeps, each storage once, weights and inputs left out."""
        outside = [*model.parameters(), *model.buffers(), *self._batch]
        own = set(map(_address, tensors_of(outside)))
        sizes: dict[int, int] = {}
        held: list[torch.Tensor] = []  # so that no address is used again meanwhile

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if _address(tensor) not in own:
                sizes[_address(tensor)] = tensor.untyped_storage().nbytes()
                held.append(tensor)
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks:
            self._loss_fn(run(*self._batch[:-1]), self._batch[-1])
        return sum(sizes.values())


def _within(model: nn.Module, region: Callable[[], Any]) -> Callable[..., Any]:
    """A model in a region; its loss is in fp32, as it is beside a plan."""

    def run(*args: Any) -> Any:
        with region():
            return widened(model(*args))

    return run


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _widened(value: Any) -> Any:
    """Floating tensors of a batch in float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_widened, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(_widened, value))
    if isinstance(value, dict):
        return {key: _widened(item) for key, item in value.items()}
    return value
