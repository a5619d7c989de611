"""All checks in order, on a model that is afterwards bit for bit what it was."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from castwise.errors import SettingsError
from castwise.islands import apply_policy, module_facts
from castwise.numerics.lint.findings import (
    Finding,
    LintReport,
    silences_of,
    sorted_out,
)
from castwise.numerics.lint.functions import (
    bare_functions,
    functions_in,
    masked_by_constants,
)
from castwise.numerics.lint.observed import (
    LossCalls,
    Observation,
    Smoothed,
    bce_finding,
    low_loss_finding,
)
from castwise.numerics.lint.subject import LOW, Subject, low_format
from castwise.numerics.lint.tables import (
    constant_finding,
    constant_tables,
    integer_tables,
    rounded_frequencies,
)
from castwise.numerics.lint.updates import (
    lost_decay,
    lost_updates,
    vanishing_module_eps,
    vanishing_optimizer_eps,
)
from castwise.numerics.target import Batch, LossFn, checked_batches, checked_loss
from castwise.numerics.untouched import untouched
from castwise.policy.rules import Policy
from castwise.region import Region


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """What one observed forward brought."""

    findings: tuple[Finding, ...]
    smoothed: tuple[Smoothed, ...]
    functions: tuple[type, ...] | None
    gradients: Mapping[str, torch.Tensor]
    stopped_by: str | None


def lint(
    model: nn.Module,
    policy: Policy,
    optimizer: torch.optim.Optimizer | None = None,
    batches: Iterable[Batch] | None = None,
    loss_fn: LossFn | None = None,
    *,
    silence: Mapping[str, str] | None = None,
    target_loss: float | None = None,
    phase: str = "full",
) -> LintReport:
    """Look for mistakes of precision before the first step.

    Args:
        model: Any module tree, without a policy on it.
        policy: What would run in which format.
        optimizer: What would update the weights.
        batches: Tuples of the model's inputs and the target; the first is observed.
        loss_fn: From the model's output and the target to a scalar.
        silence: Check, or check@glob of places -> the reason why it is accepted; beside
            the silences of the policy.
        target_loss: The loss that the run hopes to reach.
        phase: The phase to look at.

    Raises:
        PolicyError: The policy cannot be put on this model.
        RuleError: A silence names no check or gives no reason.
        TargetError: A batch is no tuple, or the loss no scalar with a gradient.
    """
    silences = silences_of(policy.silences, silence)
    if target_loss is not None and loss_fn is None:
        raise SettingsError("target_loss needs a loss_fn to compare it with; give one")
    checked = None if batches is None else checked_batches(batches, what="a lint")
    inner = getattr(model, "_orig_mod", model)
    device = next((weight.device for weight in inner.parameters()), torch.device("cpu"))
    before = dict(inner.named_buffers())
    before = {name: value.detach() for name, value in before.items()}
    with untouched(inner, device):
        applied = apply_policy(
            inner, policy.bind(module_facts(inner)), device.type, phase=phase
        )
        try:
            subject = Subject(
                model=inner,
                applied=applied,
                before=before,
                optimizer=optimizer,
                gradients={},
                loss_fn=loss_fn,
            )
            seen = _observe(subject, checked, device) if checked and loss_fn else None
            found = list(_all_findings(subject, seen, target_loss))
        finally:
            applied.remove()
    open_findings, silenced = sorted_out(found, silences)
    return LintReport(
        policy=policy.name,
        findings=open_findings,
        silenced=silenced,
        unchecked=tuple(_unchecked(optimizer, seen)),
        unused=tuple(key for key in silences if key not in {s.key for s in silenced}),
    )


def _all_findings(
    subject: Subject, seen: _Seen | None, target_loss: float | None
) -> Iterator[Finding]:
    if seen is not None:
        subject = replace(subject, gradients=seen.gradients)
        yield from seen.findings  # first, because they know the line
    yield from rounded_frequencies(subject)
    yield from integer_tables(subject)
    yield from constant_tables(subject)
    yield from vanishing_module_eps(subject)
    yield from lost_updates(subject)
    yield from lost_decay(subject)
    yield from vanishing_optimizer_eps(subject)
    yield from bare_functions(subject, None if seen is None else seen.functions)
    if seen is None or seen.stopped_by:
        for fqn, line, value in masked_by_constants(subject):
            yield constant_finding(fqn, f"{fqn} at {line}", value)
    if seen is None:
        yield from _unobserved_loss(subject)
    yield from _unreachable(seen, target_loss)


def _observe(subject: Subject, batches: Sequence[Batch], device: torch.device) -> _Seen:
    """Run forward and loss once; backward too, where the optimizer goes by its size."""
    observation, calls = Observation(subject), LossCalls()
    applied = subject.applied
    region = Region.of(applied.bound.policy, applied.phase, (applied,))
    *inputs, target = batches[0]
    loss_fn = subject.loss_fn
    assert loss_fn is not None
    stopped_by = None
    functions: tuple[type, ...] | None = None
    gradients: dict[str, torch.Tensor] = {}
    with region.entered(device.type):
        try:
            with observation:
                output = subject.model(*inputs)
                with calls, observation.of_loss():
                    loss = checked_loss(loss_fn(output, target), what="a lint")
        except RuntimeError as error:
            if not observation.findings:
                raise
            stopped_by = str(error).strip().partition("\n")[0]
        else:
            fmt = low_format(loss)
            if fmt is not None:
                observation.findings.append(low_loss_finding("the loss", fmt.name))
            functions = functions_in(loss, observation.multiplying)
            gradients = _gradients(subject, loss, device)
    return _Seen(
        findings=tuple(observation.findings),
        smoothed=tuple(calls.smoothed),
        functions=functions,
        gradients=gradients,
        stopped_by=stopped_by,
    )


def _gradients(
    subject: Subject, loss: torch.Tensor, device: torch.device
) -> dict[str, torch.Tensor]:
    """The gradients of one batch, where the size of an update depends on them."""
    if not type(subject.optimizer).__name__.lower().startswith("sgd"):
        return {}
    with torch.autocast(device.type, enabled=False):
        loss.backward()  # type: ignore[no-untyped-call]
    return {
        name: weight.grad
        for name, weight in subject.model.named_parameters()
        if weight.grad is not None
    }


def _unobserved_loss(subject: Subject) -> Iterator[Finding]:
    """What the loss function alone tells, where no batch is there to run."""
    loss_fn, low = subject.loss_fn, subject.around
    plain = loss_fn.func if isinstance(loss_fn, functools.partial) else loss_fn
    takes_probabilities = plain is nn.functional.binary_cross_entropy
    if low in LOW and (takes_probabilities or isinstance(plain, nn.BCELoss)):
        yield bce_finding("loss", "the loss function", low)


def _unreachable(seen: _Seen | None, target_loss: float | None) -> Iterator[Finding]:
    if target_loss is None or seen is None:
        return
    for each in seen.smoothed:
        if target_loss < each.least_loss:
            yield Finding(
                check="smoothed-target",
                place="loss",
                where="the loss function",
                why=f"label smoothing of {each.smoothing:g} over {each.num_classes} "
                "classes keeps the loss above its entropy",
                figure=f"no prediction is below {each.least_loss:.4g}, and the target "
                f"is {target_loss:g}",
                remedy="raise the target, smooth less, or measure without smoothing",
            )


def _unchecked(
    optimizer: torch.optim.Optimizer | None, seen: _Seen | None
) -> Iterator[str]:
    if optimizer is None:
        yield "learning rate, decay and eps were not looked at: give the optimizer"
    elif not optimizer.param_groups or "lr" not in optimizer.param_groups[0]:
        yield "updates were not looked at: the optimizer has no lr"
    if seen is None:
        yield "no forward was observed: give batches and a loss_fn"
    elif seen.stopped_by:
        yield f"the forward stopped half-way: {seen.stopped_by}"
