"""What every language model is asked: which text, and how long to learn. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from castwise.errors import SettingsError
from castwise.recipes.average_choice import refuse_average

VARIANTS = ("layer", "identity", "transformer")
"""The recipe's own layer; nothing in its place; a plain transformer as large."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSettings:
    """Which text, in which tokens."""

    paths: tuple[str, ...] = ()
    """Files, folders or local datasets; none: the language reference inside CPython."""

    tokenizer: str = "bytes"
    """bytes, or bpe by the package tokenizers."""

    vocab_size: int = 1024
    """Tokens that bpe learns; bytes has its own 257."""

    validation_share: float = 0.1
    """Share of the documents that the model is measured on, by a hash of their text."""

    sequence_length: int = 256
    """Tokens of a window."""

    batch_size: int = 8
    """Windows of a batch."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            SettingsError: Naming the first setting that cannot be honoured.
        """
        if self.tokenizer not in {"bytes", "bpe"}:
            raise SettingsError(
                f"text.tokenizer needs bytes or bpe, got {self.tokenizer!r}."
            )
        at_least(self, "text", vocab_size=257, sequence_length=2, batch_size=1)
        if not 0.0 < self.validation_share < 1.0:
            raise SettingsError(
                "text.validation_share must lie between 0 and 1, got "
                f"{self.validation_share}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSettings:
    """How long to learn, and what is measured on the way."""

    num_steps: int = 600
    """Updates of the run."""

    learning_rate: float = 3e-3
    """Peak of the schedule."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates."""

    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, biases and embeddings have none."""

    clip_norm: float = 1.0
    """Global gradient norm that is never exceeded."""

    num_warmup: int = 50
    """Steps of the linear rise of the learning rate."""

    decay_share: float = 0.4
    """Share of the run, at its end, in which the learning rate falls."""

    evaluate_every: int = 100
    """Steps between two measures on the validation text."""

    num_validation: int = 64
    """Windows of the validation text that a measure takes."""

    checkpoint_every: int = 100
    """Steps between two checkpoints."""

    log_every: int = 10
    """Steps between two lines of the journal."""

    seed: int = 0
    """Of weights and batches."""

    overfit_batches: int = 0
    """Learn and measure on as many batches alone, again and again; 0: on all."""

    average: str = "none"
    """Averaged weights that are evaluated and saved: none, ema or lawa."""

    average_decay: float = 0.99
    """Of ema: weight of the past."""

    average_every: int = 10
    """Of lawa: updates from one weight that is kept to the next."""

    average_count: int = 8
    """Of lawa: how many weights are kept."""

    compile: str = "auto"
    """yes, no, or auto: on a GPU alone, where it takes less time than it saves."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            SettingsError: Naming the first setting that cannot be honoured.
        """
        at_least(
            self,
            "training",
            num_steps=1,
            num_warmup=0,
            evaluate_every=1,
            num_validation=1,
            checkpoint_every=1,
            log_every=1,
            seed=0,
            overfit_batches=0,
        )
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            if not (value > 0.0 and math.isfinite(value)):
                raise SettingsError(f"training.{name} must be above 0, got {value}.")
        for name in ("weight_decay", "decay_share"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise SettingsError(f"training.{name} must lie in [0, 1], got {value}.")
        refuse_average(self, "training.")
        if self.compile not in {"auto", "yes", "no"}:
            raise SettingsError(
                f"training.compile needs auto, yes or no, got {self.compile!r}."
            )


def at_least(settings: object, section: str, **least: int) -> None:
    """Refuse a count that is too small.

    Raises:
        SettingsError: Naming section and field.
    """
    for name, smallest in least.items():
        value = getattr(settings, name)
        if value < smallest:
            raise SettingsError(
                f"{section}.{name} must be at least {smallest}, got {value}."
            )


def one_of(value: str, name: str, known: tuple[str, ...]) -> None:
    """Refuse a word that is not known.

    Raises:
        SettingsError: Naming what there is.
    """
    if value not in known:
        raise SettingsError(f"{name} needs one of {', '.join(known)}, got {value!r}.")
