"""A policy as a guest: on a model, in a loop that somebody else owns.

    hosted = HostedPolicy(policy_of("policy.yaml"))
    hosted.put_on(model, torch.device("cpu"))
    with hosted.region():                 # wherever the host lets us stand
        loss = model(batch)
    hosted.take_off()                     # no trace is left

The host moves models, wraps them, and calls backward and step when it likes. So the
device may change after the policy was put on; `follow` looks, and puts it on anew.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from castwise.dtypes import dtype_of, supports
from castwise.errors import SettingsError, UnmatchedRuleError
from castwise.fitting import fit_to_device, refuse_sharded_storage
from castwise.islands import AppliedPolicy, apply_policy, module_facts
from castwise.islands.crossing import Crossing
from castwise.policy.precision import FP32
from castwise.policy.presets import PRESETS, preset
from castwise.policy.rules import Policy
from castwise.region import Region, refuse_unknown_operators

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

    from castwise.policy.bound import BoundPolicy
    from castwise.policy.keys import ModuleFacts

Unmatched = Literal["raise", "warn"]
"""What happens to a rule that matches no module."""

_NOTE = "_castwise_host"


def policy_of(source: Policy | str | Path) -> Policy:
    """Return a policy, given itself, the name of a preset, or a policy file.

    Raises:
        PolicyError: No preset has that name, or the file says something wrong.
        StorageError: The file cannot be read.
    """
    if isinstance(source, Policy):
        return source
    if isinstance(source, str) and source in PRESETS:
        return preset(source)
    looks_like_a_file = Path(source).suffix in (".yaml", ".yml")
    if isinstance(source, Path) or looks_like_a_file or Path(source).exists():
        return Policy.load(source)
    return preset(source)  # refuses it, and names those that there are


class HostedPolicy:
    """One policy on the models of one host.

    Args:
        policy: What runs in which format.
        fallback: The format to use instead of one that the device cannot do.
        unmatched: With `warn`, a rule that matches nothing is left out and reported.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        fallback: str | None = None,
        unmatched: Unmatched = "raise",
    ) -> None:
        if unmatched not in get_args(Unmatched):
            raise SettingsError(
                f"unmatched needs to be raise or warn; got {unmatched!r}"
            )
        self.asked = policy
        self.is_idle = not policy.rules and policy.default.over(FP32) == FP32
        """Whether the policy asks for nothing: fp32 throughout and no rule."""
        self._fallback, self._unmatched = fallback, unmatched
        self._seats: list[_Seat] = []
        self._phase = "full"
        self._region: Region | None = None

    @property
    def effective(self) -> Policy:
        """The policy in force, which differs from `asked` by fallbacks alone."""
        return self._seats[0].policy if self._seats else self.asked

    @property
    def device_type(self) -> str:
        """The kind of device that the models stand on."""
        return self._seats[0].device.type if self._seats else "cpu"

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The models that it is on."""
        return tuple(seat.model for seat in self._seats)

    @property
    def applied(self) -> tuple[AppliedPolicy, ...]:
        """What was done to each model."""
        return tuple(seat.applied for seat in self._seats)

    @property
    def phase(self) -> str:
        """The phase whose precision is in force; may change between steps."""
        return self._phase

    @phase.setter
    def phase(self, phase: str) -> None:
        self.asked.base_precision(phase=phase)  # refuses what is no phase
        for seat in self._seats:
            seat.applied.phase = phase
        self._phase, self._region = phase, None

    def put_on(
        self,
        model: nn.Module,
        device: torch.device,
        take_off: Callable[[], None] | None = None,
    ) -> tuple[str, ...]:
        """Put the policy on a model; returns what a log should say, in lines.

        The first line is the coverage; the others are cautions. A policy that another
        host left on the model is taken off first.

        Args:
            model: The model, as the host hands it over.
            device: Where it stands or will stand.
            take_off: What undoes all that the caller does beside this.

        Raises:
            UnmatchedRuleError: A rule matches nothing in the model.
            UnsupportedFormatError: The device cannot do a format of the policy.
            IslandError: A module cannot be held as the policy says.
        """
        handle = model.__dict__.get(_NOTE)
        if isinstance(handle, _Handle) and handle.take_off is not None:
            handle.take_off()
        refuse_unknown_operators(self.asked)
        policy, fallbacks = fit_to_device(self.asked, device, self._fallback)
        facts = module_facts(model)
        policy, dropped = self._matching(policy, facts)
        bound = policy.bind(facts)
        refuse_sharded_storage(model, bound)
        applied = apply_policy(model, bound, device.type, phase=self._phase)
        model.__dict__[_NOTE] = _Handle(take_off or partial(self.take_off, model))
        self._seats.append(
            _Seat(model=model, applied=applied, policy=policy, device=device)
        )
        self._region = None
        return (
            f"castwise {policy.name} on {device.type}: {applied.coverage()}",
            *(f"fallback: {decision}" for decision in fallbacks),
            *dropped,
            *_cautions(policy, device),
            *_lost_updates(model, bound),
        )

    def take_off(self, model: nn.Module | None = None) -> None:
        """Take the policy off one model, or off all."""
        for seat in [s for s in self._seats if model is None or s.model is model]:
            seat.applied.remove()
            seat.model.__dict__.pop(_NOTE, None)
            self._seats.remove(seat)
        self._region = None

    def follow(self) -> None:
        """Put the policy on anew where the host moved a model to another device."""
        for seat in tuple(self._seats):
            weight = next(seat.model.parameters(), None)
            if weight is None or weight.device.type in (seat.device.type, "meta"):
                continue
            self.take_off(seat.model)
            self.put_on(seat.model, weight.device)

    @contextlib.contextmanager
    def region(self, device_type: str | None = None) -> Iterator[None]:
        """Put the precision of the phase into force around a step."""
        self.follow()
        if self._region is None:
            self._region = Region.of(self.effective, self._phase, self.applied)
        with self._region.entered(device_type or self.device_type):
            yield

    def cast_inputs(self, data: Any) -> Any:
        """Cast what enters the model, where its weights are held low or in fp64."""
        base = self.effective.base_precision(phase=self._phase)
        if base.param != base.compute or base.compute in (None, "fp32"):
            return data
        return Crossing(dtype_of(base.compute)).values(data)

    def coverage(self) -> str:
        """One line: which modules run in another format than the rest."""
        if self.is_idle:
            return "nothing to do: every module in fp32"
        if not self._seats:
            return "on no model yet"
        return "; ".join(seat.applied.coverage() for seat in self._seats)

    def _matching(
        self, policy: Policy, facts: Sequence[ModuleFacts]
    ) -> tuple[Policy, tuple[str, ...]]:
        """Leave out the rules that match nothing, if that was allowed."""
        if self._unmatched == "raise":
            return policy, ()
        kept, dropped = [], []
        for rule in policy.rules:
            try:
                replace(policy, rules=(rule,)).bind(facts)
            except UnmatchedRuleError as error:
                dropped.append(f"left out: {error}")
            else:
                kept.append(rule)
        return replace(policy, rules=tuple(kept)), tuple(dropped)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seat:
    """One model with the policy on it."""

    model: nn.Module
    """As the host handed it over."""

    applied: AppliedPolicy
    """What takes it off again."""

    policy: Policy
    """As the device can do it."""

    device: torch.device
    """Whose autocast and switches are used."""


class _Handle:
    """What a model keeps to be rid of its policy; a copy of the model keeps nothing."""

    def __init__(self, take_off: Callable[[], None] | None = None) -> None:
        self.take_off = take_off

    def __reduce__(self) -> tuple[type[_Handle], tuple[()]]:
        return _Handle, ()


def _lost_updates(model: nn.Module, bound: BoundPolicy) -> tuple[str, ...]:
    """Say that 16-bit weights are plain here, because the host owns the optimizer."""
    found = [
        bound.storage_of(fqn)
        for fqn, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    asked = [decision for decision in found if decision.value not in (None, "plain")]
    if not asked:
        return ()
    line = (
        f"{len(asked)} modules hold 16-bit weights plain, not {asked[0].value}: the "
        "optimizer is the host's, and small updates are lost; give it to "
        "castwise.hold_weights, or to castwise.prepare in a loop of your own"
    )
    return (line,)


def _cautions(policy: Policy, device: torch.device) -> tuple[str, ...]:
    """Say which formats the device computes in, but slowly."""
    asked = (policy.default, *(rule.precision for rule in policy.rules))
    formats = sorted({each.compute for each in asked if each.compute is not None})
    answers = (supports(device, fmt).because for fmt in formats)
    return tuple(because for because in answers if "slowly" in because)
