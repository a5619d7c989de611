"""Units: the modules that get a format of their own, and the groups that move together.

A module is a unit when it was called and computes something itself; `nn.Sequential`
only calls others. An operator that the operator table holds in fp32 may be one as well:
low or not in all low modules that call it. Modules of one parent and class that are
given the same tensor, such as the projections to query, key and value, move together:
their input is then cast once, and no person has to read three different formats there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from castwise.errors import SettingsError
from castwise.islands.swap import own_class
from castwise.numerics.search.reference_step import Captured

Grouping = Literal["same_input", "none"] | Sequence[Sequence[str]]
"""Which units move together: found, none, or given as lists of globs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A module that gets a format of its own."""

    fqn: str
    """Its first name; the empty text for the model itself."""

    names: tuple[str, ...]
    """All its names; several where it stands in several places. Of an operator, the
    modules that call it."""

    type: str
    """Its class."""

    depth: int
    """How many modules it is in, at least."""

    num_calls: int
    """How often one forward calls it."""

    num_weights: int
    """Elements of its own weights."""

    num_flops: int
    """Operations of its own matrix products in one forward."""

    num_elements: int
    """Elements that its own operators read and write in one forward."""

    is_blind: bool = False
    """Whether no gradient reaches it, so that its effect cannot be measured."""

    op: str = ""
    """For an operator in the whole model instead of a module, its ATen name."""

    @property
    def shown(self) -> str:
        """How messages call it."""
        return self.fqn or "(the model itself)"


def find_units(model: nn.Module, captured: Captured) -> tuple[Unit, ...]:
    """List the units of a model, in the order of its modules."""
    names: defaultdict[int, list[str]] = defaultdict(list)
    for fqn, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(fqn)
    found = []
    for fqn, module in model.named_modules():
        calls, work = captured.calls.get(fqn), captured.work.get(fqn)
        if not calls or work is None or work.num_elements == 0:
            continue
        outputs = [gradient for call in calls for gradient in call.gradients]
        if not outputs:
            continue
        aliases = tuple(names[id(module)])
        found.append(
            Unit(
                fqn=fqn,
                names=aliases,
                type=own_class(module).__name__,
                depth=max(_depth(name) for name in aliases),
                num_calls=len(calls),
                num_weights=sum(w.numel() for w in module.parameters(recurse=False)),
                num_flops=work.num_flops,
                num_elements=work.num_elements,
                is_blind=all(each is None for each in outputs),
            )
        )
    return tuple(found)


def operator_unit(op: str, callers: Sequence[Unit], captured: Captured) -> Unit:
    """Make the unit that stands for one operator wherever a low module calls it."""
    return Unit(
        fqn=f"operator {op}",  # no module is called so, with a space
        names=tuple(unit.fqn for unit in callers),
        type="operator",
        depth=0,
        num_calls=sum(unit.num_calls for unit in callers),
        num_weights=0,
        num_flops=0,
        num_elements=sum(captured.work[unit.fqn].in_fp32[op] for unit in callers),
        op=op,
    )


def innermost(units: Sequence[Unit]) -> tuple[Unit, ...]:
    """The units that hold no other unit."""
    above = {
        name[:at]
        for unit in units
        for name in unit.names
        for at in (0, *(i for i, char in enumerate(name) if char == "."))
        if name
    }
    return tuple(unit for unit in units if not above.intersection(unit.names))


def never_called(model: nn.Module, captured: Captured) -> tuple[str, ...]:
    """Modules with weights of their own whose forward never ran, and so no evidence."""
    return tuple(
        fqn
        for fqn, module in model.named_modules()
        if fqn not in captured.calls
        and any(True for _ in module.parameters(recurse=False))
        and type(module).forward is not nn.Module.forward
        and "parametrizations" not in fqn.split(".")
    )


def group_units(
    units: Sequence[Unit], captured: Captured, grouping: Grouping
) -> tuple[tuple[int, ...], ...]:
    """Return the groups as places in `units`, in the order of their first members.

    Raises:
        SettingsError: A group that was given names nothing, or a unit is in two.
    """
    if grouping == "none":
        keys: list[object] = list(range(len(units)))
    elif grouping == "same_input":
        keys = [_input_key(unit, captured) for unit in units]
    else:
        assert not isinstance(grouping, str)
        keys = list(_given_keys(units, grouping))
    groups: defaultdict[object, list[int]] = defaultdict(list)
    for at, key in enumerate(keys):
        groups[key].append(at)
    return tuple(map(tuple, groups.values()))


def _input_key(unit: Unit, captured: Captured) -> object:
    given = captured.inputs.get(unit.fqn)
    if not given or unit.num_calls > 1 or not unit.num_weights:
        return unit.fqn
    return unit.fqn.rpartition(".")[0], unit.type, given


def _given_keys(
    units: Sequence[Unit], groups: Sequence[Sequence[str]]
) -> list[str | int]:
    keys: list[str | int] = [unit.fqn for unit in units]
    for rank, globs in enumerate(groups):
        members = [
            at
            for at, unit in enumerate(units)
            if any(fnmatchcase(unit.fqn, glob) for glob in globs)
        ]
        if not members:
            raise SettingsError(
                f"the group {list(globs)} names no module that computes; correct it"
            )
        for at in members:
            before = keys[at]
            if isinstance(before, int):
                raise SettingsError(
                    f"{units[at].shown} is in two groups, {list(groups[before])} and "
                    f"{list(globs)}; leave it out of one"
                )
            keys[at] = rank
    return keys


def _depth(fqn: str) -> int:
    return fqn.count(".") + 1 if fqn else 0
