"""What a policy cannot ask of a model: each refused with its rule and its remedy."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch

from castwise.errors import IslandError
from castwise.fp8_products import FP8
from castwise.islands.facts import shown
from castwise.islands.layout import governing_fqn
from castwise.islands.swap import island_of
from castwise.policy.keys import PHASES, STAGES

if TYPE_CHECKING:
    from torch import nn

    from castwise.policy.bound import BoundPolicy

_WHOLE_IN_FP32 = ("master", "split")  # storages that hold all digits of fp32
_OVER_16_BITS = {"fp32": ", or storage: split or master over 16-bit weights"}


def refuse_policy(model: nn.Module, bound: BoundPolicy) -> None:
    """Refuse what no module can be asked, before anything is changed."""
    names: dict[nn.Module, str] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        if island_of(module) is not None:
            raise IslandError(
                f"{shown(fqn)} already has a policy applied; remove() it before "
                "another one is applied"
            )
        first = names.setdefault(module, fqn)
        if first != fqn:
            _refuse_two_precisions(bound, first, fqn)
        _refuse_precision(bound, fqn)
        _refuse_update(bound, fqn, module)


def _refuse_two_precisions(bound: BoundPolicy, first: str, fqn: str) -> None:
    """Refuse a module that the policy treats differently under two of its names."""
    for phase, stage in product(PHASES, STAGES):
        one, other = (
            bound.precision_of(governing_fqn(name), stage=stage, phase=phase)
            for name in (first, fqn)
        )
        if one != other:
            raise IslandError(
                f"{shown(first)} and {shown(fqn)} are one module, but get {one} by "
                f"{_label(bound, first, stage=stage, phase=phase)} and {other} by "
                f"{_label(bound, fqn, stage=stage, phase=phase)}; give both names one "
                "precision"
            )


def _refuse_precision(bound: BoundPolicy, fqn: str) -> None:
    """Refuse formats that weights cannot be held in, or that must not be emulated."""
    for phase, stage in product(PHASES, ("forward", "backward")):
        precision = bound.precision_of(governing_fqn(fqn), stage=stage, phase=phase)
        by = _label(bound, fqn, stage=stage, phase=phase)
        if precision.param in FP8:
            raise IslandError(
                f"{shown(fqn)}: {by} holds weights in {precision.param}, in which no "
                f"update can be added to them; write p=fp32,c={precision.param},o=bf16"
            )
        used = set(FP8).intersection((precision.compute, precision.output))
        if used and bound.policy.emulation == "refused":
            raise IslandError(
                f"{shown(fqn)}: {by} asks for {min(used)}, in which no device that "
                f"castwise knows computes, and {bound.policy.where or 'the policy'} "
                "says emulation: refused; write bf16, or emulation: allowed"
            )


def _refuse_update(bound: BoundPolicy, fqn: str, module: nn.Module) -> None:
    """Refuse an update in a format that weights are not held in while it happens."""
    if not any(weight is not None for weight in module.parameters(recurse=False)):
        return
    place = governing_fqn(fqn)
    for phase in PHASES:
        rule = bound.rule_of(place, stage="update", phase=phase)
        if rule is None or rule.stage != "update":
            continue
        asked = bound.precision_of(place, stage="update", phase=phase).compute
        held = bound.precision_of(place).param
        storage = bound.storage_of(place).value
        in_force = "fp32" if storage in _WHOLE_IN_FP32 else held
        if asked != in_force:
            stored = f" with storage {storage}" if storage else ""
            raise IslandError(
                f"{shown(fqn)}: {rule.label} updates weights in {asked}, but they are "
                f"held in {held}{stored}, and so updated in {in_force}; give p={asked} "
                f"in a rule without a stage{_OVER_16_BITS.get(str(asked), '')}"
            )


def _label(
    bound: BoundPolicy, fqn: str, *, stage: str = "forward", phase: str = "full"
) -> str:
    """Name what decides for a module, for a message."""
    rule = bound.rule_of(governing_fqn(fqn), stage=stage, phase=phase)
    return rule.label if rule else f"the default of {bound.policy.name}"


def refuse_island(fqn: str, module: nn.Module) -> None:
    """Refuse a module whose forward cannot be surrounded."""
    if isinstance(module, torch.jit.ScriptModule):
        raise IslandError(
            f"{shown(fqn)} is a ScriptModule, whose forward cannot be wrapped; apply "
            "the policy before scripting, or leave this module out"
        )
    patch = module.__dict__.get("forward")
    if patch is not None and not getattr(patch, "calls_class", False):
        raise IslandError(
            f"{shown(fqn)} has a forward patched onto the instance, which would bypass "
            "the island; remove the patch, or override forward in a class"
        )


def refuse_torn_weight(bound: BoundPolicy, name: str, first: str, fqn: str) -> None:
    """Refuse a weight that two modules would hold in two formats."""
    here = bound.precision_of(governing_fqn(fqn))
    there = bound.precision_of(governing_fqn(first))
    if here.param != there.param:
        raise IslandError(
            f"{shown(first)} and {shown(fqn)} share the weight {name!r}, but hold it "
            f"in {there.param} by {_label(bound, first)} and in {here.param} by "
            f"{_label(bound, fqn)}; give both the same p=, and let c= differ"
        )
