"""Replays: each unit alone, in one format, on what it saw in the reference step.

What rounding inside of a unit does, forward and backward, are three differences from
the reference replay:

    delta   of its outputs
    eps     of the gradients of its inputs
    omega   of the gradients of its weights

Modules inside of the unit run in the reference format meanwhile, so that each operator
is blamed on one unit. All units of one depth contain none of each other, so one policy
serves to replay them.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from castwise.dtypes import dtype_of
from castwise.errors import IslandError
from castwise.numerics.search.bench import Bench
from castwise.numerics.search.candidates import Candidate
from castwise.numerics.search.handovers import Handovers
from castwise.numerics.search.reference_step import Call
from castwise.numerics.search.structure import EachTensor
from castwise.numerics.search.unit_play import Formats, Played, play
from castwise.numerics.search.units import Unit
from castwise.policy.keys import REGEX_MARK
from castwise.policy.precision import Precision
from castwise.policy.rules import Policy
from castwise.region import Region

# what a module raises that depends on more than its inputs, or refuses a format
_REFUSALS = (
    AttributeError,
    IndexError,
    IslandError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """What one candidate changes in one unit, call by call."""

    deltas: tuple[tuple[torch.Tensor, ...], ...]
    """Of outputs, for each call."""

    epsilons: tuple[tuple[torch.Tensor | None, ...], ...]
    """Of the gradients of inputs, for each call."""

    omegas: tuple[torch.Tensor | None, ...]
    """Of the gradients of weights, over all calls."""

    def is_some(self) -> bool:
        """Whether anything is changed at all."""
        calls = (*self.deltas, *self.epsilons, self.omegas)
        return any(t is not None and bool(t.any()) for call in calls for t in call)


def play_all(
    bench: Bench,
    units: Sequence[Unit],
    calls: dict[str, list[Call]],
    candidate: Candidate | None,
    default: Candidate,
    handovers: Handovers,
    low_operator: str = "",
) -> Iterator[tuple[Unit, list[Played] | str]]:
    """Replay every unit alone, in one candidate or, with None, in the reference.

    What cannot run so yields the reason instead.

    In the default's format a unit is given what others hand out, already rounded, and
    so do the modules in it; that rounding is theirs. So in the reference the same is
    handed over, and no rounding is counted twice.

    Args:
        bench: Where the model stands.
        units: What to replay.
        calls: What each saw.
        candidate: What it runs in.
        default: What the policy's default will be.
        handovers: In which formats it is given its inputs, where they are known.
        low_operator: An operator that runs low, whatever the operator table says.
    """
    bench.num_steps += 1
    for unit, region, formats in isolated(
        bench, units, candidate, default, handovers, low_operator=low_operator
    ):
        module = bench.model.get_submodule(unit.fqn)
        try:
            played = [
                play(bench, region, module, call, formats[at])
                for at, call in enumerate(calls[unit.fqn])
            ]
        except _REFUSALS as error:
            yield unit, f"cannot be replayed alone: {_first_line(error)}"
        else:
            yield unit, played


def isolated(
    bench: Bench,
    units: Sequence[Unit],
    candidate: Candidate | None,
    default: Candidate,
    handovers: Handovers,
    inside: str | None = None,
    low_operator: str = "",
) -> Iterator[tuple[Unit, Region, list[Formats]]]:
    """Put one unit after the other alone into a candidate.

    Yields the unit, the region to play it in, and the formats of each call's inputs.

    Args:
        bench: Where the model stands.
        units: What to isolate.
        candidate: What it runs in; None stands for the reference.
        default: What the policy's default will be.
        handovers: In which formats it is given its inputs, where they are known.
        inside: What the modules in a unit compute in (default: the reference).
        low_operator: An operator that runs low, whatever the operator table says.
    """
    wide = dtype_of(bench.reference.default.compute or "fp64")
    for depth in sorted({unit.depth for unit in units}):
        level = [unit for unit in units if unit.depth == depth]
        policy = bench.reference
        if candidate is not None:
            isolation = _Isolation(
                bench, candidate, default, handovers, inside, low_operator
            )
            policy = isolation.policy(level)
        brought = candidate is None or candidate.compute == "fp64"
        otherwise = wide if brought else torch.float32
        handed = _rounded(bench.model, level, handovers) if candidate is None else ()
        with bench.under(policy) as region, removed_later(handed):
            for unit in level:
                formats = [
                    Formats(
                        known=handovers.given(unit.fqn, at),
                        otherwise=otherwise,
                        widened=candidate is None,
                    )
                    for at in range(unit.num_calls)
                ]
                yield unit, region, formats


def _rounded(
    model: nn.Module, level: Sequence[Unit], handovers: Handovers
) -> list[RemovableHandle]:
    """Round what modules in the units hand out, as they would if all were low."""
    first = {module: fqn for fqn, module in model.named_modules()}
    inner = {
        model.get_submodule(name): None
        for unit in level
        for name in inner_modules(model, unit.fqn)
    }
    found = []
    for module in inner:
        dtypes = handovers.outputs.get(first[module], ())
        if any(dtype.itemsize < torch.float32.itemsize for dtype in dtypes):
            hook = partial(_round_outputs, dtypes)
            found.append(module.register_forward_hook(hook))
    return found


def _round_outputs(
    dtypes: tuple[torch.dtype, ...], _: nn.Module, _args: Any, outputs: Any
) -> Any:
    remaining = iter(dtypes)

    def through(tensor: torch.Tensor) -> torch.Tensor:
        dtype = next(remaining, tensor.dtype)
        return tensor if tensor.is_complex() else tensor.to(dtype).to(tensor.dtype)

    return EachTensor(through).values(outputs)


@contextmanager
def removed_later(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Take hooks away when the block ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Isolation:
    """Writes policies in which units are low and the modules in them are not."""

    def __init__(
        self,
        bench: Bench,
        candidate: Candidate,
        default: Candidate,
        handovers: Handovers,
        inside: str | None,
        low_operator: str,
    ) -> None:
        self._model, self._handovers = bench.model, handovers
        self._candidate, self._default = candidate, default
        self._inside = inside or bench.reference.default.compute
        self._low_operator = low_operator

    def policy(self, level: Sequence[Unit]) -> Policy:
        """The policy for units of one depth, none of which is in another."""
        policy = Policy(name="replay", default=self._default.precision)
        children: defaultdict[str, list[str]] = defaultdict(list)
        for unit in level:
            for name in unit.names:
                for child in inner_modules(self._model, name):
                    children[self._handed_out(child)].append(child)
        for output, names in children.items():
            precision = Precision(
                param="fp32", compute=self._inside, output=output, reduce="fp32"
            )
            policy = policy.with_rule(module=any_of(names), precision=precision)
        names = [name for unit in level for name in unit.names]
        if self._candidate.backward is not None:
            policy = policy.with_rule(
                module=any_of(names),
                stage="backward",
                precision=self._candidate.backward,
            )
        if self._candidate.precision != self._default.precision:
            policy = policy.with_rule(
                module=any_of(names), precision=self._candidate.precision
            )
        if self._low_operator:
            policy = policy.with_rule(op=self._low_operator, category="low")
        return policy

    def _handed_out(self, child: str) -> str:
        """What an inner module hands out: what it would if all were low."""
        if self._candidate.compute == "fp64":
            return "fp64"
        low = self._default.precision.output
        is_default = self._candidate == self._default
        first = first_name(self._model, child)
        if is_default and low and self._handovers.hands_out(first, dtype_of(low)):
            return str(low)
        return "fp32"


def inner_modules(model: nn.Module, fqn: str) -> list[str]:
    """Names that together cover every module in one, wherever else it stands.

    A container without a forward is never called; those in it stand for it.
    """
    module = model.get_submodule(fqn)
    prefix = f"{fqn}." if fqn else ""
    found: list[str] = []
    for name, child in module.named_children():
        contains_only = type(child).forward is nn.Module.forward
        inner = inner_modules(model, prefix + name) if contains_only else []
        found += inner or [prefix + name]
    below = {id(each) for each in module.modules()} - {id(module)}
    found += [
        name
        for name, each in model.named_modules(remove_duplicate=False)
        if id(each) in below and not name.startswith(prefix)
    ]
    return list(dict.fromkeys(found))


def first_name(model: nn.Module, fqn: str) -> str:
    """The first name of the module of that name."""
    module = model.get_submodule(fqn)
    found: str = next(n for n, each in model.named_modules() if each is module)
    return found


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0]
    return " ".join(line.split())[:120] or type(error).__name__


def any_of(names: Sequence[str]) -> str:
    """A module key that names exactly these modules."""
    return f"{REGEX_MARK}({'|'.join(map(re.escape, names))})"


def rounding_between(
    low: Sequence[Played] | str, wide: Sequence[Played] | str, name: str
) -> Rounding | str:
    """What a candidate changed, or why it cannot be told."""
    if isinstance(low, str):
        return low
    if isinstance(wide, str):
        return wide
    if not all(played.is_finite() for played in low):
        return f"not finite in {name}"
    pairs = list(zip(low, wide, strict=True))
    omegas: list[torch.Tensor | None] = [None] * len(low[0].weights)
    for one, other in pairs:
        for at, change in enumerate(map(_change, one.weights, other.weights)):
            before = omegas[at]
            omegas[at] = change if before is None or change is None else before + change
            omegas[at] = before if change is None else omegas[at]
    return Rounding(
        deltas=tuple(
            tuple(a - b for a, b in zip(one.outputs, other.outputs, strict=True))
            for one, other in pairs
        ),
        epsilons=tuple(
            tuple(map(_change, one.inputs, other.inputs)) for one, other in pairs
        ),
        omegas=tuple(omegas),
    )


def _change(
    one: torch.Tensor | None, other: torch.Tensor | None
) -> torch.Tensor | None:
    return None if one is None or other is None else one - other


def loss_scale_for(calls: dict[str, list[Call]]) -> float:
    """The loss scale that brings the largest gradient near 2^12, as fp16 wants it."""
    largest = max(
        (
            float(gradient.abs().max())
            for each in calls.values()
            for call in each
            for gradient in call.gradients
            if gradient is not None and gradient.numel()
        ),
        default=0.0,
    )
    if not math.isfinite(largest) or largest == 0:
        return 1.0
    return 2.0 ** min(24, max(0, 12 - math.frexp(largest)[1]))
