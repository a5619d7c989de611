"""Settings of a run: presets, changes, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from castwise.errors import SettingsError
from castwise.recipes.kenken.settings import PRESETS, KenKenSettings, settings_of
from castwise.recipes.kenken.task import mixture_of


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_setting_survives_the_checkpoint(preset: str) -> None:
    """Plain data and back, with every field off its default."""
    settings = settings_of(preset, {"seed": 7, "num_steps": 11})
    odd = dataclasses.replace(
        settings, latin_share=0.25, num_loops=5, mode_shares=(0.5, 0.25, 0.25)
    )
    assert KenKenSettings.from_description(odd.describe()) == odd
    assert {f.name for f in dataclasses.fields(odd)} == set(odd.describe())


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_is_a_mixture_of_whole_shares(preset: str) -> None:
    """Shares sum to one, also after sizes and modes were chosen by hand."""
    for changes in ({}, {"sizes": "5,9", "modes": "zero,standard"}):
        mixture = mixture_of(settings_of(preset, changes))
        assert sum(mixture.size_shares) == pytest.approx(1.0)
        assert sum(mixture.mode_shares) == pytest.approx(1.0)


def test_chosen_sizes_keep_the_proportions_of_the_preset() -> None:
    """Leaving a size out does not change how the others compare."""
    small = PRESETS["small"]
    chosen = settings_of("small", {"sizes": "5,6"})
    share = dict(zip(small.sizes, small.size_shares, strict=True))
    expected = share[5] / (share[5] + share[6])
    assert chosen.size_shares == pytest.approx((expected, 1 - expected))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"sizes": "2"}, "3 to 9"),
        ({"sizes": "4,4"}, "twice"),
        ({"sizes": ""}, "--sizes"),
        ({"modes": "standard,roman"}, "roman"),
        ({"num_steps": 0}, "num_steps"),
        ({"seed": -1}, "seed"),
        ({"num_train": 0}, "num_train"),
    ],
)
def test_settings_without_a_meaning_are_refused(
    changes: dict[str, Any], word: str
) -> None:
    """Each in a sentence that names the setting."""
    with pytest.raises(SettingsError, match=word):
        settings_of("small", changes)


def test_settings_of_another_version_are_refused() -> None:
    """A name that is unknown or missing is told."""
    description = PRESETS["tiny"].describe()
    description["colour"] = "red"
    with pytest.raises(SettingsError, match="colour"):
        KenKenSettings.from_description(description)


@pytest.mark.parametrize("shares", [(0.5, 0.6), (1.5, -0.5)])
def test_shares_that_do_not_sum_to_one_are_refused(shares: tuple[float, float]) -> None:
    """Before any puzzle is made, with the sum."""
    with pytest.raises(SettingsError, match=r"sum to 1, got .* which sum to"):
        dataclasses.replace(PRESETS["tiny"], size_shares=shares)
