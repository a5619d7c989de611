"""How gradients are made smaller before DDP sends them round: settings in one line.

    replicate(model, policy)                               as the policy's `reduce` says
    replicate(model, policy, compress="bf16")              in 16 bits, islands excepted
    replicate(model, policy, compress="powersgd:rank=4")   matrices as two thin factors

`bf16` and `fp16` stand for `r=bf16` and `r=fp16` in the policy's default: whatever a
rule holds in more digits goes round in these. `powersgd` is `low_rank`; its factors
travel in the format of `reduce`, so that it saves twice under a policy with r=bf16.

What is sent each step, with n numbers of which a fraction stands in matrices R x C:

    reduce           n times the bytes of the format
    powersgd:rank=k  k (R + C) instead of R C for each matrix, the rest as it is
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from castwise.errors import SettingsError
from castwise.wording import did_you_mean

Method = Literal["reduce", "bf16", "fp16", "powersgd"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Compression:
    """How gradients are made smaller."""

    method: Method = "reduce"
    """What is done: nothing beside the policy's `reduce`, 16 bits, or factors."""

    rank: int = 4
    """powersgd: columns of each factor."""

    start: int = 10
    """powersgd: steps at the beginning that send whole gradients."""

    saves: float = 2.0
    """powersgd: how many times smaller the factors must be than the matrix."""

    seed: int = 0
    """powersgd: of the first factors, which all ranks draw alike."""

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        if self.rank < 1:
            raise SettingsError(f"powersgd needs rank >= 1, got rank={self.rank}")
        if self.start < 0:
            raise SettingsError(f"powersgd needs start >= 0, got start={self.start}")
        if not self.saves >= 1:
            raise SettingsError(f"powersgd needs saves >= 1, got saves={self.saves}")

    @classmethod
    def parse(cls, text: str) -> Compression:
        """Read `powersgd:rank=4,start=100`; what is left out has its default.

        Raises:
            SettingsError: The method, a key or a value is not known.
        """
        method, _, rest = text.partition(":")
        if method not in get_args(Method):
            raise SettingsError(
                f"gradients are compressed by {', '.join(get_args(Method))}; got "
                f"{text!r}{did_you_mean(method, get_args(Method))}"
            )
        found: dict[str, Any] = {"method": method}
        for part in filter(None, rest.split(",")):
            key, _, value = part.partition("=")
            found[key] = _value(method, key, value, text)
        return cls(**found)

    def __str__(self) -> str:
        """The line that `parse` reads, without what has its default."""
        said = [
            f"{each.name}={getattr(self, each.name)}"
            for each in fields(self)
            if each.name != "method" and getattr(self, each.name) != each.default
        ]
        return f"{self.method}:{','.join(said)}" if said else self.method


_KINDS = {"rank": int, "start": int, "saves": float, "seed": int}


def _value(method: str, key: str, value: str, text: str) -> object:
    if method != "powersgd" or key not in _KINDS:
        known = (
            f"knows {', '.join(_KINDS)}" if method == "powersgd" else "takes no keys"
        )
        raise SettingsError(f"{method} {known}; got {key!r} in {text!r}")
    try:
        return _KINDS[key](value)
    except ValueError:
        raise SettingsError(
            f"{key} needs a number; got {value!r} in {text!r}"
        ) from None
