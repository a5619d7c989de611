"""Which format each phase computes in, and what that would save.

    config = MixedPrecisionConfig.default()            # predictions in bf16
    config = config.with_phase_precision("predict", "fp16")
    policy = config.policy()                           # rules keyed by phase

The format of a phase is, in this order: fp32 if the config is switched off; what was
set for the phase; what is recommended for it, if `auto_recommend`; the default. Weights
stay in fp32 under every config: a phase only computes low. Whether a device can compute
in a format is asked by `prepare`, with a small product, before anything runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from castwise.errors import SettingsError
from castwise.formats import FORMATS, parse_format
from castwise.hybrid.phases import Phase, parse_phase
from castwise.policy import Policy
from castwise.policy.precision import Precision

PHASE_FORMATS = ("fp64", "fp32", "tf32", "bf16", "fp16")
"""What a phase can compute in; formats of 8 bits are emulated, and save nothing."""

RECOMMENDED: Mapping[Phase, str] = {
    Phase.WARMUP: "fp32",
    Phase.FULL: "fp32",
    Phase.PREDICT: "bf16",
    Phase.CORRECT: "fp32",
}
"""A prediction is an estimate in any format; whatever computes a gradient stays up."""


@dataclass(kw_only=True, slots=True)
class MixedPrecisionConfig:
    """Formats by phase; may be changed in place until a trainer takes its policy."""

    enabled: bool = True
    """Off, every phase computes in fp32 whatever else is set."""

    default_precision: str = "fp32"
    """The format of a phase for which nothing else decides."""

    phase_precisions: dict[Phase, str] = field(default_factory=dict)
    """What was set for single phases."""

    auto_recommend: bool = True
    """Whether phases for which nothing was set get the recommended format."""

    def __post_init__(self) -> None:
        self.default_precision = _format(self.default_precision)
        given, self.phase_precisions = dict(self.phase_precisions), {}
        for phase, fmt in given.items():
            self.set_phase_precision(phase, fmt)

    @classmethod
    def default(cls) -> Self:
        """Return bf16 for predictions and fp32 for the rest."""
        return cls()

    @classmethod
    def conservative(cls) -> Self:
        """Return fp32 everywhere: no savings, and nothing to explain."""
        return cls(enabled=False, auto_recommend=False)

    @classmethod
    def aggressive(cls) -> Self:
        """Return bf16 in every phase, corrections included, over fp32 weights."""
        return cls(default_precision="bf16", auto_recommend=False)

    def set_phase_precision(self, phase: str, fmt: str) -> None:
        """Set the format of a phase here."""
        self.phase_precisions[parse_phase(phase)] = _format(fmt)

    def with_phase_precision(self, phase: str, fmt: str) -> Self:
        """Return a config with another format for a phase; this one stays."""
        changed = type(self).from_dict(self.to_dict())
        changed.set_phase_precision(phase, fmt)
        return changed

    def precision_for_phase(self, phase: str) -> str:
        """Return the format that a phase computes in."""
        which = parse_phase(phase)
        if not self.enabled:
            return "fp32"
        if which in self.phase_precisions:
            return self.phase_precisions[which]
        return RECOMMENDED[which] if self.auto_recommend else self.default_precision

    def policy(self, over: Policy | None = None) -> Policy:
        """Return the policy of these formats, with one rule for each phase.

        Args:
            over: A policy whose islands and weight formats shall hold in every phase.
                Default: fp32 weights and no islands.
        """
        policy = Policy(name="hybrid") if over is None else over
        for phase in Phase:
            fmt = self.precision_for_phase(phase)
            policy = policy.with_phase_precision(
                phase.value,
                Precision(compute=fmt, output="fp32" if fmt == "tf32" else fmt),
                because=self._because(phase),
            )
        return policy

    def estimate_memory_savings(self, distribution: Mapping[str, float]) -> float:
        """Return the memory *used*, as a share of fp32, averaged over time.

        Each phase counts with the share of steps spent in it, and with the bytes of its
        format over those of fp32. It says nothing about the peak, by which a run fits
        on a device or does not: see `castwise.hybrid.memory_by_phase`.

        Args:
            distribution: Phase -> its share of the steps; phases left out do not count,
                and the shares need not add up to 1.

        Raises:
            SettingsError: A share is negative or not finite.
        """
        shares = {parse_phase(phase): share for phase, share in distribution.items()}
        for phase, share in shares.items():
            if not (math.isfinite(share) and share >= 0):
                raise SettingsError(
                    f"the share of {phase.value} needs to be a number of 0 or more, "
                    f"got {share}; give the part of all steps spent in it"
                )
        total = math.fsum(shares.values())
        if not self.enabled or total <= 0:
            return 1.0
        used = math.fsum(
            share * _bits(self.precision_for_phase(phase)) / 32
            for phase, share in shares.items()
        )
        return used / total

    def to_dict(self) -> dict[str, Any]:
        """Return plain values from which `from_dict` builds an equal config."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        formats = self.phase_precisions.items()
        values["phase_precisions"] = {phase.value: fmt for phase, fmt in formats}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a config from plain values.

        Raises:
            SettingsError: A key is unknown or a value has no meaning.
        """
        known = {each.name for each in fields(cls)}
        for name in values:
            if name not in known:
                raise SettingsError(
                    f"mixed_precision_config has no key {name!r}; it has "
                    f"{', '.join(sorted(known))}"
                )
        for name in ("enabled", "auto_recommend"):
            if not isinstance(values.get(name, True), bool):
                raise SettingsError(
                    f"mixed_precision_config.{name} needs true or false, got "
                    f"{values[name]!r}"
                )
        if not isinstance(values.get("phase_precisions", {}), Mapping):
            raise SettingsError(
                "mixed_precision_config.phase_precisions needs lines such as "
                f"predict: bf16, got {values['phase_precisions']!r}"
            )
        return cls(**values)

    def _because(self, phase: Phase) -> str:
        if not self.enabled:
            return "the precision by phase is switched off"
        if phase in self.phase_precisions:
            return f"it was set for {phase.value}"
        if not self.auto_recommend:
            return "the default precision of every phase"
        if phase is Phase.PREDICT:
            return "a prediction runs forward only, and is an estimate in any format"
        return f"{phase.value} computes gradients"


def _format(text: object) -> str:
    """Check the name of a format that a phase can compute in."""
    name = parse_format(str(text)).name
    if name not in PHASE_FORMATS:
        raise SettingsError(
            f"a phase computes in one of {', '.join(PHASE_FORMATS)}, got {name}; "
            "formats of 8 bits are emulated and save nothing"
        )
    return name


def _bits(fmt: str) -> int:
    """Bits of one number in memory: tf32 exists only inside matrix units."""
    return 32 if fmt == "tf32" else FORMATS[fmt].bits
