"""The settings of the model. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from castwise.errors import SettingsError
from castwise.recipes.language.settings import VARIANTS, at_least, one_of

CONFIG = "configs/resolvent_lm.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolventSettings:
    """Size of the model, and how far its chains listen."""

    dim: int = 96
    """Width of a token."""

    num_blocks: int = 3
    """How many blocks."""

    num_chains: int = 48
    """Chains of a block, each with a potential, a coupling and a z of its own."""

    widest_eta: float = 1.0
    """Im z of the first chain: it hears a few tokens."""

    narrowest_eta: float = 0.05
    """Im z of the last chain: it hears many; between them it falls evenly by factor."""

    hidden: int = 256
    """Width of the feed-forward."""

    num_heads: int = 4
    """Attention heads of the plain transformer that stands beside it."""

    variant: str = "layer"
    """layer, or what it is compared with: identity, transformer."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            SettingsError: Naming the first setting that cannot be honoured.
        """
        at_least(
            self,
            "model",
            dim=2,
            num_blocks=1,
            num_chains=1,
            hidden=1,
            num_heads=1,
        )
        one_of(self.variant, "model.variant", VARIANTS)
        if not 0.0 < self.narrowest_eta <= self.widest_eta:
            raise SettingsError(
                "model.narrowest_eta must lie above 0 and not above model.widest_eta, "
                f"got {self.narrowest_eta} and {self.widest_eta}."
            )
