"""A bound policy put on a model: first everything is planned and checked, then done.

Which modules become islands, `layout` decides. How weights and buffers are held:

- A weight takes the `param` format of the module that owns it. `Parameter` objects keep
  their identity, so an optimizer built before still holds them.
- A buffer goes up with its module (fp32 to fp64) and never down, because a rotary table
  or a position rounded to bf16 is wrong for ever: a rule must name the buffer itself,
  by fqn (`rope.inv_freq`) or by `type: Buffer`.
- Integers are never touched; complex weights are never held below complex64.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from castwise.dtypes import dtype_of
from castwise.errors import IslandError
from castwise.fp8_products import CARRIER, FP8
from castwise.islands.border import LOW, Border, Island, PhaseNow
from castwise.islands.crossing import complex_of
from castwise.islands.facts import floating_buffers, join
from castwise.islands.layout import Layout, governing_fqn, is_inside, lay_out
from castwise.islands.refusals import (
    refuse_island,
    refuse_policy,
    refuse_torn_weight,
)
from castwise.islands.swap import island_of, make_island, unmake_island
from castwise.policy.keys import PHASES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from castwise.policy.bound import BoundPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldTensor:
    """A weight or buffer whose format was changed."""

    owner: nn.Module
    """The module that owns it."""

    name: str
    """Its name there."""

    before: torch.dtype
    """What it was held in."""

    after: torch.dtype
    """What it is held in now."""

    @property
    def tensor(self) -> torch.Tensor | None:
        """The tensor under that name today."""
        slots = self.owner._parameters, self.owner._buffers  # noqa: SLF001 -- its own, by name
        return slots[0].get(self.name, slots[1].get(self.name))

    def hold_in(self, dtype: torch.dtype) -> None:
        """Change the format in place, with the gradient, if there is one."""
        tensor = self.tensor
        if tensor is None or tensor.dtype is dtype:
            return
        if tensor.grad is not None:
            gradient = tensor.grad.to(dtype)
            tensor.grad = None
            tensor.data = tensor.data.to(dtype)
            tensor.grad = gradient
        else:
            tensor.data = tensor.data.to(dtype)


class AppliedPolicy:
    """A policy in force on a model, until it is removed."""

    def __init__(
        self,
        *,
        bound: BoundPolicy,
        islands: Mapping[str, nn.Module],
        held: tuple[HeldTensor, ...],
        now: PhaseNow,
    ) -> None:
        self.bound = bound
        self.islands = dict(islands)
        self.held = held
        self._now = now

    @property
    def phase(self) -> str:
        """The phase whose precision is in force."""
        return self._now.phase

    @phase.setter
    def phase(self, phase: str) -> None:
        if phase not in PHASES:
            raise IslandError(f"a phase is one of {', '.join(PHASES)}; got {phase!r}")
        self._now.phase = phase

    def low_format(self) -> str | None:
        """The low format of the surroundings, or else of some island, in this phase."""
        around = self.bound.policy.base_precision(phase=self.phase).compute
        inside = (border.compute for _, border in self._borders())
        again = (border.compute for _, border in self._borders(second=True))
        computes = (CARRIER if fmt in FP8 else fmt for fmt in (around, *inside, *again))
        return next((fmt for fmt in computes if fmt in LOW), None)

    @property
    def emulated(self) -> tuple[str, ...]:
        """Formats that modules compute in or hand out, in any phase, by emulation."""
        borders = (
            border
            for island in map(island_of, self.islands.values())
            if island is not None
            for border in (*island.borders.values(), *island.second.values())
            if border is not None
        )
        used = {fmt for each in borders for fmt in (each.compute, each.output)}
        return tuple(fmt for fmt in FP8 if fmt in used)

    def _borders(self, *, second: bool = False) -> Iterator[tuple[str, Border]]:
        """Yield the borders of this phase, or those of the second run for backwards."""
        for fqn, module in self.islands.items():
            island = island_of(module)
            if island is None:
                continue
            border = island.second_border if second else island.border
            if border is not None and not border.is_inner:
                yield fqn, border

    def coverage(self) -> str:
        """One line: which modules run in another format than the rest, in this phase.

        For example `3 modules in fp32 inside bf16: embed.norm, head.norm, solver`.
        """
        around = str(self.bound.policy.base_precision(phase=self.phase).compute)
        inside, again = defaultdict(list), defaultdict(list)
        for fqn, border in self._borders():
            if fqn or border.compute != around:
                inside[border.compute].append(fqn or "the whole model")
        for fqn, border in self._borders(second=True):
            if fqn in self.own_backward:
                again[border.compute].append(fqn or "the whole model")
        parts = [
            f"{_count(fqns)} in {_said(compute)} inside {around}: {_listed(fqns)}"
            for compute, fqns in inside.items()
        ] or [f"no islands: every module in {_said(around)}"]
        parts += [
            f"backward of {_count(fqns)} in {_said(compute)}: {_listed(fqns)}"
            for compute, fqns in again.items()
        ]
        return "; ".join(parts)

    @property
    def own_backward(self) -> tuple[str, ...]:
        """The modules whose backward runs in a precision of its own, in this phase."""
        return tuple(
            fqn
            for fqn, module in self.islands.items()
            if (island := island_of(module)) and island.is_run_again
        )

    def remove(self) -> None:
        """Give every module its own class back, and every weight its own format.

        Weights whose format never changed are the same bits; those that were narrowed
        come back wider, without the digits that they lost.
        """
        for module in self.islands.values():
            unmake_island(module)
        for each in self.held:
            each.hold_in(each.before)
        self.islands, self.held = {}, ()


def apply_policy(
    model: nn.Module,
    bound: BoundPolicy,
    device_type: str,
    *,
    phase: str = "full",
) -> AppliedPolicy:
    """Put a policy on a model, whole or not at all; the model's code stays as it is.

    Args:
        model: Any module tree.
        bound: The policy, bound to `module_facts(model)`.
        device_type: `cpu` or `cuda`: whose autocast and switches the islands use.
        phase: The phase to begin in.

    Raises:
        IslandError: A module cannot be held as the policy says; nothing was changed.
    """
    refuse_policy(model, bound)
    layouts = lay_out(model, bound, device_type)
    held = tuple(plan_storage(model, bound))
    now = PhaseNow("full")
    islands = {fqn: model.get_submodule(fqn) for fqn in _island_fqns(layouts)}
    for fqn, module in islands.items():
        refuse_island(fqn, module)
    applied = AppliedPolicy(bound=bound, islands=islands, held=held, now=now)
    applied.phase = phase
    for each in held:
        each.hold_in(each.after)
    for fqn, module in islands.items():
        make_island(module, _island(fqn, layouts, now))
    return applied


def _island_fqns(layouts: Mapping[str, Layout]) -> list[str]:
    """The modules that are islands in some phase."""
    fqns: dict[str, None] = {}
    for layout in layouts.values():
        fqns |= dict.fromkeys((*layout.borders, *layout.second))
    return list(fqns)


def _island(fqn: str, layouts: Mapping[str, Layout], now: PhaseNow) -> Island:
    return Island(
        fqn=fqn,
        borders={phase: each.borders.get(fqn) for phase, each in layouts.items()},
        second={phase: each.second.get(fqn) for phase, each in layouts.items()}
        if _is_run_again(fqn, layouts)
        else {},
        own_backward=frozenset(
            phase for phase, each in layouts.items() if fqn in each.own_backward
        ),
        now=now,
    )


def _is_run_again(fqn: str, layouts: Mapping[str, Layout]) -> bool:
    """Whether the module, or one above it, is run again for its backward."""
    return any(
        is_inside(fqn, above)
        for layout in layouts.values()
        for above in layout.own_backward
    )


def plan_storage(model: nn.Module, bound: BoundPolicy) -> Iterator[HeldTensor]:
    """Yield every weight and buffer whose format must change."""
    owners: dict[torch.Tensor, str] = {}
    for fqn, module in model.named_modules():
        param = bound.precision_of(governing_fqn(fqn)).param
        assert param is not None
        for name, weight in module._parameters.items():  # noqa: SLF001 -- its own, not those below it
            if weight is None:
                continue
            first = owners.setdefault(weight, fqn)
            refuse_torn_weight(bound, join(fqn, name), first, fqn)
            after = _stored_dtype(weight, dtype_of(param))
            if after is not weight.dtype and first == fqn:
                yield HeldTensor(
                    owner=module, name=name, before=weight.dtype, after=after
                )
        for name, buffer in floating_buffers(module):
            after = _buffer_dtype(bound, fqn, name, buffer)
            if after is not buffer.dtype:
                yield HeldTensor(
                    owner=module, name=name, before=buffer.dtype, after=after
                )


def _stored_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    if tensor.is_floating_point():
        return dtype
    return complex_of(dtype) if tensor.is_complex() else tensor.dtype


def _buffer_dtype(
    bound: BoundPolicy, fqn: str, name: str, buffer: torch.Tensor
) -> torch.dtype:
    """Up with its module, down only by a rule that names the buffer."""
    place = join(governing_fqn(fqn), name) if fqn == governing_fqn(fqn) else None
    owner = bound.precision_of(governing_fqn(fqn))
    if place is not None and bound.rule_of(place) is not bound.rule_of(fqn):
        named = bound.precision_of(place).param
        assert named is not None
        return _stored_dtype(buffer, dtype_of(named))
    widest = buffer.dtype
    for fmt in (owner.param, owner.compute):
        assert fmt is not None
        if fmt == "tf32" or buffer.dtype.itemsize < 2:
            continue
        wanted = _stored_dtype(buffer, dtype_of(fmt))
        if wanted.itemsize > widest.itemsize:
            widest = wanted
    return widest


def _said(compute: str) -> str:
    """A format as people should read it."""
    return f"{compute} (emulated in {CARRIER})" if compute in FP8 else compute


def _count(fqns: list[str]) -> str:
    return f"{len(fqns)} module{'s' if len(fqns) > 1 else ''}"


def _listed(fqns: list[str], most: int = 8) -> str:
    """List names, the first few of many."""
    more = f" and {len(fqns) - most} more" if len(fqns) > most else ""
    return ", ".join(fqns[:most]) + more
