"""Hypotheses of a diagnosis: each looks for one cause, and tells it with evidence.

They are listed in `HYPOTHESES` in the order in which they are looked for; the order is
part of the reasoning, because each of them relies on what the ones before ruled out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from castwise.formats import FORMATS
from castwise.numerics.diagnose.answers import (
    HELPS,
    blame_of,
    of_algorithm,
    of_data,
    of_range,
    of_rounding,
    of_underflow,
    operands,
    told,
)
from castwise.numerics.diagnose.case import CannotHold, Case, is_bad
from castwise.numerics.diagnose.causes import Blame, Diagnosis, EvidenceRow
from castwise.numerics.diagnose.experiments import (
    Emulated,
    Trail,
    Update,
    copies,
    is_range,
    taken_apart,
    widen_in_place,
)
from castwise.numerics.error import relative_error, share_zero
from castwise.numerics.forensics.origins import Origin
from castwise.numerics.operator_call import format_name
from castwise.numerics.validate.module_runs import ModuleRun

Hypothesis = Callable[[Case], Diagnosis | None]

_FP64 = FORMATS["fp64"]
_MASKED = 0.5
"""Share of zeros in an output above which an overflow was masked and not harmless."""


def refused_number(case: Case) -> Diagnosis | None:
    """PyTorch itself refuses a number that a tensor's format does not hold."""
    try:
        case.candidate_runs  # noqa: B018 -- run once, and kept
    except CannotHold as error:
        return told(
            case,
            "range",
            f"PyTorch refused it: {error}",
            f"use a constant that {case.format} holds, such as "
            "torch.finfo(x.dtype).min",
            Blame(where=str(error).rpartition(" at ")[2] or None),
        )
    return None


def nondeterminism(case: Case) -> Diagnosis | None:
    """Two runs with equal random states differ by more than is allowed."""
    again = [case.candidate(each)[0] for each in case.batches]
    pairs = [*zip(again, case.candidate_runs, strict=True)]
    if any(is_bad(run, with_loss=False) for pair in pairs for run in pair):
        return None
    difference = max(
        relative_error(a.outcome.output, b.outcome.output) for a, b in pairs
    )
    if case.rule.holds(difference, 0.0):
        return None
    case.evidence.append(
        EvidenceRow(
            what="the same run again", error=difference, note="against the first"
        )
    )
    name = _first_that_differs(case, *pairs[0])
    return told(
        case,
        "nondeterminism",
        f"two runs with equal random states differ by {difference:.2e}",
        "draw from torch, random or numpy with a seed, keep no state between calls, or "
        "call torch.use_deterministic_algorithms(True); diagnose again then",
        Blame(module=name),
    )


def fails_in_float64(case: Case) -> Diagnosis | None:
    """Float64 is not finite: the data, the range even of float64, or the algorithm."""
    for (run, trail), batch in zip(case.wide_trails, case.batches, strict=True):
        bad = is_bad(run, with_loss=case.loss_fn is not None)
        masked = not bad and _masked_overflow(run, trail)
        if not bad and not masked:
            continue
        case.evidence.append(
            EvidenceRow(
                what="fp64",
                measure=None,
                note="not finite"
                if bad
                else f"{share_zero(run.outcome.output):.0%} zeros",
            )
        )
        places = case.bad_inputs()
        if bad and places:
            return of_data(case, f"{places[0]} is not finite", places[0])
        weights = case.bad_weights()
        if bad and weights:
            return of_data(
                case,
                f"the weight or buffer {weights[0]} is not finite",
                None,
                weights[0],
            )
        origin = _blamed(trail, run)
        if origin is None:
            continue
        _narrower_trail(case, batch)
        if is_range(origin):
            return of_range(case, trail, origin, "float64 overflows as well")
        return told(
            case,
            "algorithm",
            f"float64 is not finite either: {origin.op} made {origin.made} of "
            f"{operands(origin)}, which has no answer in any format",
            "guard that line: no format helps",
            blame_of(origin, trail),
        )
    return None


def wrong_in_float64(case: Case) -> Diagnosis | None:
    """Float64 is finite and wrong all the same."""
    wide = [run for run, _ in case.wide_trails]
    figure, limit = case.figures(wide), case.settings.limit
    if case.settings.reference is not None and not _was_cast(case):
        case.note("the subject in fp64", wide)
        error, allowed = case.worst_error(wide), 1e-6 + 1.5 * _floor(case)
        if error > allowed:
            because = f"in float64 its error is {error:.3g} against the reference"
            return of_algorithm(case, because)
    if figure is None or limit is None:
        return None
    case.note("fp64", wide)
    if figure <= limit:
        return None
    if case.fp32_runs:
        case.note("fp32", case.fp32_runs)
    case.note(f"as it is ({case.format})", case.candidate_runs)
    return of_algorithm(
        case, f"in float64 the figure is {figure:.3g} as well, of {limit:.3g} allowed"
    )


