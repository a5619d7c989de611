"""The three runs that a validation compares: reference, baseline and candidate.

Each is made once and then run on every batch and seed. All of them draw the same random
numbers, and random states are afterwards what they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from castwise.errors import CastwiseError, TargetError
from castwise.formats import FORMATS
from castwise.islands.products import ProductsHold
from castwise.numerics.replay import (
    SameDraws,
    first_line,
    line_of_user,
    runs_wide,
    seeded,
    wide_copy,
    wide_values,
)
from castwise.numerics.target import Batch, LossFn
from castwise.numerics.validate.module_runs import ModuleRun, run_model, run_scaled
from castwise.numerics.validate.operators_on_trial import (
    OperatorError,
    OperatorsOnTrial,
    ReferenceOperators,
    joined,
)
from castwise.region import Region


class WideRun:
    """The reference: a model, or another algorithm, in float64."""

    def __init__(
        self,
        subject: Callable[..., Any],
        loss_fn: LossFn | None,
        device: torch.device,
        fmt: str = "fp64",
    ) -> None:
        self.subject = (
            wide_copy(subject, fmt) if isinstance(subject, nn.Module) else subject
        )
        self._loss_fn, self._device, self._fmt = loss_fn, device, fmt
        self._lifted: dict[str, None] = {}

    @property
    def module(self) -> nn.Module | None:
        """The module that runs; none for another callable."""
        return self.subject if isinstance(self.subject, nn.Module) else None

    @property
    def name(self) -> str:
        """What it is, for reports."""
        own = getattr(self.subject, "__name__", type(self.subject).__name__)
        return f"{own} in {self._fmt}"

    @property
    def lifted(self) -> tuple[str, ...]:
        """Formats that the code names by hand, and that were widened."""
        return tuple(self._lifted)

    def run(
        self,
        batch: Batch,
        seed: int,
        *modes: contextlib.AbstractContextManager[Any],
        scale: float = 1.0,
    ) -> ModuleRun:
        """Run forward and backward on one batch.

        Args:
            batch: The inputs and, last, the target.
            seed: Of the random draws.
            modes: What watches the operators while they run.
            scale: The loss scale.

        Raises:
            TargetError: Something does not run in this format.
        """
        what = "the reference" if self.module is None else "the model"
        with (
            seeded(seed, self._device),
            ProductsHold(self._device.type, "ieee"),
            runs_wide(what, self.module, self._fmt) as wide,
            SameDraws(),
            contextlib.ExitStack() as stack,
        ):
            for mode in modes:
                stack.enter_context(mode)
            wide_batch = wide_values(tuple(batch), self._fmt)
            found = run_model(self.subject, wide_batch, self._loss_fn, scale=scale)
        self._lifted.update(
            (f"{each.where}: {each.call} names {each.format}", None)
            for each in wide.lifted
        )
        return found


class BaselineRun:
    """The reference in fp32: as it is, and with each weight moved by half a unit.

    What is no module holds no weights that could be fp32; its inputs are moved instead.
    """

    def __init__(
        self, subject: Callable[..., Any], loss_fn: LossFn, device: torch.device
    ) -> None:
        is_module = isinstance(subject, nn.Module)
        self._device = device
        self._moves_inputs = not is_module
        self._runs = [
            WideRun(subject, loss_fn, device, fmt)
            for fmt in (("fp32", "fp32") if is_module else ("fp64",))
        ]
        moved = self._runs[-1].module
        if moved is not None:
            with torch.no_grad(), seeded(0, device):
                for weight in moved.parameters():
                    weight.copy_(_moved(weight))

    def run(self, batch: Batch, seed: int) -> list[ModuleRun]:
        """Run forward and backward on one batch."""
        if self._moves_inputs:
            with seeded(seed, self._device):
                inputs = tree_map(_moved, tuple(wide_values(batch[:-1], "fp64")))
            batch = (*inputs, batch[-1])
        return [each.run(batch, seed) for each in self._runs]


class CandidateRun:
    """The unedited model under a policy that is already on it."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        device: torch.device,
        region: Region,
        scale: float,
    ) -> None:
        self._model, self._loss_fn, self._device = model, loss_fn, device
        self._region = region
        self.scale = scale
        """The loss scale of the latest run."""
        self._tried: list[OperatorError] = []
        self.untried: dict[str, None] = {}
        """Operators that could not be tried alone."""

    @property
    def operators(self) -> tuple[OperatorError, ...]:
        """Every operator of all runs, tried alone."""
        return joined(self._tried)

    def run(
        self, batch: Batch, seed: int, recorder: ReferenceOperators | None = None
    ) -> ModuleRun:
        """Run forward and backward on one batch; try operators if there is a record.

        Raises:
            TargetError: The user's code raised; the message names the line.
        """
        modes: list[SameDraws] = []

        def once(scale: float) -> ModuleRun:
            if recorder is not None:
                recorder.rewind()  # the run before had too large a loss scale
                modes.append(OperatorsOnTrial(self._model, recorder))
            else:
                modes.append(SameDraws())
            with seeded(seed, self._device), modes[-1]:
                return run_model(
                    self._model,
                    batch,
                    self._loss_fn,
                    region=lambda: self._region.entered(self._device.type),
                    scale=scale,
                )

        try:
            found, self.scale = run_scaled(once, self.scale)
        except CastwiseError:
            raise
        except Exception as error:
            raise TargetError(
                f"the model raised{line_of_user(error)}: {first_line(error)}"
            ) from error
        last = modes[-1]
        if isinstance(last, OperatorsOnTrial):
            self._tried.extend(last.errors())
            self.untried |= last.untried
        return found


def _moved(values: Any) -> Any:
    """Values moved up or down by at most half a unit of fp32."""
    if not isinstance(values, torch.Tensor) or not (
        values.is_floating_point() or values.is_complex()
    ):
        return values
    unit = FORMATS["fp32"].eps / 2
    return values * (1 + unit * (2 * torch.rand_like(values.real) - 1))
