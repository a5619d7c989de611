"""A YAML file into settings: sections of known keys, and nothing else.

    text:
      tokenizer: bpe
    model:
      dim: 96
    training:
      num_steps: 400

Each section is a dataclass of settings and each key one of its fields, so there is one
list of what can be asked, with one docstring each. A key that no field has is an error
that names its line and the nearest field. The text is composed into nodes and never
constructed into objects, so that a config runs no code.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from castwise.errors import SettingsError, StorageError
from castwise.wording import did_you_mean, shown

S = TypeVar("S")


def read_config(path: Path, sections: Mapping[str, type]) -> dict[str, dict[str, Any]]:
    """Read the values of a config file by section and field.

    Args:
        path: The file.
        sections: The settings class of each section.

    Raises:
        StorageError: It cannot be read.
        SettingsError: It is no such YAML; file and line are named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(
            f"the config {path} cannot be read: {reason}; check the path"
        ) from error
    return parse_config(text, sections, where=str(path))


def parse_config(
    text: str, sections: Mapping[str, type], *, where: str = "<config>"
) -> dict[str, dict[str, Any]]:
    """Read the text of a config file; messages call it `where`.

    Raises:
        SettingsError: It is no such YAML; the line is named.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        reason = getattr(error, "problem", None) or "it nests too deep"
        raise SettingsError(f"{place} is no YAML: {reason}") from error
    found: dict[str, dict[str, Any]] = {name: {} for name in sections}
    if root is None:
        return found
    for name, (node, at) in _entries(root, where, sections, "section").items():
        fields = field_types(sections[name])
        values = _entries(node, where, fields, f"key of {name}", at=at)
        for key, (value, line) in values.items():
            found[name][key] = _value(value, fields[key], f"{where}:{line}, {key}")
    return found


def field_types(settings: type) -> dict[str, Any]:
    """Return the type of each field of a settings class."""
    hints = typing.get_type_hints(settings)
    return {field.name: hints[field.name] for field in dataclasses.fields(settings)}


def settings_from(kind: type[S], description: Mapping[str, Any]) -> S:
    """Return settings from plain data of a checkpoint.

    Raises:
        SettingsError: If a name is unknown or missing.
    """
    known = field_types(kind)
    odd = sorted(set(description) ^ set(known))
    if odd:
        raise SettingsError(
            f"Settings of another version of this recipe: {', '.join(odd)} is unknown "
            "or missing; use the version of castwise that wrote them."
        )
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in description.items()
    }
    return kind(**values)


def describe(settings: Any) -> dict[str, Any]:
    """Return settings as plain data."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(settings).items()
    }


def _entries(
    node: Any, where: str, known: Mapping[str, Any], what: str, *, at: int | None = None
) -> dict[str, tuple[Any, int]]:
    """Return value and line of each key of a mapping."""
    if isinstance(node, yaml.ScalarNode) and node.value in {"", "~", "null"}:
        return {}
    if not isinstance(node, yaml.MappingNode):
        place = where if at is None else f"{where} (line {at})"
        raise SettingsError(f"{place} needs keys with values, one on each line")
    found: dict[str, tuple[Any, int]] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        name = str(key.value)
        if name not in known:
            raise SettingsError(
                f"{where}:{line} has no {what} {shown(name)}"
                f"{did_you_mean(name, known)}; there are {', '.join(known)}"
            )
        if name in found:
            raise SettingsError(f"{where}:{line} gives {name} a second time")
        found[name] = (value, line)
    return found


def _value(node: Any, kind: Any, where: str) -> Any:
    """Turn a node into a value of a field's type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in {types.UnionType, typing.Union}:
        if isinstance(node, yaml.ScalarNode) and node.value in {"", "~", "null"}:
            return None
        (kind,) = (each for each in arguments if each is not type(None))
        return _value(node, kind, where)
    if origin is tuple:
        if not isinstance(node, yaml.SequenceNode):
            raise SettingsError(f"{where} needs a list such as [a, b]")
        kinds = [arguments[0]] * len(node.value)
        if arguments[-1] is not Ellipsis:
            if len(arguments) != len(node.value):
                raise SettingsError(
                    f"{where} needs {len(arguments)} values, got {len(node.value)}"
                )
            kinds = list(arguments)
        return tuple(
            _value(each, one, where)
            for each, one in zip(node.value, kinds, strict=True)
        )
    if not isinstance(node, yaml.ScalarNode):
        raise SettingsError(f"{where} needs one value, got a list or a mapping")
    return _scalar(node, kind, where)


_TRUTH = {"true": True, "false": False}


def _scalar(node: yaml.ScalarNode, kind: type, where: str) -> Any:
    text = node.value
    if kind is str:
        return text
    if kind is bool:
        if text not in _TRUTH:
            raise SettingsError(f"{where} needs true or false, got {shown(text)}")
        return _TRUTH[text]
    try:
        return kind(text)
    except ValueError as error:
        name = "a whole number" if kind is int else "a number"
        raise SettingsError(f"{where} needs {name}, got {shown(text)}") from error
