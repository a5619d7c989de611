"""A policy as a YAML file: read with the line of every mistake, written, and described.

    castwise: 1                                  # version of this file format
    name: solver in fp32                         # optional
    default: p=fp32,c=bf16,o=bf16,r=fp32
    loss_scale: none                             # none, dynamic, static:1024; optional
    storage: split                               # of 16-bit weights; optional
    rules:
      - module: "*.propagator"
        precision: fp32
        because: residual 1e-7 in fp32, 5e-4 in bf16
    silences:                                    # of a lint; optional
      - check: lost-update
        because: the run is ten steps long

The text is composed into nodes, never constructed into objects, so a policy file runs
no code and every message can name its line. What a policy does not need is refused:
tags, anchors, deep nesting, several documents, keys given twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from castwise.errors import (
    PolicyDocumentError,
    PrecisionTextError,
    RuleError,
    StorageError,
)
from castwise.policy.keys import EMULATIONS, STORAGES, Rule
from castwise.policy.precision import AS_IS, SURROUNDINGS, Precision
from castwise.policy.silences import SILENCE_KEYS, Silence
from castwise.wording import did_you_mean, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

VERSION = 1
"""The only version of the file format so far."""

MAX_BYTES = 1 << 20
"""No policy that a person or the search writes comes near one megabyte."""

MAX_DEPTH = 8
"""A policy nests three deep; the composer of YAML would recurse into any depth."""

POLICY_KEYS: Mapping[str, str] = {
    "castwise": f"version of the file format: {VERSION}",
    "name": "what logs and reports call the policy",
    "default": "precision of every module that no rule governs",
    "loss_scale": "none, dynamic or static:<number>; decided when absent",
    "storage": f"of 16-bit weights: {', '.join(STORAGES)}; decided when absent",
    "emulation": f"of fp8: {', '.join(EMULATIONS)}; {EMULATIONS[0]} when absent",
    "rules": "ordered; the first rule that matches wins",
    "silences": "findings of a lint that are accepted, each with a reason",
}
"""The keys of a policy file and what they mean."""

RULE_KEYS: Mapping[str, str] = {
    "module": "glob on the dotted path of a module, or re: and a regular expression",
    "type": "class of a module, bare or qualified, or a glob; subclasses match",
    "op": "operator by its ATen name, in the whole model",
    "stage": "forward, backward or update",
    "phase": "warmup, full, predict or correct",
    "precision": f"one format, parts such as c=bf16, or {AS_IS}",
    "category": "for an op instead of a precision: low, fp32, widest or as_is",
    "storage": "of the 16-bit weights of these modules, as for the policy",
    "because": "the reason, one line",
}
"""The keys of a rule and what they mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyDocument:
    """What a policy file says, field by field."""

    name: str | None = None
    """The text under `name`."""

    default: Precision
    """The precision under `default`."""

    loss_scale: str | None = None
    """The text under `loss_scale`."""

    storage: str | None = None
    """The text under `storage`."""

    emulation: str | None = None
    """The text under `emulation`."""

    rules: tuple[Rule, ...] = ()
    """The rules in their order, each knowing its line."""

    silences: tuple[Silence, ...] = ()
    """The silences in their order, each knowing its line."""


