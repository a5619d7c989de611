"""Which modules become islands, and what happens at the border of each.

A module has a border where its compute or output format differs from that of the
nearest module above it that has a `forward`. A container without one, such as a
`ModuleList`, is no border; what it contains is. The root has a border only where its
own formats are not the policy's default, or where weights are held in the format that
they are computed in (`bf16-true`, `64-true`): then the inputs that a caller brings must
be cast for it.

An island that casts its weights, or rounds them to fp8, for the length of its forward
has inner borders as well: modules inside of it that own weights do the same again, for
they may be recomputed alone when the forward is over.

Where a rule gives the backward of a module another compute format than its forward, the
topmost such module is run again for its backward. It and the modules inside of it then
have second borders, laid out in the same way from the precisions of the backward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from castwise.fp8_products import FP8
from castwise.islands.border import LOW, Border
from castwise.policy.keys import PHASES

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from castwise.policy.bound import BoundPolicy
    from castwise.policy.precision import Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The islands of one phase, by the first name of each."""

    borders: Mapping[str, Border]
    """Where casts happen."""

    second: Mapping[str, Border]
    """Where they happen in modules that are run again for their backward."""

    own_backward: frozenset[str]
    """The topmost modules that are run again."""


def lay_out(
    model: nn.Module, bound: BoundPolicy, device_type: str
) -> dict[str, Layout]:
    """Lay the islands of a model out, for each phase."""
    layouts = {}
    for phase in PHASES:
        turned = _with_own_backward(model, bound, phase)
        second = {}
        if turned:
            every = _borders(model, bound, phase, "backward", device_type, turned)
            second = {
                fqn: border
                for fqn, border in every.items()
                if any(is_inside(fqn, above) for above in turned)
            }
        layouts[phase] = Layout(
            borders=_borders(model, bound, phase, "forward", device_type),
            second=second,
            own_backward=frozenset(turned),
        )
    return layouts


def is_inside(fqn: str, above: str) -> bool:
    """Whether a module is the one above, or below it."""
    return not above or fqn == above or fqn.startswith(f"{above}.")


def governing_fqn(fqn: str) -> str:
    """The module whose precision holds: for a parametrization, the parametrized one."""
    return f".{fqn}".partition(".parametrizations")[0].removeprefix(".")


def _with_own_backward(model: nn.Module, bound: BoundPolicy, phase: str) -> list[str]:
    """Find the topmost modules whose backward computes in another format."""
    found: list[str] = []
    for fqn, module in model.named_modules():  # parents first
        forward, backward = (
            bound.precision_of(governing_fqn(fqn), stage=stage, phase=phase).compute
            for stage in ("forward", "backward")
        )
        if forward == backward or not _has_forward(module):
            continue
        if not any(is_inside(fqn, above) for above in found):
            found.append(fqn)
    return found


def _borders(
    model: nn.Module,
    bound: BoundPolicy,
    phase: str,
    stage: str,
    device_type: str,
    turned: Container[str] = (),
) -> dict[str, Border]:
    """Islands of one phase and stage by name, and their borders."""
    first_names = {module: fqn for fqn, module in model.named_modules()}
    borders = {}
    for fqn, (outside, inside) in _insides(model, bound, phase, stage, turned).items():
        own, *others = (
            bound.precision_of(governing_fqn(each), stage=stage, phase=phase)
            for each in inside
        )
        assert own.compute is not None
        first = first_names[model.get_submodule(fqn)]
        borders[first] = Border(
            compute=own.compute,
            output=None if fqn in turned else _handed_out(own, outside),
            device_type=device_type,
            casts_weights=any(map(_weights_need_a_cast, (own, *others))),
            is_within_fp8=outside.compute in FP8,
        )
        if borders[first].casts_weights or own.compute in FP8:
            inner = replace(borders[first], output=None, is_inner=True)
            for each in inside[1:]:
                module = model.get_submodule(each)
                if _can_run_alone(each, module):
                    borders.setdefault(first_names[module], inner)
    return borders


def _can_run_alone(fqn: str, module: nn.Module) -> bool:
    """Whether a recompute may call it without the island around it, and it can tell."""
    owns = any(True for _ in module.parameters(recurse=False))
    return (
        (owns or hasattr(module, "parametrizations"))
        and fqn == governing_fqn(fqn)
        and not isinstance(module, torch.jit.ScriptModule)
        and "forward" not in module.__dict__
    )


def _insides(
    model: nn.Module,
    bound: BoundPolicy,
    phase: str,
    stage: str,
    turned: Container[str],
) -> dict[str, tuple[Precision, list[str]]]:
    """Islands of a phase -> what is around, and the modules inside, itself first."""
    found: dict[str, tuple[Precision, list[str]]] = {}
    around: dict[str, Precision] = {}  # what runs outside each module's children
    homes: dict[str, str | None] = {}  # the island that each module is in
    default = bound.policy.base_precision(stage=stage, phase=phase)
    for fqn, module in model.named_modules(remove_duplicate=False):  # parents first
        own = bound.precision_of(governing_fqn(fqn), stage=stage, phase=phase)
        above = fqn.rpartition(".")[0]
        outside = around[above] if fqn else default
        needs_border = (
            _differs(own, outside)
            or (not fqn and _is_pure(own))
            or fqn in turned
            or (not fqn and own.compute in FP8)
        )
        around[fqn] = own if _has_forward(module) else outside
        homes[fqn] = homes[above] if fqn else None
        if needs_border and _has_forward(module):
            homes[fqn] = fqn
            found[fqn] = outside, []
        home = homes[fqn]
        if home is not None:
            found[home][1].append(fqn)
    return found


def _has_forward(module: nn.Module) -> bool:
    """Whether it computes, and does not only contain."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    return type(module).forward is not nn.Module.forward


def _handed_out(own: Precision, outside: Precision) -> str:
    """What floating outputs are cast to on leaving an island.

    What the policy says, with one exception: bf16 and fp16 regions refuse to multiply
    fp64, so there it is handed over in fp32.
    """
    assert own.output is not None
    is_low = outside.compute in (*LOW, *FP8)
    return "fp32" if own.output == "fp64" and is_low else own.output


def _differs(own: Precision, around: Precision) -> bool:
    return (own.compute, own.output) != (around.compute, around.output)


def _is_pure(precision: Precision) -> bool:
    """Whether weights are held in a format other than fp32 and computed in it."""
    return precision.compute == precision.param != "fp32"


def _weights_need_a_cast(precision: Precision) -> bool:
    """Whether neither the storage nor autocast brings weights to `compute`."""
    inside = "fp32" if precision.compute == "tf32" else precision.compute
    autocasts = precision.compute in (*LOW, *FP8) and precision.param != "fp64"
    return precision.param != inside and not autocasts
