"""What a person asked for on the command line, turned into one policy.

`--dtype`, `--precision` and `--policy` are three ways to say the same thing; two at
once contradict each other. What then really runs is measured, not assumed: see
`castwise.numerics.census`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from castwise.decision import Decision
from castwise.errors import SettingsError

if TYPE_CHECKING:
    from castwise.policy import Policy

DTYPE_PRESETS = {"fp32": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionChoice:
    """The precision flags of one command."""

    dtype: str | None = None
    """Short name: fp32, fp16 or bf16."""

    precision: str | None = None
    """Name of a policy preset."""

    policy_file: Path | None = None
    """A policy document."""

    fallback: str | None = None
    """Format to use instead of one that the device cannot do."""

    storage: str | None = None
    """How weights in 16 bits are stored, instead of as the policy says."""

    def __post_init__(self) -> None:
        """Refuse two answers to one question.

        Raises:
            SettingsError: If more than one of dtype, precision, policy is given.
        """
        given = [
            flag
            for flag, value in (
                ("--dtype", self.dtype),
                ("--precision", self.precision),
                ("--policy", self.policy_file),
            )
            if value is not None
        ]
        if len(given) > 1:
            raise SettingsError(
                f"One flag decides the precision, and {' and '.join(given)} were "
                "given; keep one of them."
            )

    @property
    def is_given(self) -> bool:
        """Whether any flag asks for a precision."""
        return any((self.dtype, self.precision, self.policy_file))

    def policy(self, *, otherwise: str) -> Decision[Policy]:
        """Return the policy asked for, with the flag that asked.

        `--storage` is laid over it.

        Args:
            otherwise: Preset to take when no flag was given.

        Raises:
            PolicyError: If the preset is unknown or the document malformed.
            StorageError: If the document cannot be read.
        """
        found = self._policy(otherwise)
        if self.storage is None:
            return found
        return Decision(
            found.value.with_storage(self.storage),
            f"{found.because}, --storage {self.storage}",
        )

    def _policy(self, otherwise: str) -> Decision[Policy]:
        from castwise.policy import Policy, preset

        if self.policy_file is not None:
            policy = Policy.load(self.policy_file)
            return Decision(policy, f"--policy {self.policy_file}")
        if self.precision is not None:
            return Decision(preset(self.precision), f"--precision {self.precision}")
        if self.dtype is not None:
            name = DTYPE_PRESETS[self.dtype]
            return Decision(preset(name), f"--dtype {self.dtype}")
        return Decision(preset(otherwise), "the recipe's own choice")
