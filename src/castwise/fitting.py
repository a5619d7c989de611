"""What has to fit before a policy is put on: the device, and how weights are held.

    where = device_of(model)
    fitted, fallbacks = fit_to_device(policy, where, fallback=None)

A device may be unable to do what a policy asks for. That is an error with a remedy,
unless the caller allowed a fallback; then the formats that were exchanged are returned.
"""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch

from castwise.decision import Decision
from castwise.dtypes import dtype_of, format_of, supports
from castwise.errors import IslandError, SettingsError, UnsupportedFormatError
from castwise.formats import parse_format
from castwise.fp8_products import CARRIER, FP8, GRADIENT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from castwise.policy.bound import BoundPolicy
    from castwise.policy.precision import Precision
    from castwise.policy.rules import Policy

_USED = ("param", "compute", "output")  # reduce needs no product on the device


def device_of(model: nn.Module) -> torch.device:
    """Return the one device that the model stands on."""
    tensors = (*model.parameters(), *model.buffers())
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise SettingsError(
            f"the model stands on {', '.join(sorted(map(str, devices)))}; move it to "
            "one device, or give device="
        )
    return devices.pop() if devices else torch.device("cpu")


def fit_to_device(
    policy: Policy, device: torch.device, fallback: str | None
) -> tuple[Policy, tuple[Decision[str], ...]]:
    """Return the policy that the device can do, and what was exchanged for it.

    Raises:
        UnsupportedFormatError: It cannot do a format and no fallback was allowed, or it
            cannot do the fallback either.
    """
    refused = {}
    for name in sorted(_formats_of(policy)):
        answer = supports(device, name)
        may_emulate = policy.emulation == "allowed" and name in FP8
        if not (answer.value or may_emulate):
            refused[name] = answer.because
    if not refused:
        return policy, ()
    first = next(iter(refused))
    if fallback is None:
        raise UnsupportedFormatError(
            f"the policy {policy.name!r} needs {first} on {device}: {refused[first]}; "
            "choose another format, or allow one with fallback="
        )
    fallback = parse_format(fallback).name
    answer = supports(device, fallback)
    if not answer.value:
        raise UnsupportedFormatError(
            f"the fallback {fallback} cannot be used on {device}: {answer.because}; "
            "choose another one"
        )
    decisions = tuple(
        Decision(fallback, f"instead of {name}: {because}")
        for name, because in refused.items()
    )
    exchange = dict.fromkeys(refused, fallback)
    fitted = replace(
        policy,
        default=_exchanged(policy.default, exchange),
        rules=tuple(
            replace(rule, precision=_exchanged(rule.precision, exchange))
            for rule in policy.rules
        ),
    )
    return fitted, decisions


def emulated(policy: Policy) -> tuple[Decision[str], ...]:
    """Say which formats of a policy are emulated, and how."""
    if policy.emulation != "allowed":
        return ()
    return tuple(
        Decision(
            name,
            f"emulated: operands of products are rounded to it and multiplied in "
            f"{CARRIER}, gradients are rounded to {GRADIENT}; no device computes in it "
            "here",
        )
        for name in FP8
        if name in _formats_of(policy)
    )


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a process holds a part of the tensor only (`DTensor`)."""
    room = sys.modules.get("torch.distributed.tensor")  # dear to load, and seldom used
    return room is not None and isinstance(tensor, room.DTensor)


def refuse_sharded_storage(model: nn.Module, bound: BoundPolicy) -> None:
    """Refuse to change the format of weights that were sharded before we came.

    Raises:
        IslandError: A weight is held in another format than the policy says.
    """
    for name, weight in model.named_parameters():
        if not is_sharded(weight):
            continue
        param = bound.precision_of(name.rpartition(".")[0]).param
        assert param is not None
        if weight.is_floating_point() and weight.dtype is not dtype_of(param):
            raise IslandError(
                f"{name!r} is sharded already and holds {format_of(weight.dtype)}, but "
                f"{bound.policy.name} holds it in {param}; let castwise.distributed."
                f"shard do both, create it in {param} before fully_shard, or take a "
                "policy that holds weights in fp32, such as bf16-mixed"
            )


def _formats_of(policy: Policy) -> set[str]:
    asked = (policy.default, *(rule.precision for rule in policy.rules))
    return {name for precision in asked for name in _named(precision)}


def _named(precision: Precision) -> Iterator[str]:
    for field in _USED:
        name = getattr(precision, field)
        if name is not None:
            yield name


def _exchanged(precision: Precision, exchange: Mapping[str, str]) -> Precision:
    changed = {
        field.name: exchange[getattr(precision, field.name)]
        for field in fields(precision)
        if getattr(precision, field.name) in exchange
    }
    return replace(precision, **changed)