def not_finite(case: Case) -> Diagnosis | None:
    """The candidate is not finite, and float64 is."""
    for run, batch in zip(case.candidate_runs, case.batches, strict=True):
        if not is_bad(run, with_loss=case.loss_fn is not None):
            continue
        trail = Trail(case.module)
        again, scale = case.candidate(batch, trail)
        origin = _blamed(trail, again)
        case.note_formats()
        if origin is None:
            continue
        if is_range(origin) or not origin.inputs_finite:
            because = f"float64 is finite, {case.format} is not"
            if origin.stage == "backward" and scale > 1:
                because += f", at loss scale {scale:g}"
            return of_range(case, trail, origin, because)
        return told(
            case,
            "rounding",
            f"{origin.op} made {origin.made} of {operands(origin)}; in float64 it is "
            "not asked to, so rounding made those operands",
            f"hold {origin.site.module or 'that line'} in fp32",
            blame_of(origin, trail),
        )
    return None


def cast_tensor(case: Case) -> Diagnosis | None:
    """One buffer or weight, rounded alone, explains the error."""
    error = case.worst_error(case.candidate_runs)
    if case.holds(case.candidate_runs) or not isinstance(case.right.subject, nn.Module):
        return None
    explained = {}
    for name, fmt in _held_low(case).items():
        explained[name] = case.worst_error(_with_rounded(case, name, fmt))
    worst = max(explained, key=lambda name: explained[name], default=None)
    if worst is None or explained[worst] < 0.5 * error:
        return None
    fmt = _held_low(case)[worst]
    case.note_formats()
    case.evidence.append(
        EvidenceRow(what=f"fp64 with {worst} alone in {fmt}", error=explained[worst])
    )
    return told(
        case,
        "rounding",
        f"{worst} held in {fmt}, and nothing else, makes an error of "
        f"{explained[worst]:.2g} of {error:.2g}",
        f"hold {worst} in fp32: buffers of positions and angles never go below",
        Blame(tensor=worst, module=worst.rpartition(".")[0], stage="forward"),
    )


def format_apart(case: Case) -> Diagnosis | None:
    """The error goes away with a wider exponent alone, or with more digits alone."""
    runs = case.candidate_runs
    if case.holds(runs):
        return None
    case.note_formats()
    error, fmt = case.worst_error(runs), FORMATS[case.format]
    scale = case.candidate(case.batches[0])[1]
    found = {}
    for what, bits in (
        ("both as they are", (fmt.exponent_bits, fmt.mantissa_bits)),
        ("a wider exponent", (_FP64.exponent_bits, fmt.mantissa_bits)),
        ("more digits", (fmt.exponent_bits, _FP64.mantissa_bits)),
    ):
        emulated = case.emulated(taken_apart(*bits), scale)
        found[what] = case.worst_error(emulated)
        label = f"{bits[0]} exponent and {bits[1]} mantissa bits"
        case.note(label, emulated, note=f"every operator emulated: {what}")
    trail = Trail(case.module)
    case.candidate(case.batches[0], trail)
    origin = trail.first if trail.first and is_range(trail.first) else None
    helped = max(error / HELPS, min(case.rule.tolerance, error / 2))
    if found["a wider exponent"] < helped:
        if origin is not None:
            return of_range(
                case, trail, origin, "the error goes away with a wider exponent"
            )
        return of_underflow(case, found["a wider exponent"], error)
    return of_rounding(case, error, found["more digits"])


def lost_update(case: Case) -> Diagnosis | None:
    """Weights in few bits do not move when the optimizer steps."""
    optimizer, model = case.settings.optimizer, case.module
    if optimizer is None or model is None:
        return None
    updates = _updates(case, model, optimizer)
    lost = [each for each in updates if each.unmoved > 0.5]
    if not lost:
        return None
    worst = max(lost, key=lambda each: each.unmoved)
    for each in lost[:5]:
        note = (
            f"{each.unmoved:.1%} of its numbers did not move, by {each.size:.1e} each"
        )
        case.evidence.append(
            EvidenceRow(what=f"{each.parameter} in {each.format}", note=note)
        )
    return told(
        case,
        "rounding",
        f"the update is {worst.size:.1e} of the weights, less than half a unit of "
        f"{worst.format}: {worst.unmoved:.1%} of {worst.parameter} rounds back to what "
        "it was",
        "hold the weights so that small updates survive: castwise.hold_weights with "
        "storage master, split, kahan or stochastic; or a policy with p=fp32",
        Blame(
            op="update",
            module=worst.parameter.rpartition(".")[0],
            stage="update",
            tensor=worst.parameter,
        ),
    )


