"""The bench: where a model runs under a policy, on one batch, and is measured.

Every run begins with the same random state, so that dropout drops the same elements.
Errors are taken against the reference format, fp64 unless the model cannot run in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from castwise.dtypes import dtype_of
from castwise.errors import CastwiseError, TargetError
from castwise.islands import AppliedPolicy, apply_policy, module_facts
from castwise.numerics.error import loss_drift, relative_error
from castwise.numerics.search.budget import Budget
from castwise.numerics.search.structure import copied
from castwise.numerics.search.visits import LastOperator, Visitor, Visits
from castwise.numerics.target import Batch, LossFn, checked_loss
from castwise.policy.precision import Precision
from castwise.policy.rules import Policy
from castwise.region import Region

_WHO = "a search"


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What one forward and backward gave."""

    output: Any
    """What the model returned, out of any graph."""

    loss: float
    """The loss."""

    gradients: tuple[torch.Tensor | None, ...]
    """Of the weights that are trained, in order; none where nothing arrived."""


class Bench:
    """A model with its batches and loss, ready to run under one policy after another.

    Args:
        model: The model; use it inside `untouched`.
        batches: What it is run on.
        loss_fn: From output and target to a scalar.
        reference: The format that errors are taken against.
        seed: Of what the model draws while it runs.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        loss_fn: LossFn,
        *,
        reference: str,
        seed: int,
    ) -> None:
        self.model, self.batches, self.loss_fn = model, batches, loss_fn
        self.device = next(
            (weight.device for weight in model.parameters()), torch.device("cpu")
        )
        self.weights = [w for w in model.parameters() if w.requires_grad]
        self.reference = Policy(name="reference", default=Precision.parse(reference))
        self.num_steps, self.num_timings = 0, 0
        self.loss_scale = 1.0
        """For backwards in fp16."""
        self.scale_now = 1.0
        """The loss scale that the policy in force wants."""
        self._wide = dtype_of(reference)
        self._seed = seed
        self._results: dict[int, Result] = {}
        self._facts = module_facts(model)

    @contextlib.contextmanager
    def under(self, policy: Policy) -> Iterator[Region]:
        """Put a policy on the model for a while."""
        device = self.device.type
        applied: AppliedPolicy = apply_policy(
            self.model, policy.bind(self._facts), device
        )
        self.scale_now = self.loss_scale if _wants_scale(policy) else 1.0
        try:
            yield Region.of(policy, "full", (applied,))
        finally:
            applied.remove()
            self.scale_now = 1.0

    def step(self, region: Region, batch: Batch, *, scale: float = 1.0) -> Result:
        """Run forward and backward of a model that its policy is on.

        Args:
            region: The region of that policy.
            batch: Inputs and target.
            scale: The loss scale.
        """
        self.num_steps += 1
        output, loss = self.forward(region, batch)
        with torch.autocast(self.device.type, enabled=False):
            (loss * scale).backward()  # type: ignore[no-untyped-call]
        gradients = self.taken_gradients(scale)
        return Result(
            output=copied(output)[0], loss=float(loss.detach()), gradients=gradients
        )

    def forward(self, region: Region, batch: Batch) -> tuple[Any, torch.Tensor]:
        """Run the model and its loss, always from the same random state."""
        torch.manual_seed(self._seed)
        with region.entered(self.device.type):
            output = self.model(*batch[:-1])
            loss = checked_loss(self.loss_fn(output, batch[-1]), what=_WHO)
        return output, loss

    def taken_gradients(self, scale: float = 1.0) -> tuple[torch.Tensor | None, ...]:
        """Take the gradients off the weights, without the loss scale."""
        found = []
        for weight in self.weights:
            gradient, weight.grad = weight.grad, None
            found.append(gradient if gradient is None else gradient / scale)
        return tuple(found)

    def in_reference(self, batch: Batch) -> Batch:
        """Bring a batch's floating tensors to the reference format, target included."""
        return tuple(
            each.to(self._wide)
            if isinstance(each, torch.Tensor) and each.is_floating_point()
            else each
            for each in batch
        )

    def reference_result(self, at: int) -> Result:
        """Run a batch in the reference format, once."""
        if at not in self._results:
            batch = self.in_reference(self.batches[at])
            visits, last = Visits(self.model, Visitor()), LastOperator()
            with (
                self.under(self.reference) as region,
                visits.watched(),
                self.told_where(lambda: f"{last.name} in {visits.innermost}"),
                last,
            ):
                self._results[at] = self.step(region, batch)
        return self._results[at]

    def keep_reference(self, at: int, result: Result) -> None:
        """Keep the reference result of a batch that was run elsewhere."""
        self._results[at] = result

    def errors(
        self, policy: Policy, budget: Budget, *, scale: float, at: int
    ) -> dict[str, float]:
        """Measure a policy on one batch: kind of error -> error.

        Args:
            policy: What is put on the model.
            budget: Says which measure of one's own is taken, too.
            scale: The loss scale, where some backward of the policy wants one.
            at: Which batch.
        """
        wanted = self.reference_result(at)
        with self.under(policy) as region:
            scale = scale if _wants_scale(policy) else 1.0
            got = self.step(region, self.batches[at], scale=scale)
        found = {
            "gradient": gradient_error(got.gradients, wanted.gradients),
            "output": relative_error(got.output, wanted.output),
            "loss": loss_drift(got.loss, wanted.loss),
        }
        if budget.measure is not None:
            found["measure"] = float(budget.measure.of(got.output, wanted.output))
        return found

    @contextlib.contextmanager
    def told_where(self, where: Callable[[], str]) -> Iterator[None]:
        """Tell what of the user's code cannot run in the reference format."""
        try:
            yield
        # The user's own forward runs here in a format that it may never have met;
        # nothing is lost: the sentence names the place, the cause stays chained.
        except (
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:  # raised again
            if isinstance(error, CastwiseError):
                raise
            name = self.reference.default.compute
            line = str(error).strip().partition("\n")[0]
            raise TargetError(
                f"errors are taken against {name}, but {where()} does not "
                f"run in it: {type(error).__name__}: {line}; make it accept {name}, or "
                "take errors against reference='fp32'"
            ) from error


def _wants_scale(policy: Policy) -> bool:
    """Whether gradients would vanish without a loss scale, as they do in fp16."""
    return policy.decide_loss_scale().value != "none"


def gradient_error(
    got: Sequence[torch.Tensor | None], wanted: Sequence[torch.Tensor | None]
) -> float:
    """The relative error of all gradients together; one that is missing is zero."""
    pairs = [
        (_or_zero(one, other), _or_zero(other, one))
        for one, other in zip(got, wanted, strict=True)
        if one is not None or other is not None
    ]
    return relative_error([one for one, _ in pairs], [other for _, other in pairs])


def _or_zero(tensor: torch.Tensor | None, like: torch.Tensor | None) -> torch.Tensor:
    if tensor is not None:
        return tensor
    assert like is not None
    return torch.zeros_like(like)
