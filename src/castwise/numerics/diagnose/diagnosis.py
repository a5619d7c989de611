"""Diagnosis: it broke, or it is wrong. Rounding, range, or an algorithm that fails?

    cause = diagnose(model, batches, loss_fn, policy)
    cause.summary()    Net under 16-mixed: range at mul in attention (forward) ...

Each cause has an experiment that tells it from the others, and they are made in this
order; the first that answers ends the search:

    nondeterminism   two runs with equal random states differ
    data             a batch holds an infinity or NaN, and float64 is not finite either
    range            float64 overflows as well, as a recursion without scaling does; or
                     the error goes away when only the exponent gets wider
    algorithm        float64 is not finite, or not right by a reference or a figure of
                     merit, or gets worse with every iteration
    rounding         the error goes away with more digits; or weights in few bits do
                     not move when the optimizer steps

A subject is a module with batches `(inputs..., target)` and a loss, or, without a loss,
any function with batches of its arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from castwise.errors import TargetError
from castwise.numerics.diagnose.case import Case, Figure, Settings, Subject
from castwise.numerics.diagnose.causes import Blame, Cause, Diagnosis, EvidenceRow
from castwise.numerics.diagnose.hypotheses import HYPOTHESES
from castwise.numerics.target import Batch, LossFn, checked_batches
from castwise.policy.rules import Policy

__all__ = ["Blame", "Cause", "Diagnosis", "EvidenceRow", "diagnose"]


def diagnose(
    subject: Subject,
    batches: Iterable[Batch],
    loss_fn: LossFn | None = None,
    policy: Policy | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    reference: Subject | None = None,
    measure: Figure | None = None,
    limit: float | None = None,
    iterations: Mapping[int, Subject] | None = None,
    k: float = 1.5,
    tolerance: float | None = None,
    seed: int = 0,
    phase: str = "full",
) -> Diagnosis:
    """Find out why something breaks.

    The subject is unedited, and afterwards what it was.

    Args:
        subject: A module, or any function.
        batches: Tuples of inputs and, where there is a loss, last the target.
        loss_fn: From output and target to a scalar. Default: only the forward runs.
        policy: What it runs under. Default: it runs as it is.
        optimizer: What updates the weights; one step of a copy is tried. Default: none.
        reference: Another algorithm, or the model as it was before it was cast; it runs
            in float64. Default: the subject itself.
        measure: From an output and the inputs to a figure that is small when all is
            well, such as a residual. Default: the loss, where a limit is given.
        limit: What the figure may be.
        iterations: The subject by its number of iterations.
        k: How many times the error of fp32 an error may be.
        tolerance: What is allowed on top. Default: 16 rounding errors of the narrowest
            format.
        seed: Of random draws.
        phase: The phase of the policy.

    Raises:
        PolicyError: The policy cannot be put on this model.
        TargetError: Something is not as needed, or does not run in float64.
    """
    checked: tuple[Batch, ...]
    if loss_fn is None:
        checked = tuple(_arguments(each) for each in batches)
        if not checked:
            raise TargetError("a diagnosis needs at least 1 batch of arguments, got 0")
    else:
        checked = checked_batches(batches, what="a diagnosis", at_least=1)
    if measure is not None and limit is None:
        raise TargetError("a measure needs a limit: the figure that is still all right")
    settings = Settings(
        reference=reference,
        measure=measure,
        limit=limit,
        iterations=dict(iterations or {}),
        optimizer=optimizer,
        k=k,
        tolerance=tolerance,
        seed=seed,
        phase=phase,
    )
    case = Case(subject, checked, loss_fn, policy, settings)
    with case.in_force():
        for look in HYPOTHESES:
            found = look(case)
            if found is not None:
                return found
        case.note_formats()
    return Diagnosis(
        subject=case.name,
        cause="none",
        because="every error is within what is allowed, and every result is finite",
        remedy="nothing to do",
        blame=Blame(),
        evidence=tuple(case.evidence),
    )


def _arguments(batch: Any) -> tuple[Any, ...]:
    if not isinstance(batch, (tuple, list)):
        raise TargetError(
            f"a diagnosis of a function needs tuples of its arguments, got a "
            f"{type(batch).__name__}; give an iterable such as [(x,)]"
        )
    return tuple(batch)
