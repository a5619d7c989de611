"""A config file: every key that exists, and none that does not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from castwise.errors import SettingsError, StorageError
from castwise.recipes.language.config import (
    describe,
    parse_config,
    read_config,
    settings_from,
)
from castwise.recipes.language.plan import Recipe
from castwise.recipes.resolvent_lm.model import RECIPE as RESOLVENT
from castwise.recipes.soliton_lm.model import RECIPE as SOLITON

CONFIGS = Path(__file__).parents[3] / "configs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Paint:
    """Settings of every type that a config knows."""

    count: int = 1
    rate: float = 0.5
    name: str = "red"
    thick: bool = False
    pair: tuple[float, float] = (0.0, 1.0)
    words: tuple[str, ...] = ()
    limit: int | None = None


SECTIONS: dict[str, type] = {"paint": Paint}


def test_every_type_is_read() -> None:
    """Numbers in either notation, texts without quotes, lists, nothing."""
    text = """
    paint:
      count: 3
      rate: 3e-3
      name: on
      thick: true
      pair: [1, 2.5]
      words: [a, "b c"]
      limit: null
    """
    assert parse_config(text, SECTIONS)["paint"] == {
        "count": 3,
        "rate": 0.003,
        "name": "on",
        "thick": True,
        "pair": (1.0, 2.5),
        "words": ("a", "b c"),
        "limit": None,
    }


@pytest.mark.parametrize("text", ["", "# nothing\n", "paint:\n"])
def test_nothing_is_a_config(text: str) -> None:
    """What is not said has its default."""
    assert parse_config(text, SECTIONS) == {"paint": {}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("paint:\n  cuont: 3\n", r"x:2 has no key of paint 'cuont' \(did you mean co"),
        ("pant:\n  count: 3\n", r"x:1 has no section 'pant' \(did you mean paint\?"),
        ("paint:\n  zzz: 3\n", "there are count, rate, name"),
        ("paint:\n  count: many\n", r"x:2, count needs a whole number, got 'many'"),
        ("paint:\n  count: 1.5\n", "whole number"),
        ("paint:\n  rate: [1]\n", "needs one value"),
        ("paint:\n  thick: maybe\n", "true or false"),
        ("paint:\n  pair: [1]\n", "needs 2 values, got 1"),
        ("paint:\n  words: a\n", "needs a list"),
        ("paint:\n  count: 1\n  count: 2\n", r"x:3 gives count a second time"),
        ("paint: 3\n", "needs keys with values"),
        ("- 3\n", "needs keys with values"),
        ("paint: [\n", r"x:2 is no YAML"),
        ("paint: !!python/object/apply:os.getcwd []\n", "needs keys with values"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, message: str) -> None:
    """And with the nearest word where one is near."""
    with pytest.raises(SettingsError, match=message):
        parse_config(text, SECTIONS, where="x")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """One sentence."""
    with pytest.raises(StorageError, match=r"none\.yaml cannot be read"):
        read_config(tmp_path / "none.yaml", SECTIONS)


@pytest.mark.parametrize("recipe", [RESOLVENT, SOLITON], ids=lambda r: r.name)
def test_the_shipped_config_names_every_setting_with_its_default(
    recipe: Recipe,
) -> None:
    """It is the list of what can be asked, and changes nothing."""
    found = read_config(CONFIGS / f"{recipe.name}.yaml", recipe.sections())
    for name, kind in recipe.sections().items():
        given: dict[str, Any] = found[name]
        assert kind(**given) == kind()
        assert given.keys() == describe(kind()).keys()


@pytest.mark.parametrize("recipe", [RESOLVENT, SOLITON], ids=lambda r: r.name)
def test_settings_come_back_from_a_checkpoint(recipe: Recipe) -> None:
    """Plain data and back; another version's are refused by name."""
    for kind in recipe.sections().values():
        assert settings_from(kind, describe(kind())) == kind()
        with pytest.raises(SettingsError, match="sides is unknown or missing"):
            settings_from(kind, {**describe(kind()), "sides": 3})


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("text", {"validation_share": 0.0}, "validation_share"),
        ("text", {"batch_size": 0}, "text.batch_size must be at least 1"),
        ("text", {"tokenizer": "word"}, "bytes or bpe"),
        ("training", {"learning_rate": 0.0}, "above 0"),
        ("training", {"decay_share": 2.0}, r"in \[0, 1\]"),
        ("training", {"compile": "maybe"}, "auto, yes or no"),
        ("model", {"variant": "rnn"}, "layer, identity, transformer"),
    ],
)
@pytest.mark.parametrize("recipe", [RESOLVENT, SOLITON], ids=lambda r: r.name)
def test_settings_without_a_meaning_are_refused(
    recipe: Recipe, section: str, values: dict[str, Any], message: str
) -> None:
    """Before anything is made."""
    with pytest.raises(SettingsError, match=message):
        recipe.sections()[section](**values)
