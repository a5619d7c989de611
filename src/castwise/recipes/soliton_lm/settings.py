"""The settings of the model. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from castwise.errors import SettingsError
from castwise.recipes.language.settings import VARIANTS, at_least, one_of

CONFIG = "configs/soliton_lm.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class SolitonSettings:
    """Size of the model, and of its propagators."""

    dim: int = 64
    """Complex channels of a token."""

    num_blocks: int = 4
    """Complex blocks: half of them before the propagators, the others behind."""

    num_heads: int = 4
    """Attention heads of a block."""

    hidden: int = 128
    """Complex width of the feed-forward."""

    num_propagators: int = 2
    """Propagators of the stack."""

    dt: float = 0.1
    """Time step of a propagator."""

    envelope: float = 0.1
    """Initial damping of intensity peaks."""

    sharpness: float = 0.05
    """Rate at which the phase turns with intensity."""

    sparsity: int = 6
    """Neighbours of a channel on the first ring."""

    solver: str = "explicit"
    """explicit, iterative or chebyshev."""

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
            dim=4,
            num_blocks=1,
            num_heads=1,
            hidden=1,
            num_propagators=1,
            sparsity=2,
        )
        one_of(self.variant, "model.variant", VARIANTS)
        one_of(self.solver, "model.solver", ("explicit", "iterative", "chebyshev"))
        if self.dim % (2 * self.num_heads):
            raise SettingsError(
                f"model.dim must be a multiple of 2 * model.num_heads, got {self.dim} "
                f"and {self.num_heads}."
            )
        if not self.dt > 0.0:
            raise SettingsError(f"model.dt must be above 0, got {self.dt}.")
