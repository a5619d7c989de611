"""Every setting of a KenKen run, and the named presets. No torch.

`tiny` is for tests (seconds), `small` is what `make train` runs (a good three
minutes on two CPU cores), `hour` is the same model with one size more for a part of an
hour there, `base` is for a GPU. A resumed run must have the settings of the checkpoint:
`describe` is what stands in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isclose
from typing import Any

from castwise.errors import SettingsError
from castwise.recipes.average_choice import refuse_average

DIMENSIONS = ("size", "mode", "fill")
MODE_NAMES = ("standard", "zero", "negative")
SMALLEST, LARGEST = 3, 9


@dataclass(frozen=True, kw_only=True, slots=True)
class KenKenSettings:
    """One run, from data to schedule."""

    preset: str
    """Name of the preset that these settings started from."""

    model: str
    """Name of a model preset in `model.py`."""

    sizes: tuple[int, ...]
    """Rows of the puzzles to train on."""

    size_shares: tuple[float, ...]
    """Share of the steps for each size; they sum to 1."""

    modes: tuple[str, ...] = MODE_NAMES
    """Alphabets, mixed within every batch."""

    mode_shares: tuple[float, ...] = (1 / 3, 1 / 3, 1 / 3)
    """Share of the puzzles of a batch for each alphabet; they sum to 1."""

    latin_share: float = 0.1
    """Share of the steps that complete Latin squares without cages."""

    empty_share: float = 0.5
    """Share of KenKen puzzles that are shown without any hint."""

    max_reveal: float = 0.7
    """The others reveal each cell with a probability drawn from [0, max_reveal]."""

    cells_per_step: int = 1152
    """Cells in a batch; larger puzzles come in smaller batches."""

    num_steps: int
    """Updates of the run."""

    learning_rate: float = 3e-3
    """Peak of the schedule."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates."""

    weight_decay: float = 0.01
    """Decoupled decay of matrices; norms, biases and embeddings have none."""

    clip_norm: float = 1.0
    """Global gradient norm that is never exceeded."""

    num_warmup: int = 50
    """Steps of the linear rise of the learning rate."""

    decay_share: float = 0.35
    """Share of the run in which the learning rate falls."""

    average: str = "ema"
    """Averaged weights that are evaluated and saved: none, ema or lawa."""

    average_decay: float = 0.995
    """Of ema: weight of the past."""

    average_every: int = 10
    """Of lawa: updates from one weight that is kept to the next."""

    average_count: int = 8
    """Of lawa: how many weights are kept."""

    num_train: int
    """Training puzzles of each size and mode."""

    num_validation: int
    """Validation puzzles of each size and mode."""

    num_quick: int = 96
    """Validation puzzles of each size and mode that every epoch measures."""

    num_loops: int | None = None
    """Loops of the model when it solves; None for as many as it trained with."""

    evaluate_every: int
    """Steps of an epoch."""

    checkpoint_every: int
    """Steps between two checkpoints."""

    walked: tuple[str, ...] = ()
    """Dimensions of the curriculum: size, mode, fill; without any there is none."""

    curriculum_text: str = ""
    """The curriculum file, or nothing for the default one."""

    seed: int = 0
    """Seed of data order, masks and initial weights."""

    data_seed: int = 0
    """Seed of the puzzles themselves; runs with other seeds share the cache."""

    def __post_init__(self) -> None:
        """Refuse settings without a meaning.

        Raises:
            SettingsError: Naming the first setting that cannot be honoured.
        """
        self._check_sizes()
        for name in ("num_steps", "num_train", "num_validation", "num_quick"):
            if getattr(self, name) < 1:
                raise SettingsError(
                    f"{name} must be at least 1, got {getattr(self, name)}."
                )
        for name in ("latin_share", "empty_share", "max_reveal"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise SettingsError(
                    f"{name} must lie in [0, 1), got {getattr(self, name)}."
                )
        refuse_average(self)
        if self.seed < 0:
            raise SettingsError(f"A seed must not be negative, got {self.seed}.")

    def _check_sizes(self) -> None:
        if not self.sizes or not self.modes:
            raise SettingsError(
                "A run needs at least one size and one mode; name them with --sizes "
                "and --modes."
            )
        for size in self.sizes:
            if not SMALLEST <= size <= LARGEST:
                raise SettingsError(
                    f"Training knows sizes {SMALLEST} to {LARGEST}, got {size}; choose "
                    "among these with --sizes."
                )
        for mode in self.modes:
            if mode not in MODE_NAMES:
                raise SettingsError(
                    f"A mode is one of {', '.join(MODE_NAMES)}, got {mode!r}."
                )
        for name in ("sizes", "modes"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise SettingsError(f"{name} names one of {values} twice.")
        self._check_shares()

    def _check_shares(self) -> None:
        for name in ("size", "mode"):
            items, shares = getattr(self, f"{name}s"), getattr(self, f"{name}_shares")
            if len(shares) != len(items):
                raise SettingsError(
                    f"{len(items)} {name}s need as many shares, got {shares}."
                )
            if min(shares) < 0 or not isclose(sum(shares), 1.0, abs_tol=1e-6):
                raise SettingsError(
                    f"Shares of {name}s must not be negative and sum to 1, got "
                    f"{shares}, which sum to {sum(shares):g}; divide each by the sum."
                )

    def describe(self) -> dict[str, Any]:
        """Return plain data: what a checkpoint holds and a resume is compared with."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> KenKenSettings:
        """Return the settings that `describe` described.

        Raises:
            SettingsError: If a name is unknown or missing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        description = {**_UNKNOWN_BEFORE, **description}
        if set(description) != known:
            odd = sorted(set(description) ^ known)
            raise SettingsError(
                f"Settings of another version of this recipe: {', '.join(odd)} "
                "is unknown or missing; use the version of castwise that wrote them."
            )
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in description.items()
        }
        return cls(**values)

    def with_changes(self, changes: Mapping[str, Any]) -> KenKenSettings:
        """Return these settings with those of the command line laid over them.

        Args:
            changes: Values by name; `sizes` and `modes` as comma-separated text.

        Raises:
            SettingsError: If a text does not parse or a value has no meaning.
        """
        plain = dict(changes)
        if "sizes" in plain:
            plain["sizes"] = parse_sizes(plain["sizes"])
            plain["size_shares"] = _shares(plain["sizes"], self.sizes, self.size_shares)
        if "modes" in plain:
            plain["modes"] = tuple(name.strip() for name in plain["modes"].split(","))
            plain["mode_shares"] = _shares(plain["modes"], self.modes, self.mode_shares)
        if "num_steps" in plain:
            steps = max(1, plain["num_steps"])
            plain.setdefault("evaluate_every", min(self.evaluate_every, steps))
            plain.setdefault("num_warmup", min(self.num_warmup, steps // 10))
        return replace(self, **plain)


def _shares(
    chosen: tuple[Any, ...], known: tuple[Any, ...], shares: tuple[float, ...]
) -> tuple[float, ...]:
    """Keep the preset's proportions; what is new to it weighs as the mean."""
    weight_of = dict(zip(known, shares, strict=True))
    weights = [weight_of.get(item, 1.0 / len(known)) for item in chosen]
    return tuple(weight / sum(weights) for weight in weights)


def parse_sizes(text: str) -> tuple[int, ...]:
    """Read sizes with commas between.

    Raises:
        SettingsError: The text holds something else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise SettingsError(
            f"--sizes needs whole numbers with commas between, got {text!r}; write for "
            "example --sizes 4,5,6."
        ) from error


PRESETS: Mapping[str, KenKenSettings] = {
    "tiny": KenKenSettings(
        preset="tiny",
        model="tiny",
        sizes=(3, 4),
        size_shares=(0.3, 0.7),
        cells_per_step=256,
        num_steps=40,
        num_warmup=5,
        num_train=256,
        num_validation=32,
        num_quick=16,
        evaluate_every=20,
        checkpoint_every=10,
    ),
    "small": KenKenSettings(
        preset="small",
        model="small",
        sizes=(3, 4, 5, 6),
        size_shares=(0.02, 0.13, 0.4, 0.45),
        mode_shares=(0.2, 0.4, 0.4),
        num_steps=800,
        learning_rate=8e-3,
        decay_share=0.7,
        average_decay=0.99,
        num_train=8192,
        num_validation=400,
        num_quick=64,
        evaluate_every=200,
        checkpoint_every=100,
    ),
    "hour": KenKenSettings(
        preset="hour",
        model="small",
        sizes=(4, 5, 6, 7),
        size_shares=(0.06, 0.26, 0.3, 0.38),
        mode_shares=(0.2, 0.4, 0.4),
        num_steps=4000,
        learning_rate=5e-3,
        num_warmup=200,
        decay_share=0.7,
        average_decay=0.998,
        num_train=32768,
        num_validation=600,
        num_quick=96,
        evaluate_every=400,
        checkpoint_every=200,
    ),
    "base": KenKenSettings(
        preset="base",
        model="base",
        sizes=(3, 4, 5, 6, 7, 8, 9),
        size_shares=(0.02, 0.05, 0.08, 0.15, 0.2, 0.25, 0.25),
        cells_per_step=65536,
        num_steps=30000,
        learning_rate=1e-3,
        num_warmup=1000,
        num_train=65536,
        num_validation=1000,
        average_decay=0.999,
        evaluate_every=1000,
        checkpoint_every=1000,
    ),
}

_UNKNOWN_BEFORE = {"average": "ema", "average_every": 10, "average_count": 8}
"""What earlier runs had without saying so."""


def settings_of(preset: str, changes: Mapping[str, Any]) -> KenKenSettings:
    """Return a preset with changes laid over it.

    Raises:
        SettingsError: If the preset is unknown or a change has no meaning.
    """
    if preset not in PRESETS:
        raise SettingsError(f"A preset is one of {', '.join(PRESETS)}, got {preset!r}.")
    return PRESETS[preset].with_changes(changes)
