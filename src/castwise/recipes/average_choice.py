"""What `--average` asked for, turned into averaged weights, for any recipe. No torch.

    --average none                                      the weights themselves
    --average ema --average-decay 0.999                 an exponential average
    --average lawa --average-every 10 --average-count 8     the mean of the latest

Averages are evaluated and saved in place of the weights, which go on being trained. The
four settings stand among those of a recipe, so that a checkpoint holds them and a flag
that contradicts them is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import click

from castwise.errors import SettingsError
from castwise.wording import did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from castwise.optim.holding import HeldWeights
    from castwise.training.averages import Averages

AVERAGES = ("none", "ema", "lawa")
"""The averages by their names in settings."""

FIELDS = ("average", "average_decay", "average_every", "average_count")
"""The settings of averages; flags have the same names."""


class Averaged(Protocol):
    """Settings that say which average is kept."""

    @property
    def average(self) -> str:
        """One of `AVERAGES`."""

    @property
    def average_decay(self) -> float:
        """Of ema: weight of the past, in [0, 1)."""

    @property
    def average_every(self) -> int:
        """Of lawa: updates from one weight that is kept to the next."""

    @property
    def average_count(self) -> int:
        """Of lawa: how many are kept."""


def refuse_average(settings: Averaged, section: str = "") -> None:
    """Refuse settings that name no average, or one without a meaning.

    Args:
        settings: Of a recipe.
        section: What their names begin with in messages, such as `training.`.

    Raises:
        SettingsError: Naming the first setting that cannot be honoured.
    """
    if settings.average not in AVERAGES:
        raise SettingsError(
            f"{section}average needs one of {', '.join(AVERAGES)}, got "
            f"{settings.average!r}{did_you_mean(settings.average, AVERAGES)}."
        )
    if not 0.0 <= settings.average_decay < 1.0:
        raise SettingsError(
            f"{section}average_decay must lie in [0, 1), got {settings.average_decay}."
        )
    for name in ("average_every", "average_count"):
        if getattr(settings, name) < 1:
            raise SettingsError(
                f"{section}{name} must be at least 1, got {getattr(settings, name)}."
            )


def averages_of(
    settings: Averaged, model: nn.Module, held: HeldWeights | None
) -> Averages:
    """Return the averages that the settings ask for.

    Args:
        settings: Of a recipe.
        model: Whose weights are averaged.
        held: The weight storage in force under its optimizer, if there is one.
    """
    from castwise.training.averages import (  # noqa: PLC0415 -- imports torch
        ExponentialAverage,
        LatestAverage,
        NoAverages,
    )

    if settings.average == "ema":
        return ExponentialAverage(model, decay=settings.average_decay, held=held)
    if settings.average == "lawa":
        every, count = settings.average_every, settings.average_count
        return LatestAverage(model, every=every, count=count, held=held)
    return NoAverages()


def average_copies(settings: Averaged) -> int:
    """Return how many fp32 copies of the weights the averages keep."""
    return {"none": 0, "ema": 1, "lawa": settings.average_count}[settings.average]


def average_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags of averages to a command."""
    for option in reversed(
        (
            click.option(
                "--average",
                type=click.Choice(AVERAGES),
                help="Averaged weights that are evaluated and saved: exponential, or "
                "the mean of the latest.",
            ),
            click.option(
                "--average-decay", type=float, help="Weight of the past in ema."
            ),
            click.option(
                "--average-every",
                type=click.IntRange(min=1),
                help="Updates between two weights that lawa keeps.",
            ),
            click.option(
                "--average-count",
                type=click.IntRange(min=1),
                help="Weights that lawa keeps.",
            ),
        )
    ):
        command = option(command)
    return command
