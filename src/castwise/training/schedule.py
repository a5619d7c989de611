"""Learning rates as a pure function of the step: warm up, hold, decay.

The warmup-stable-decay shape (Hu et al. 2024, arXiv 2404.06395, section 4): a linear
rise, a plateau, and a linear fall at the end. It has no state: a resumed run asks for
step k and gets exactly what the uninterrupted run got.
"""

from __future__ import annotations

from dataclasses import dataclass

from castwise.errors import SettingsError


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupStableDecay:
    """A factor in [0, 1] for the peak learning rate, by step."""

    num_steps: int
    """Steps of the whole run."""

    num_warmup: int = 0
    """Steps of the linear rise."""

    decay_share: float = 0.35
    """Share of the run, at its end, in which the rate falls linearly."""

    final_factor: float = 0.0
    """Factor that the fall would reach one step after the last."""

    def __post_init__(self) -> None:
        """Refuse shapes that have no meaning.

        Raises:
            SettingsError: If a length is negative or a share lies outside [0, 1].
        """
        if self.num_steps < 1:
            raise SettingsError(
                f"A schedule needs num_steps >= 1, got {self.num_steps}; ask for at "
                "least one step."
            )
        if self.num_warmup < 0:
            raise SettingsError(
                f"A schedule needs num_warmup >= 0, got {self.num_warmup}; "
                "use 0 for none."
            )
        for name in ("decay_share", "final_factor"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise SettingsError(
                    f"A schedule needs {name} in [0, 1], got {value}; it is a share."
                )

    def factor(self, step: int) -> float:
        """Return the factor for the update number `step`, counted from 0."""
        rise = min(1.0, (step + 1) / (self.num_warmup + 1))
        num_decay = self.decay_share * self.num_steps
        left = self.num_steps - step
        if num_decay <= 0.0 or left >= num_decay:
            return rise
        fall = self.final_factor + (1.0 - self.final_factor) * left / num_decay
        return min(rise, fall)
