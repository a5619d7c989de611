"""Findings of a lint that a policy accepts, each with its reason.

    silences:
      - check: lost-update
        at: "*.norm.*"                # a glob of places; without it everywhere
        because: norm weights stay at 1 in this model

They change nothing that runs. They stand in the policy because the reason is about the
policy, and because whoever lints it next must not be asked the same again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from castwise.errors import RuleError
from castwise.wording import did_you_mean, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

CHECKS: Mapping[str, str] = {
    "rounded-angle": "angles or rotary frequencies are rounded to 16 bits",
    "integer-position": "integers that the format cannot tell apart",
    "lost-update": "an update is below half an ulp of the weight",
    "lost-decay": "weight decay is below half an ulp of the weight",
    "overflowing-constant": "a constant is infinite in fp16",
    "vanishing-eps": "an eps is zero in the format",
    "bce-on-probabilities": "binary cross entropy of probabilities that were rounded",
    "long-reduction": "a sum in 16 bits comes close to its largest number, or stalls",
    "bare-custom-function": "a custom autograd function multiplies without custom_bwd",
    "low-loss": "the loss is computed in 16 bits",
    "smoothed-target": "label smoothing forbids the target loss",
}
"""Every check of a lint by its id, and what it finds."""

SILENCE_KEYS: Mapping[str, str] = {
    "check": f"what is accepted: {', '.join(CHECKS)}",
    "at": "glob on the module, buffer or parameter; everywhere when absent",
    "because": "the reason, one line",
}
"""The keys of a silence in a policy file and what they mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Silence:
    """One kind of finding that somebody decided to live with."""

    check: str
    """Id of the check, a key of `CHECKS`."""

    at: str | None = None
    """Glob of the places where it is accepted; none for everywhere."""

    because: str
    """Why, one line."""

    where: str = field(default="", compare=False)
    """File and line; takes no part in equality."""

    def __post_init__(self) -> None:
        place = f"{self.where}: " if self.where else ""
        if self.check not in CHECKS:
            raise RuleError(
                f"{place}a silence needs one of the checks {', '.join(CHECKS)}, got "
                f"{shown(self.check)}{did_you_mean(self.check, CHECKS)}"
            )
        for name in ("at", "because"):
            text = getattr(self, name)
            if text is not None and (not text.isprintable() or text != text.strip()):
                raise RuleError(
                    f"{place}{name} needs one line of printable text without outer "
                    f"spaces, got {shown(text)}"
                )
        if self.at == "":
            raise RuleError(
                f"{place}at is empty; name a place, or leave it out for all of them"
            )
        if not self.because:
            raise RuleError(
                f"{place}the silence of {self.key} needs a reason; write because: and "
                "why the finding is accepted"
            )

    @property
    def key(self) -> str:
        """`check`, or `check@glob`."""
        return self.check if self.at is None else f"{self.check}@{self.at}"