HYPOTHESES: tuple[Hypothesis, ...] = (
    refused_number,
    nondeterminism,
    fails_in_float64,
    wrong_in_float64,
    not_finite,
    cast_tensor,
    format_apart,
    lost_update,
)
"""In the order in which they are looked for."""


def _masked_overflow(run: ModuleRun, trail: Trail) -> bool:
    """Whether something overflowed and most of the output is zero instead."""
    first = trail.first
    return (
        first is not None
        and is_range(first)
        and share_zero(run.outcome.output) > _MASKED
    )


def _blamed(trail: Trail, run: ModuleRun) -> Origin | None:
    """The origin of what is not finite in a run, or else the first one."""
    results = [
        *run.outcome.output.values(),
        *run.outcome.gradients.values(),
        *run.outcome.input_gradients,
    ]
    found = trail.blamed(results)
    return found if found is not None else trail.first


def _narrower_trail(case: Case, batch: Any) -> None:
    """Note at which call the subject as it is overflows."""
    trail = Trail(case.module)
    case.candidate(batch, trail)
    first = trail.first
    if first is not None:
        note = f"call {trail.call_of(first)} of {first.op} made {first.made}"
        case.evidence.append(EvidenceRow(what=f"as it is ({first.format})", note=note))


def _floor(case: Case) -> float:
    return min(case.worst_error(case.fp32_runs), 1e-3) if case.fp32_runs else 0.0


def _was_cast(case: Case) -> bool:
    """Whether the reference is the same model before something was cast."""
    reference = case.settings.reference
    if case.module is None or not isinstance(reference, nn.Module):
        return False
    return case.module.state_dict().keys() == reference.state_dict().keys()


def _held_low(case: Case) -> dict[str, str]:
    """Buffers that the candidate holds in fewer digits than the reference."""
    assert case.module is not None
    original = case.settings.reference or case.original
    if not isinstance(original, nn.Module):
        return {}
    before = dict(original.named_buffers())
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    return {
        name: names[now.dtype]
        for name, now in case.module.named_buffers()
        if now.dtype in names
        and name in before
        and before[name].dtype.itemsize > now.dtype.itemsize
    }


def _with_rounded(case: Case, name: str, fmt: str) -> list[ModuleRun]:
    """The reference in float64 with one buffer rounded."""
    wide = case.wide_of_reference()
    assert wide.module is not None
    buffer = wide.module.get_buffer(name)
    with torch.no_grad():
        buffer.copy_(Emulated(FORMATS[fmt]).rounded(buffer))
    return [wide.run(each, case.settings.seed) for each in case.batches]


def _first_that_differs(case: Case, one: ModuleRun, other: ModuleRun) -> str | None:
    for key, values in one.outputs.items():
        again = other.outputs.get(key)
        same = again is not None and len(again) == len(values)
        if not same or relative_error(values, again) > case.rule.tolerance:
            return key[0] or None
    return None


def _updates(
    case: Case, model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[Update]:
    """One step of copies: as it is, and in float64."""
    changes = []
    gradients = case.candidate_runs[0].outcome.gradients
    for wide in (False, True):
        copied, stepper = copies(model, optimizer)
        if wide:
            widen_in_place(copied, stepper)
        named = dict(copied.named_parameters())
        before = {name: weight.detach().clone() for name, weight in named.items()}
        for name, gradient in gradients.items():
            named[name].grad = gradient.to(named[name].dtype)
        stepper.step()
        changes.append(
            {n: named[n].detach().double() - before[n].double() for n in gradients}
        )
    found = []
    for name, change in changes[0].items():
        wanted = changes[1][name]
        should = wanted != 0
        if not should.any():
            continue
        weight = dict(model.named_parameters())[name].detach().double()
        sizes = (wanted.abs() / weight.abs().clamp_min(1e-30))[should]
        found.append(
            Update(
                parameter=name,
                format=format_name(dict(model.named_parameters())[name].dtype),
                unmoved=float((change[should] == 0).double().mean()),
                size=float(sizes.median()),
            )
        )
    return found
