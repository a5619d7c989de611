"""An assignment of candidates to modules, written as a policy.

A rule governs a module and everything in it, and the first rule that matches wins, so
the rules of inner modules come first. A module that computes nothing takes what all
units in it have in common; so a block that is wholly in fp32 is one rule and one island
with one pair of borders, not ten.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from castwise.numerics.search.candidates import Candidate
from castwise.numerics.search.units import Unit
from castwise.policy.keys import REGEX_MARK
from castwise.policy.precision import Precision
from castwise.policy.rules import Policy

Tree = Sequence[tuple[str, str]]
"""All names of all modules, parents first, each with the first name of its module."""

_GLOB = set("*?[]")


def tree_of(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """List the modules of a model; those inside of parametrizations go with theirs."""
    first = {id(module): fqn for fqn, module in model.named_modules()}
    return tuple(
        (fqn, first[id(module)])
        for fqn, module in model.named_modules(remove_duplicate=False)
        if "parametrizations" not in fqn.split(".")
    )


def policy_of(
    tree: Tree,
    chosen: Mapping[str, Candidate],
    default: Candidate,
    *,
    because: Callable[[tuple[str, ...]], str] = lambda _: "",
    name: str = "searched",
) -> Policy:
    """Write the policy that gives each unit its candidate.

    Args:
        tree: The modules of the model.
        chosen: fqn of a unit, under its first name -> its candidate.
        default: What the policy's default is.
        because: From the units that a rule is about to its reason.
        name: What the policy is called.
    """
    wanted, first = _wanted(tree, chosen, default), dict(tree)
    rules = [
        fqn
        for fqn in wanted
        if wanted[fqn] != (wanted[fqn.rpartition(".")[0]] if fqn else default)
    ]
    policy = Policy(name=name, default=default.precision)
    for fqn in sorted(rules, key=lambda each: -each.count(".") if each else 1):
        about = tuple(
            unit
            for unit, each in chosen.items()
            if each == wanted[fqn] and _is_in(unit, first[fqn])
        )
        above = wanted[fqn.rpartition(".")[0]] if fqn else default
        own = wanted[fqn]
        if own.backward is not None:
            policy = policy.with_rule(
                module=_key(fqn),
                stage="backward",
                precision=own.backward,
                because=because(about),
            )
        if own.backward is None or own.precision != above.precision:
            policy = policy.with_rule(
                module=_key(fqn),
                precision=_inside(own, above),
                because=because(about),
            )
    return policy


def chosen_by_unit(
    units: tuple[Unit, ...],
    groups: tuple[tuple[int, ...], ...],
    choice: tuple[int, ...],
    candidates: tuple[Candidate, ...],
) -> dict[str, Candidate]:
    """Spread the choice for each group over its units."""
    return {
        units[at].fqn: candidates[one]
        for group, one in zip(groups, choice, strict=True)
        for at in group
    }


def _wanted(
    tree: Tree, chosen: Mapping[str, Candidate], default: Candidate
) -> dict[str, Candidate]:
    """Every module under each of its names -> what it runs in, parents first."""
    wanted: dict[str, Candidate] = {}
    for fqn, first in tree:
        own = chosen.get(first)
        if own is None:
            inside = {each for unit, each in chosen.items() if _is_in(unit, first)}
            above = wanted[fqn.rpartition(".")[0]] if fqn else default
            own = next(iter(inside)) if len(inside) == 1 and fqn else above
            # a backward of its own was scored for each unit alone
            own = above if inside and own.backward is not None else own
        wanted[fqn] = own
    return wanted


def _inside(own: Candidate, around: Candidate) -> Precision:
    """The precision of a module: inside of 32 bits or more it hands out what is there.

    Otherwise a module that the policy holds in fp32 would go on in bf16 with what an
    inner module in bf16 gave it.
    """
    if around.bits < 32:
        return own.precision
    output = "fp32" if around.compute == "tf32" else around.compute
    return replace(own.precision, output=output)


def _is_in(fqn: str, place: str) -> bool:
    return not place or fqn == place or fqn.startswith(f"{place}.")


def _key(fqn: str) -> str:
    """The module key that names this module; the model itself has no name."""
    if not fqn or _GLOB & set(fqn):
        return REGEX_MARK + re.escape(fqn)
    return fqn