def read_file(path: str | Path) -> str:
    """Return the text of a policy file.

    Raises:
        StorageError: The file is missing, a folder, or may not be read.
        PolicyDocumentError: It is no UTF-8 text, or far too large.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise StorageError(f"{path}: need a policy file, got a folder; name a file")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise StorageError(f"{path}: the policy cannot be read: {reason}") from None
    if len(raw) > MAX_BYTES:
        raise PolicyDocumentError(
            f"{path}: need a policy of at most {MAX_BYTES} bytes; is it another file?"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise PolicyDocumentError(
            f"{path}:{line}: need UTF-8 text, got byte 0x{raw[error.start]:02x}; save "
            "the file as UTF-8"
        ) from None


def read_document(text: str, where: str) -> PolicyDocument:
    """Read the text of a policy file; messages call it `where`.

    Raises:
        PolicyDocumentError: The text is malformed.
        RuleError: A rule is well formed and impossible.
    """
    _refuse_what_no_policy_needs(text, where)
    with _yaml_errors(text, where):
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None:
        raise PolicyDocumentError(
            f"{where}:1: the policy is empty; begin with castwise: {VERSION}"
        )
    place = _Place(where, root)
    entries = place.mapping(POLICY_KEYS, "a policy")
    _check_version(place, entries)
    if "default" not in entries:
        raise PolicyDocumentError(
            f"{place}: the key default is missing; write for example default: fp32"
        )
    rules = entries["rules"].sequence("rule") if "rules" in entries else ()
    silences = entries["silences"].sequence("silence") if "silences" in entries else ()
    return PolicyDocument(
        name=_name(entries.get("name")),
        default=entries["default"].precision(),
        loss_scale=_loss_scale(entries.get("loss_scale")),
        storage=_storage(entries.get("storage")),
        emulation=_emulation(entries.get("emulation")),
        rules=tuple(map(_read_rule, rules)),
        silences=tuple(map(_read_silence, silences)),
    )


def write_document(document: PolicyDocument) -> str:
    """Return the text of a policy file that reads back as `document`."""
    tree: dict[str, Any] = {"castwise": VERSION}
    if document.name is not None:
        tree["name"] = document.name
    tree["default"] = str(document.default)
    if document.loss_scale is not None:
        tree["loss_scale"] = document.loss_scale
    if document.storage is not None:
        tree["storage"] = document.storage
    if document.emulation is not None:
        tree["emulation"] = document.emulation
    if document.rules:
        tree["rules"] = [_rule_tree(rule) for rule in document.rules]
    if document.silences:
        tree["silences"] = [
            {key: text for key in SILENCE_KEYS if (text := getattr(silence, key))}
            for silence in document.silences
        ]
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=1 << 20)


def _rule_tree(rule: Rule) -> dict[str, str]:
    if rule.predicate is not None:
        raise RuleError(
            f"{rule.label}: a predicate is Python and cannot be written to a file; "
            "use module or type instead"
        )
    texts = {
        field.name: str(getattr(rule, field.name))
        for field in fields(rule)
        if field.name in RULE_KEYS and getattr(rule, field.name)
    }
    if rule.category is not None or (rule.storage and rule.precision == SURROUNDINGS):
        del texts["precision"]
    return {key: texts[key] for key in RULE_KEYS if key in texts}


def _read_rule(place: _Place) -> Rule:
    entries = place.mapping(RULE_KEYS, "a rule")
    if not entries.keys() & {"precision", "category", "storage"}:
        raise PolicyDocumentError(
            f"{place}: the rule says no precision; write for example precision: fp32"
        )
    texts: dict[str, Any] = {
        key: entry.text() for key, entry in entries.items() if key != "precision"
    }
    if "precision" in entries:
        texts["precision"] = entries["precision"].precision()
    return Rule(**texts, where=str(place))


def _read_silence(place: _Place) -> Silence:
    entries = place.mapping(SILENCE_KEYS, "a silence")
    missing = [key for key in ("check", "because") if key not in entries]
    if missing:
        raise PolicyDocumentError(
            f"{place}: the silence says no {' and no '.join(missing)}; a finding is "
            "accepted by its check, with a reason"
        )
    texts = {key: entry.text() for key, entry in entries.items()}
    return Silence(**texts, where=str(place))


def _name(place: _Place | None) -> str | None:
    if place is None:
        return None
    check_name(place.text(), str(place))
    return place.text()


def _loss_scale(place: _Place | None) -> str | None:
    if place is None:
        return None
    check_loss_scale(place.text(), str(place))
    return place.text()


def _storage(place: _Place | None) -> str | None:
    if place is None:
        return None
    check_storage(place.text(), str(place))
    return place.text()


def _emulation(place: _Place | None) -> str | None:
    if place is None:
        return None
    check_emulation(place.text(), str(place))
    return place.text()


def check_name(text: str, where: str) -> None:
    """Refuse a name that would not survive a log line or a file."""
    if not text or not text.isprintable() or text != text.strip():
        raise PolicyDocumentError(
            f"{where}: name needs one line of printable text, got {shown(text)}"
        )


def check_loss_scale(text: str, where: str) -> None:
    """Refuse a loss scale that is none of `none`, `dynamic`, `static:<number>`."""
    kind, _, number = text.partition(":")
    if text in {"none", "dynamic"} or (kind == "static" and _is_scale(number)):
        return
    raise PolicyDocumentError(
        f"{where}: loss_scale needs none, dynamic or static:<number above 0>, got "
        f"{shown(text)}; leave it out to let castwise decide"
    )


def check_storage(text: str, where: str) -> None:
    """Refuse a storage of weights that there is none of."""
    if text not in STORAGES:
        raise PolicyDocumentError(
            f"{where}: storage needs one of {', '.join(STORAGES)}, got {shown(text)}"
            f"{did_you_mean(text, STORAGES)}; leave it out to let castwise decide"
        )


def check_emulation(text: str, where: str) -> None:
    """Refuse an answer to emulation that there is none of."""
    if text not in EMULATIONS:
        raise PolicyDocumentError(
            f"{where}: emulation needs one of {', '.join(EMULATIONS)}, got "
            f"{shown(text)}{did_you_mean(text, EMULATIONS)}"
        )


def _is_scale(number: str) -> bool:
    try:
        return 0 < float(number) < math.inf
    except ValueError:
        return False


def _check_version(place: _Place, entries: Mapping[str, _Place]) -> None:
    if "castwise" not in entries:
        raise PolicyDocumentError(
            f"{place}: the key castwise is missing; begin with castwise: {VERSION}"
        )
    got = entries["castwise"].text()
    if got != str(VERSION):
        raise PolicyDocumentError(
            f"{entries['castwise']}: need castwise: {VERSION}, got {shown(got)}; this "
            f"castwise reads version {VERSION} only"
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """A node of the file together with where it stands."""

    file: str
    node: yaml.Node

    def __str__(self) -> str:
        return f"{self.file}:{self.node.start_mark.line + 1}"

    def mapping(self, known: Iterable[str], what: str) -> dict[str, _Place]:
        """Return the entries of a mapping whose keys are all known and given once."""
        if not isinstance(self.node, yaml.MappingNode):
            raise PolicyDocumentError(
                f"{self}: {what} needs keys and values, got {self._kind()}; write "
                f"lines such as {next(iter(known))}: ..."
            )
        entries: dict[str, _Place] = {}
        for key_node, value_node in self.node.value:
            key_place = _Place(self.file, key_node)
            key = key_place.text()
            if key not in known:
                raise PolicyDocumentError(
                    f"{key_place}: unknown key {shown(key)}"
                    f"{did_you_mean(key, known)}; {what} has {', '.join(known)}"
                )
            if key in entries:
                raise PolicyDocumentError(
                    f"{key_place}: the key {key} stands here and at {entries[key]}; "
                    "keep one"
                )
            entries[key] = _Place(self.file, value_node)
        return entries

    def sequence(self, item: str) -> tuple[_Place, ...]:
        """Return the items of a list, of which each is called `item`."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise PolicyDocumentError(
                f"{self}: {item}s need a list, got {self._kind()}; begin each {item} "
                "with -"
            )
        return tuple(_Place(self.file, each) for each in self.node.value)

    def text(self) -> str:
        """Return a scalar as one line of text, whatever YAML would make of it."""
        if not isinstance(self.node, yaml.ScalarNode) or self.node.value == "":
            raise PolicyDocumentError(f"{self}: need a text, got {self._kind()}")
        return " ".join(self.node.value.split())

    def precision(self) -> Precision:
        """Return the precision that a scalar names."""
        try:
            return Precision.parse(self.text())
        except PrecisionTextError as error:
            raise PolicyDocumentError(f"{self}: {error}") from None

    def _kind(self) -> str:
        if isinstance(self.node, yaml.MappingNode):
            return "keys and values"
        if isinstance(self.node, yaml.SequenceNode):
            return "a list"
        return shown(self.node.value) if self.node.value else "nothing"


