"""A real step of a run, every allocation watched: what an estimate is held against.

    run = prepare(model, optimizer, policy)
    lifetimes = watch_step(run, batch, loss_fn)
    measured = estimate_of_step(run, lifetimes)      # the same record, measured

The same ledger that foretells a step watches it here, over tensors with numbers. States
of the optimizer are there from its first step on: make one before, or the update that
is watched makes them too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from castwise.memory.estimate_records import Estimate, estimate_of
from castwise.memory.lifetimes import Ledger, Lifetimes
from castwise.training.step import Run


def watch_step(
    run: Run,
    batch: Sequence[Any],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    *,
    resizes: bool = False,
) -> Lifetimes:
    """Make one step, and write down what was born and died in it.

    The weights are updated, as by every step.

    Args:
        run: A prepared model.
        batch: The model's inputs and, last, the target of the loss.
        loss_fn: From the model's output and the target to a scalar.
        resizes: Follow storages that change their size, as those of FSDP2 do; slow.
    """
    ledger = Ledger(run.model, resizes=resizes)
    _name_standing(ledger, run, batch)
    watcher = _Marks(ledger, run)
    run.watchers.append(watcher)

    def compute() -> torch.Tensor:
        return loss_fn(run.model(*batch[:-1]), batch[-1])

    try:
        with ledger, run.step(again=compute) as step:
            loss = compute()
            ledger.begin("backward")
            step.backward(loss)
    finally:
        run.watchers.remove(watcher)
    return ledger.lifetimes()


def estimate_of_step(run: Run, lifetimes: Lifetimes) -> Estimate:
    """Return what a watched step amounts to, in the form of an estimate."""
    return estimate_of(
        lifetimes,
        policy=run.precision.effective.name,
        optimizer=type(run.optimizer).__name__,
        device=str(run.device),
        num_parameters=sum(weight.numel() for weight in run.model.parameters()),
        recompute=(),
    )


class _Marks:
    """Tells the ledger where the update begins."""

    def __init__(self, ledger: Ledger, run: Run) -> None:
        self._ledger, self._run = ledger, run

    def begins(self) -> None:
        """Nothing to note."""

    def gradients_ready(self, scale: float) -> None:
        """Mark the end of the backward, and name the gradients."""
        del scale
        self._ledger.begin("update")
        for name, weight in self._run.model.named_parameters():
            if weight.grad is not None:
                module = name.rpartition(".")[0]
                self._ledger.name(weight.grad, kind="gradients", module=module)

    def ends(self, *, stepped: bool) -> None:
        """Nothing to note."""
        del stepped


def _name_standing(ledger: Ledger, run: Run, batch: Sequence[Any]) -> None:
    for name, weight in run.model.named_parameters():
        module = name.rpartition(".")[0]
        ledger.name(weight, kind="weights", module=module)
        for state in run.optimizer.state.get(weight, {}).values():
            if isinstance(state, torch.Tensor):
                ledger.name(state, kind="states", module=module)
        if run.held is not None:
            for extra in run.held.beside(weight).values():
                ledger.name(extra, kind="storage", module=module)
    for name, buffer in run.model.named_buffers():
        ledger.name(buffer, kind="buffers", module=name.rpartition(".")[0])
    ledger.name_all(batch, kind="batch")
