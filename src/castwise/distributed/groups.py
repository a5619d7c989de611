"""Which modules share one message: the groups of FSDP2, by formats of weights.

FSDP2 gathers the weights of a group when its module begins to run, in one message, and
wants one stored, one gathered and one reduced format in it. A unit is a module that is
meant to be a group: the whole model, every member of a `ModuleList`, every island, and
what the caller names. Within a unit:

    stored, reduced    those of most weights; a module with others is a group of its own
    gathered           low, if most weights may travel low; a module that needs its
                       weights as they are stored is then a group of its own

A weight that two modules share is gathered by the unit around both. An island whose
weights are cast for its forward is one group with all that it contains, because a cast
needs them all at once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from castwise.distributed.formats import Gather, WeightFormats, formats_of
from castwise.errors import IslandError, SettingsError
from castwise.islands.facts import shown
from castwise.islands.layout import governing_fqn, lay_out
from castwise.policy.keys import ModuleFacts, Rule, upwards

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from castwise.policy.bound import BoundPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightGroup:
    """Weights that travel together."""

    fqn: str
    """The module whose forward they are gathered for."""

    formats: WeightFormats
    """How they are held, sent and summed."""

    num_weights: int
    """How many numbers they are, on all processes together."""

    because: str
    """Why they are a group."""

    def __str__(self) -> str:
        held = self.formats
        return (
            f"{shown(self.fqn)}: {self.num_weights:,} numbers stored in {held.stored}, "
            f"gathered in {held.gathered}, reduced in {held.reduced} ({self.because})"
        )


def plan_groups(
    model: nn.Module,
    bound: BoundPolicy,
    units: Sequence[str] | None,
    gather: Gather,
) -> list[WeightGroup]:
    """Plan the groups, containing modules before contained ones.

    Args:
        model: The model, not sharded yet.
        bound: The policy, bound to `module_facts(model)`.
        units: Globs for modules that shall be units; none for every member of a
            `ModuleList`.
        gather: `stored` lets no weight travel low.

    Raises:
        IslandError: A weight cannot be in a group of its own, and does not fit in.
        SettingsError: A glob names no module.
    """
    plan = _Plan(model, bound, gather)
    plan.settle_units(units)
    plan.settle_groups()
    return [
        WeightGroup(
            fqn=fqn,
            formats=plan.formats[fqn],
            num_weights=sum(plan.sizes[each] for each in members),
            because=plan.reasons[fqn],
        )
        for fqn, members in plan.members().items()
    ]


class _Plan:
    """What is known so far: units, the formats of groups, and who belongs to whom."""

    def __init__(self, model: nn.Module, bound: BoundPolicy, gather: Gather) -> None:
        self.modules: dict[str, nn.Module]  # first names, parents first
        self.modules = dict(model.named_modules())
        self.sizes, self.commons = _owned(self.modules)
        self.own = {
            fqn: formats_of(module, governing_fqn(fqn), bound, gather)
            for fqn, module in self.modules.items()
        }
        self.islands: set[str] = set()
        self.whole: set[str] = set()  # islands that need all their weights at once
        for layout in lay_out(model, bound, "cpu").values():  # no device matters here
            borders = {f: b for f, b in layout.borders.items() if not b.is_inner}
            self.islands |= {*borders, *layout.own_backward}
            self.whole |= layout.own_backward
            self.whole |= {fqn for fqn, each in borders.items() if each.casts_weights}
        self.reasons: dict[str, str] = {}  # of units, and then of all groups
        self.unit_of: dict[str, str] = {}
        self.formats: dict[str, WeightFormats] = {}  # of groups
        self.group_of: dict[str, str] = {}

    def settle_units(self, units: Sequence[str] | None) -> None:
        """Decide which modules are units, and why."""
        reasons = _asked_for(self.modules, units)
        reasons = {fqn: why for fqn, why in reasons.items() if not self._is_kept(fqn)}
        reasons |= dict.fromkeys(self.islands, "an island")
        for fqn, common in self.commons.items():  # shared weights wait for one unit
            for place in upwards(fqn):
                if place == common:
                    break
                reasons.pop(place, None)
        self.reasons = reasons | {"": "the whole model"}
        for fqn in self.modules:
            above = upwards(self.commons.get(fqn, fqn))
            self.unit_of[fqn] = next(each for each in above if each in self.reasons)

    def settle_groups(self) -> None:
        """Decide for every module which group its weights are in."""
        for unit in [*self.reasons]:
            self.formats[unit] = self._formats_of_unit(unit)
        for fqn in self.modules:
            if fqn in self.formats:
                self.group_of[fqn] = fqn
            elif fqn in self.commons:
                self.group_of[fqn] = self.unit_of[fqn]
            else:
                above = self.group_of[fqn.rpartition(".")[0]]
                self.group_of[fqn] = above if self._fits(fqn, above) else fqn
                if self.group_of[fqn] == fqn:
                    self._split(fqn, above)

    def members(self) -> dict[str, list[str]]:
        """The modules in each group, containing groups first."""
        found: dict[str, list[str]] = {
            fqn: [] for fqn in self.modules if fqn in self.formats
        }
        for fqn, group in self.group_of.items():
            found[group].append(fqn)
        return found

    def _formats_of_unit(self, unit: str) -> WeightFormats:
        """What most weights have; those that cannot be split from it decide first."""
        inside = [each for each in self.modules if self.unit_of[each] == unit]
        inside = [each for each in inside if self.sizes[each]]
        together = [each for each in inside if self._cannot_split(each, unit)]
        self._refuse_mixture(unit, together)
        votes: Counter[tuple[str, str]] = Counter()
        for fqn in together or inside:
            votes[self._kind(fqn)] += self.sizes[fqn]
        stored, reduced = votes.most_common(1)[0][0] if votes else self._kind(unit)
        alike = [each for each in inside if self._kind(each) == (stored, reduced)]
        low = Counter({each: self.sizes[each] for each in alike if self._is_low(each)})
        gathered = stored
        if all(map(self._is_low, together)):
            most = 2 * low.total() > sum(self.sizes[each] for each in alike)
            gathered = self.own[next(iter(low))].gathered if most else stored
        return WeightFormats(stored=stored, gathered=gathered, reduced=reduced)

    def _cannot_split(self, fqn: str, unit: str) -> bool:
        """Whether its weights must be gathered with those of the unit."""
        alone = fqn != unit and fqn not in self.commons and unit not in self.whole
        return not (alone and _has_forward(self.modules[fqn]))

    def _fits(self, fqn: str, group: str) -> bool:
        own, formats = self.own[fqn], self.formats[group]
        alike = self._kind(fqn) == (formats.stored, formats.reduced)
        may_travel = formats.gathered in (own.gathered, own.stored)
        return not self.sizes[fqn] or (alike and may_travel)

    def _split(self, fqn: str, group: str) -> None:
        own, formats = self.own[fqn], self.formats[group]
        self.formats[fqn] = own
        if self._kind(fqn) == (formats.stored, formats.reduced):
            self.reasons[fqn] = f"its weights are needed in {own.stored}"
        else:
            self.reasons[fqn] = "its weights are stored or reduced in another format"

    def _is_low(self, fqn: str) -> bool:
        return self.own[fqn].gathered != self.own[fqn].stored

    def _kind(self, fqn: str) -> tuple[str, str]:
        return self.own[fqn].stored, self.own[fqn].reduced

    def _is_kept(self, fqn: str) -> bool:
        """Whether it is in an island that needs all its weights at once."""
        islands = (place for place in upwards(fqn) if place in self.islands)
        return next(islands, None) in self.whole

    def _refuse_mixture(self, unit: str, together: Sequence[str]) -> None:
        first: dict[tuple[str, str], str] = {}
        for fqn in together:
            first.setdefault(self._kind(fqn), fqn)
        if len(first) > 1:
            (one, this), (other, that) = list(first.items())[:2]
            raise IslandError(
                f"{shown(this)} stores weights in {one[0]} and reduces in {one[1]}, "
                f"{shown(that)} in {other[0]} and in {other[1]}, but both have to be "
                f"gathered for {shown(unit)}; give both one p= and one r="
            )


def _asked_for(
    modules: Mapping[str, nn.Module], units: Sequence[str] | None
) -> dict[str, str]:
    """The modules that the caller, or a `ModuleList`, makes units."""
    found: dict[str, str] = {}
    for unit in units or ():
        rule = Rule(module=unit)
        named = [fqn for fqn in modules if rule.names(ModuleFacts(fqn=fqn))]
        if not named:
            raise SettingsError(
                f"units needs globs that name modules of the model; {unit!r} names none"
            )
        found |= dict.fromkeys(named, f"{unit!r} names it")
    if units is None:
        for fqn in modules:
            above = fqn.rpartition(".")[0]
            if fqn and isinstance(modules[above], nn.ModuleList):
                found[fqn] = f"a member of {above!r}"
    return {fqn: why for fqn, why in found.items() if _has_forward(modules[fqn])}


def _has_forward(module: nn.Module) -> bool:
    """Whether it runs, so that its weights can be gathered when it begins."""
    return type(module).forward is not nn.Module.forward


def _owned(
    modules: Mapping[str, nn.Module],
) -> tuple[dict[str, int], dict[str, str]]:
    """How many numbers each module owns; for sharers of a weight: what is around both.

    A shared weight counts where it stands first.
    """
    owners: dict[nn.Parameter, list[str]] = {}
    sizes = dict.fromkeys(modules, 0)
    for fqn, module in modules.items():
        for weight in module.parameters(recurse=False):
            if weight not in owners:
                sizes[fqn] += weight.numel()
            owners.setdefault(weight, []).append(fqn)
    commons: dict[str, str] = {}
    for sharers in owners.values():
        if len(sharers) > 1:
            common = _around(sharers)
            for fqn in sharers:
                commons[fqn] = _around([common, commons.get(fqn, common)])
    return sizes, commons


def _around(fqns: Sequence[str]) -> str:
    """The innermost module that contains all of them, or is one of them."""
    places = [set(upwards(fqn)) for fqn in fqns]
    return max(set.intersection(*places), key=len)
