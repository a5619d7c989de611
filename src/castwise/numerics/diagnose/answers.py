"""Answers of a diagnosis: what was found, put into words, with blame and remedy."""

from __future__ import annotations

from castwise.numerics.diagnose.case import Case
from castwise.numerics.diagnose.causes import Blame, Cause, Diagnosis, EvidenceRow
from castwise.numerics.diagnose.experiments import Trail
from castwise.numerics.forensics.origins import Origin
from castwise.numerics.validate.module_runs import measure_modules

HELPS = 10
"""An experiment has helped where it makes the error this many times smaller."""

_SCALES = (2.0**8, 2.0**12, 2.0**16, 2.0**20)


def told(
    case: Case, cause: Cause, because: str, remedy: str, blame: Blame
) -> Diagnosis:
    """Return an answer with the evidence so far."""
    return Diagnosis(
        subject=case.name,
        cause=cause,
        because=because,
        remedy=remedy,
        blame=blame,
        evidence=tuple(case.evidence),
    )


def of_data(
    case: Case, because: str, where: str | None, tensor: str | None = None
) -> Diagnosis:
    """Something that was put in is not finite."""
    return told(
        case,
        "data",
        f"{because}, and float64 is not finite either",
        "look at what made it, before any format",
        Blame(where=where, tensor=tensor),
    )


def of_algorithm(case: Case, because: str) -> Diagnosis:
    """Wrong in float64; how the iterations go is evidence."""
    figures = []
    for number, subject in sorted(case.settings.iterations.items()):
        runs = case.wide_runs_of(subject)
        figure = case.figures(runs)
        figures.append(case.worst_error(runs) if figure is None else figure)
        case.evidence.append(
            EvidenceRow(what=f"fp64, {number} iterations", measure=figures[-1])
        )
    if len(figures) > 1 and figures[-1] > 10 * figures[0]:
        course = f"{figures[0]:.2e} to {figures[-1]:.2e}"
        because += f", and more iterations make it worse ({course})"
    return told(
        case,
        "algorithm",
        f"{because}: no format helps",
        "change the algorithm; for iterative solvers check what they require of the "
        "system, such as symmetry and definiteness",
        Blame(module=None),
    )


def of_range(case: Case, trail: Trail, origin: Origin, because: str) -> Diagnosis:
    """Too large for the exponent, or zero for want of a smaller one."""
    call = trail.call_of(origin)
    blame = blame_of(origin, trail)
    held = "" if origin.inputs_finite else f" ({origin.source or 'what it was fed'})"
    what = "flushed to zero" if origin.kind == "underflow" else f"made {origin.made}"
    fed = f"{operands(origin)}{held} in {origin.format}"
    said = f"call {call} of {origin.op} {what} of {fed}"
    remedy = (
        "rescale as it goes (carry ratios or logarithms instead of products), or take "
        "a format with a wider exponent"
    )
    if origin.stage == "backward":
        remedy = "lower the loss scale, or take a format with a wider exponent"
    elif origin.format == "fp16":
        remedy = (
            "keep constants and intermediate results below 65504: for a mask use "
            "torch.finfo(x.dtype).min; or take bf16, which has the range of fp32"
        )
    return told(case, "range", f"{said}: {because}", remedy, blame)


def of_underflow(case: Case, wide_exponent: float, error: float) -> Diagnosis:
    """Too small for the exponent: which operator flushes, and which scale helps."""
    flushing = [each for each in case.operators() if each.flushed > 0.05]
    backward = [each for each in flushing if each.stage == "backward"]
    worst = max(backward or flushing, key=lambda each: each.flushed, default=None)
    remedy = "rescale, or take a format with a wider exponent"
    if worst is not None and worst.stage == "backward":
        remedy = "use a loss scale (a policy with loss_scale: dynamic), or bf16"
        scale = _scale_that_helps(case, error)
        if scale is not None:
            remedy = f"use a loss scale: {scale:g} brings the gradients back; or bf16"
    share = (
        ""
        if worst is None
        else f"; {worst.flushed:.0%} of what {worst.op} makes is zero"
    )
    return told(
        case,
        "range",
        f"the error falls from {error:.2g} to {wide_exponent:.2g} with a wider "
        f"exponent and the same digits: numbers underflow in {case.format}{share}",
        remedy,
        Blame()
        if worst is None
        else Blame(
            op=worst.op, module=worst.module, stage=worst.stage, where=worst.where
        ),
    )


def of_rounding(case: Case, error: float, more_digits: float) -> Diagnosis:
    """Too few digits: which operator is off by itself, if one is."""
    bad = [each for each in case.operators() if not each.holds(case.rule)]
    forward = [each for each in bad if each.stage == "forward"]
    worst = max(forward or bad, key=lambda each: each.error, default=None)
    if worst is not None:
        blame = Blame(
            op=worst.op, module=worst.module, stage=worst.stage, where=worst.where
        )
        named = f"{worst.op} alone, on right inputs, is off by {worst.error:.2g}"
    else:
        blame = Blame(module=_first_off(case))
        named = (
            "no operator is off by itself: small errors add up or are amplified, as at "
            "the kink of a ReLU"
        )
    return told(
        case,
        "rounding",
        f"the error falls from {error:.2g} to {more_digits:.2g} with more digits and "
        f"the same exponent; {named}",
        f"hold {blame.module} in fp32 by a rule of the policy"
        if blame.module
        else "hold that in fp32, let a search find what must be (castwise search), or "
        "accept it by a tolerance",
        blame,
    )


def blame_of(origin: Origin, trail: Trail) -> Blame:
    """Return where an infinity or NaN began."""
    return Blame(
        op=origin.op,
        module=origin.site.module,
        stage=origin.stage,
        where=origin.site.where,
        tensor=(origin.source or "").split(" ")[-1] or None,
        call=trail.call_of(origin),
    )


def operands(origin: Origin) -> str:
    """Return what an operator was fed, in words."""
    if origin.values:
        return ", ".join(f"{value:.6g}" for value in origin.values)
    return f"operands up to {origin.largest_input:.3g}"


def _scale_that_helps(case: Case, error: float) -> float | None:
    for scale in _SCALES:
        runs = [case.candidate(each, scale=scale)[0] for each in case.batches]
        now = case.worst_error(runs)
        case.evidence.append(EvidenceRow(what=f"loss scale {scale:g}", error=now))
        if case.holds(runs) or now < error / HELPS:
            return scale
    return None


def _first_off(case: Case) -> str | None:
    """The first module, in the order of execution, whose output is too far off."""
    assert case.module is not None or not case.candidate_runs[0].outputs
    order = [fqn for fqn, _ in case.candidate_runs[0].outputs if fqn]
    found = measure_modules(
        case.candidate_runs[0], case.right_runs[0], list(dict.fromkeys(order)), "fp32"
    )
    off = (
        fqn
        for fqn, each in found.items()
        if each.output and not case.rule.holds(each.output.relative, 0.0)
    )
    return next(off, None)
