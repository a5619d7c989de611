"""Validation: is a policy good enough? Errors against float64, beside those of fp32.

    report = validate(model, batches, loss_fn, policy)
    report.summary()   validation of bf16-mixed holds: output 3.1e-03 of 6.3e-02, ...
    report.check()     raises BudgetError and names what is too far off

Three runs on each batch and seed see the same weights, inputs and random draws:

    reference   the model replayed in float64, or another algorithm that you give
    baseline    the reference in fp32: its error is the noise floor
    candidate   the unedited model under the policy

and what must hold, for the output, the loss, the gradients of weights and inputs, and
each module, is `error.NoiseRule`: error(candidate) <= k * error(baseline) + tolerance.
The baseline runs twice, once with every weight moved by up to half a unit of fp32: any
other order of summation moves results as much.

A module that is off says whether its own operators are at fault or what it was fed.
If candidate and reference agree in every bit, nothing was compared, and that fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from castwise.dtypes import DTYPES, format_of
from castwise.errors import SettingsError, TargetError
from castwise.formats import FORMATS
from castwise.islands import AppliedPolicy, apply_policy, module_facts
from castwise.loss_scale import loss_scale_of
from castwise.numerics.error import (
    DEFAULT_K,
    MOST_TOLERATED,
    TOLERATED_ROUNDINGS,
    NoiseRule,
    default_tolerance,
)
from castwise.numerics.over_ranks import all_say, refuse_nobody
from castwise.numerics.target import Batch, LossFn, checked_batches
from castwise.numerics.untouched import untouched
from castwise.numerics.validate.module_runs import ModuleRun
from castwise.numerics.validate.operators_on_trial import ReferenceOperators
from castwise.numerics.validate.tally import Share, Tally, whole_of
from castwise.numerics.validate.three_runs import BaselineRun, CandidateRun, WideRun
from castwise.numerics.validate.verdicts import Judged, ModuleVerdict, Validation
from castwise.policy.rules import Policy
from castwise.region import Region

__all__ = ["Judged", "ModuleVerdict", "Validation", "validate"]


def validate(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    policy: Policy,
    *,
    reference: Callable[..., Any] | None = None,
    k: float = DEFAULT_K,
    tolerance: float | None = None,
    seeds: Sequence[int] = (0,),
    phase: str = "full",
    operators: bool = True,
    over_ranks: bool = False,
) -> Validation:
    """Run a model under a policy, in fp32 and in float64, and compare.

    The model is unedited, and afterwards what it was. It runs in the mode, train or
    eval, that it is in.

    Args:
        model: Any module tree, without a policy on it; a compiled one runs eagerly.
        batches: Tuples of the model's inputs and, last, the target; at least one.
        loss_fn: From the model's output and the target to a scalar.
        policy: The candidate.
        reference: Another algorithm, as a module or any callable of the same inputs;
            it runs in float64. Default: the model itself.
        k: How many times the noise floor an error may be.
        tolerance: What is allowed on top. Default: 16 rounding errors of the narrowest
            format of the policy.
        seeds: Of random draws in the model, such as dropout masks.
        phase: The phase to validate.
        operators: Whether operators are tried alone: all of them on the first batch and
            seed, and again on each other that puts a module off that none did before.
            It takes two more runs of each, and memory for the activations of the
            reference.
        over_ranks: Whether all processes validate together, each on its own batches:
            the worst of all is judged, and every rank gets the same report. Every rank
            must call, with whole weights.

    Raises:
        PolicyError: The policy cannot be put on this model.
        TargetError: A batch or the loss is not as needed, or the reference does not run
            in float64; the message names operator and line.
        BudgetError: `k` or `tolerance` is no number from 0 on.
    """
    refuse_nobody("a validation", together=over_ranks)
    model = getattr(model, "_orig_mod", model)
    checked = checked_batches(batches, what="a validation", at_least=1)
    if not seeds:
        raise SettingsError("a validation needs at least one seed, such as seeds=(0,)")
    device = device_of(model)
    right_one = model if reference is None else reference
    exact = WideRun(right_one, loss_fn, device)
    baseline = BaselineRun(right_one, loss_fn, device)
    with untouched(model, device):
        applied = apply_policy(
            model, policy.bind(module_facts(model)), device.type, phase=phase
        )
        try:
            fmt = narrowest_format(applied)
            rule, because = rule_for(fmt, k, tolerance)
            candidate = CandidateRun(
                model,
                loss_fn,
                device,
                Region.of(policy, phase, (applied,)),
                loss_scale_of(policy.decide_loss_scale().value).scale,
            )
            tally = Tally(model, fmt, rule)

            def measured() -> Share:
                for seed in seeds:
                    for batch in checked:
                        tries = operators and tally.is_empty
                        right, got = _run_both(
                            exact, candidate, batch, seed, tries=tries
                        )
                        tally.add(right, got, baseline.run(batch, seed))
                        if operators and tally.is_news and not tries:
                            _run_both(exact, candidate, batch, seed, tries=True)
                return Share.of(tally, candidate, exact, len(checked))

            share = whole_of(all_say(measured, together=over_ranks))
            tally, tried = share.tally, share.operators
            modules = tally.verdicts(applied, tried)
        finally:
            applied.remove()
    return Validation(
        candidate=policy.name,
        reference=exact.name,
        device=str(device),
        rule=rule,
        because=because,
        num_batches=share.num_batches,
        seeds=tuple(seeds),
        results=tally.results(),
        loss_drift=tally.drift,
        loss_floor=tally.drift_floor,
        scale=share.scale,
        modules=modules,
        operators=tried,
        untried=share.untried,
        lifted=share.lifted,
        compared=tally.compared,
    )


def _run_both(
    exact: WideRun, candidate: CandidateRun, batch: Batch, seed: int, *, tries: bool
) -> tuple[ModuleRun, ModuleRun]:
    """Run reference and candidate on one batch and seed, with operators on trial."""
    recorder = ReferenceOperators(exact.module) if tries else None
    try:
        right = exact.run(batch, seed, *([recorder] if recorder else []))
    except TargetError:
        candidate.run(batch, seed)  # its own error is told first
        raise
    return right, candidate.run(batch, seed, recorder)


def device_of(model: nn.Module) -> torch.device:
    """Where a model is."""
    return next((weight.device for weight in model.parameters()), torch.device("cpu"))


def rule_for(
    fmt: str, k: float = DEFAULT_K, tolerance: float | None = None
) -> tuple[NoiseRule, str]:
    """The rule for results of a format, and where its tolerance comes from."""
    if tolerance is not None:
        return NoiseRule(k=k, tolerance=tolerance), "a tolerance that was given"
    allowed = default_tolerance(fmt)
    most = ", at most a quarter" if allowed == MOST_TOLERATED else ""
    return (
        NoiseRule(k=k, tolerance=allowed),
        f"{TOLERATED_ROUNDINGS} rounding errors of {fmt}{most}",
    )


def narrowest_format(applied: AppliedPolicy) -> str:
    """The format with the fewest digits that a policy computes or holds anything in."""
    bound, phase = applied.bound, applied.phase
    asked = [bound.precision_of(fqn, phase=phase) for fqn in bound.governing]
    asked.append(bound.policy.base_precision(phase=phase))
    found = {fmt for each in asked for fmt in (each.param, each.compute) if fmt}
    found |= {
        format_of(buffer.dtype)
        for buffer in (held.tensor for held in applied.held)
        if buffer is not None and buffer.dtype in DTYPES.values()
    }
    return max(found, key=lambda name: FORMATS[name].eps)