def _refuse_what_no_policy_needs(text: str, where: str) -> None:
    """Walk the events, which needs no recursion, before anything is composed."""
    depth = 0
    with _yaml_errors(text, where):
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            place = f"{where}:{_line(event.start_mark)}"
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise PolicyDocumentError(
                    f"{place}: nested deeper than {MAX_DEPTH}; a policy is a list of "
                    "flat rules"
                )
            if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
                raise PolicyDocumentError(
                    f"{place}: anchors and aliases are refused; quote a text that "
                    "begins with & or *"
                )
            tag = getattr(event, "tag", None)
            if tag is not None:
                raise PolicyDocumentError(
                    f"{place}: the tag {shown(str(tag))} is refused; leave it out"
                )


class _yaml_errors:  # noqa: N801 -- a context manager reads as a verb
    """Turn what PyYAML raises into one sentence with file and line."""

    def __init__(self, text: str, where: str) -> None:
        self.text = text
        self.where = where

    def __enter__(self) -> None: ...

    def __exit__(
        self, _kind: object, error: BaseException | None, _trace: object
    ) -> None:
        if isinstance(error, yaml.reader.ReaderError):
            line = self.text.count("\n", 0, error.position) + 1
            raise PolicyDocumentError(
                f"{self.where}:{line}: a character that is no text, U+"
                f"{ord(self.text[error.position]):04X}; is it another file?"
            ) from None
        if isinstance(error, yaml.MarkedYAMLError):
            line = _line(error.problem_mark or error.context_mark)
            problem = " ".join(f"{error.context or ''} {error.problem or ''}".split())
            raise PolicyDocumentError(
                f"{self.where}:{line}: no valid YAML: {problem}{_hint(problem)}"
            ) from None
        if isinstance(error, yaml.YAMLError | ValueError):
            # PyYAML leaks ValueError on impossible escapes and versions
            raise PolicyDocumentError(
                f"{self.where}: no valid YAML: {' '.join(str(error).split())[:120]}"
            ) from None


def _line(mark: Any) -> int:
    return 1 if mark is None else mark.line + 1


def _hint(problem: str) -> str:
    """Return the remedy for the mistakes that YAML words badly."""
    if r"'\t'" in problem:
        return "; indent with spaces"
    if "alias" in problem:
        return "; quote a text that begins with *"
    if "mapping values are not allowed" in problem:
        return "; quote a text that contains a colon"
    return ""
